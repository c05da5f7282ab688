"""What a factorization is given and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import sympy

from tnmoe.dims import Dim, symbol, symbol_names
from tnmoe.errors import DeclarationError
from tnmoe.layer import Parameter
from tnmoe.network import Tensor


class Sizes:
    """Collects the size of every index, as a symbol with (where the declaration fixed it) its integer.

    The symbols carry the field's usual names (`I`, `O`, `N`, `R`, …) so that formulas read like a paper's; a
    size that the user declared as a symbol keeps that symbol.
    """

    def __init__(self, declared: Iterable[Dim]) -> None:
        self.sizes: dict[str, Dim] = {}
        self.values: dict[str, int] = {}
        self._taken = symbol_names(declared)

    def add(self, index: str, name: str, dim: Dim | None) -> Dim:
        """Give `index` a size: symbol `name` (with the value `dim` if that is an integer), or `dim` itself.

        Returns the symbolic size.
        """
        size: Dim
        if isinstance(dim, sympy.Expr):
            size = dim
        else:
            while name in self._taken:
                name += "_"
            size = symbol(name)
            if dim is not None:
                if self.values.get(name, dim) != dim:
                    raise DeclarationError(f"{name} is {self.values[name]} and {dim} in one layer")
                self.values[name] = dim
        self.sizes[index] = size
        return size


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes of the weight tensor of a layer, as index names.

    Attributes:
        experts: one index a level of the hierarchy.
        input, output: the indices of the linear map.
        fan_in: the input's symbolic size.
        gate_sums: for each level, the sum and the sum of squares of the coefficients at initialisation, where
            all experts of a level share equally (1 and 1/N for gates that sum to one).
    """

    experts: tuple[str, ...]
    input: str
    output: str
    fan_in: Dim
    gate_sums: tuple[tuple[Dim, Dim], ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """The weight tensor as stored factors.

    Attributes:
        parameters: experts' factors first, then input and output, in the reference's order and layout.
        bias: the folded bias, the extra slice of `input`'s factor along the input index, if there is one.
        input: name of the factor that has the input index.
        names: what to call the product of some factors (by name) with the data they join (see `Contraction`);
            "x" stands for the layer's input and "a1", "a2", … for the coefficients.
    """

    parameters: tuple[Parameter, ...]
    bias: Parameter | None
    input: str
    names: Mapping[frozenset[str], str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The factors as leaves of a network."""
        return tuple(Tensor(p.name, p.indices, p.role) for p in self.parameters)


class Factorization(Protocol):
    """Ranks that turn the modes of a weight tensor into factors."""

    kind: ClassVar[str]

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Add the bonds to `sizes` and return the factors; parameter names start with `prefix`."""
        ...

    def dims(self) -> tuple[Dim, ...]:
        """The declared ranks."""
        ...

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the ranks do not fit that many levels of experts."""
        ...

    def declaration(self) -> dict[str, Any]:
        """The mapping that declares it, as in a TOML file."""
        ...


def numbered(name: str, level: int, levels: int) -> str:
    """`name` for a single level, else `name_1`, `name_2`, …"""
    return name if levels == 1 else f"{name}_{level + 1}"


def stage_names(prefix: str, experts: Sequence[Parameter], input_factor: Parameter) -> dict[frozenset[str], str]:
    """Names of the usual intermediate results of a layer whose experts and input have a factor each."""
    levels = len(experts)
    mixed = frozenset(p.name for p in experts) | {f"a{e + 1}" for e in range(levels)}
    single = {frozenset({p.name, f"a{e + 1}"}): prefix + numbered("experts", e, levels) for e, p in enumerate(experts)}
    return single | {
        mixed: prefix + "experts",
        frozenset({input_factor.name, "x"}): prefix + "projected",
        mixed | {input_factor.name, "x"}: prefix + "gated",
    }


def mixing_energy(modes: Modes) -> Dim:
    """Second moment of a sum of N(1, 1) entries mixed by the initial coefficients: Π_e (s₁² + s₂)."""
    return sympy.prod([sympy.sympify(s1) ** 2 + s2 for s1, s2 in modes.gate_sums])
