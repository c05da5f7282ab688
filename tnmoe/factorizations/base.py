"""What a factorization is given and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Protocol

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.ir.layer import AxisSplit
from tnmoe.ir.network import Tensor
from tnmoe.ir.value import Parameter
from tnmoe.symbolic.dims import Dim, as_dim, dim_text, symbol, symbol_names


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

    def number(self, index: str) -> Dim:
        """The size of `index`: its integer if the declaration fixed it, else the formula."""
        size = self.sizes[index]
        return self.values.get(str(size), size)


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes of the weight tensor of a layer, as index names.

    Attributes:
        experts: one index a level of the hierarchy; none for a plain linear map.
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

    @property
    def by_name(self) -> dict[str, str]:
        """Each mode's index by the name that declarations use (see `mode_names`)."""
        indices = (*self.experts, self.input, self.output)
        return dict(zip(mode_names(len(self.experts)), indices, strict=True))


@dataclass(frozen=True, slots=True)
class Factors:
    """The weight tensor as stored factors.

    Attributes:
        parameters: experts' factors first, then input and output, in the reference's order and layout.
        bias: the folded bias, the extra slice of `input`'s factor along the input index, if there is one.
        input: name of the factor that has the input index; "" if no single one has it.
        names: what to call the product of some factors (by name) with the data they join (see `Contraction`);
            "x" stands for the layer's input and "a1", "a2", … for the coefficients.
        added: a bias (experts…, output) that is mixed and added by itself, where the input index cannot hold it.
        splits: of the input and the output index, where the factors have them in parts.
    """

    parameters: tuple[Parameter, ...]
    bias: Parameter | None
    input: str
    names: Mapping[frozenset[str], str] = field(default_factory=dict)
    added: Parameter | None = None
    splits: tuple[AxisSplit, ...] = ()

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


class Declared:
    """What every factorization's dataclass has: checks of its fields, and its plain forms."""

    __slots__ = ()
    kind: ClassVar[str]

    def check_size(self, *keys: str) -> None:
        """Turn the fields `keys` into checked dimensions."""
        for key in keys:
            object.__setattr__(self, key, as_dim(getattr(self, key), key))

    def check_list(self, key: str, example: str = "[4, 4, 149]") -> None:
        """Turn the field `key` into a tuple of checked dimensions."""
        given = getattr(self, key)
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise DeclarationError(f"{key} must be a list such as {example}, got {given!r}")
        object.__setattr__(self, key, tuple(as_dim(r, f"{key}[{k}]") for k, r in enumerate(given)))

    def check_flag(self, key: str) -> None:
        """Raise `DeclarationError` unless the field `key` is a bool."""
        if not isinstance(getattr(self, key), bool):
            raise DeclarationError(f"{key} must be true or false, got {getattr(self, key)!r}")

    def check_count(self, ranks: Sequence[Dim], wanted: Sequence[str], levels: int, what: str) -> None:
        """Raise `DeclarationError` unless the declared `ranks` are as many as `wanted` names."""
        if len(ranks) != len(wanted):
            raise DeclarationError(
                f"ranks has {len(ranks)} entries, expected {len(wanted)}: {what} over {levels} level(s) of experts, "
                f"input and output has {', '.join(wanted)}; got {[dim_text(r) for r in ranks]}"
            )

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the ranks do not fit that many levels of experts; by default all do."""

    def dims(self) -> tuple[Dim, ...]:
        """The declared ranks."""
        return tuple(d for _, value in self._given() for d in _dims(value))

    def declaration(self) -> dict[str, Any]:
        """The mapping that declares it, as in a TOML file."""
        return {"kind": self.kind} | {key: _plain(value) for key, value in self._given()}

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={_shown(value)}' for key, value in self._given())})"

    def _given(self) -> list[tuple[str, Any]]:
        """Fields and values, those left out that have their default."""
        values = [(f, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]  # all are dataclasses
        return [(f.name, value) for f, value in values if f.default is MISSING or f.default != value]


def _dims(value: Any) -> list[Dim]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [d for v in value for d in _dims(v)]
    return [value] if isinstance(value, int | sympy.Expr) and not isinstance(value, bool) else []


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else dim_text(value)


def _shown(value: Any) -> str:
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else str(value)


def numbered(name: str, level: int, levels: int) -> str:
    """`name` for a single level, else `name_1`, `name_2`, …"""
    return name if levels == 1 else f"{name}_{level + 1}"


def mode_names(levels: int) -> tuple[str, ...]:
    """How declarations call the modes: n (or n1, n2, …), i and o."""
    return (*(numbered("n", e, levels).replace("_", "") for e in range(levels)), "i", "o")


def mode_order(order: object, levels: int) -> tuple[str, ...]:
    """The declared order of the modes, by default experts, input, output.

    Raises:
        DeclarationError: if it is no permutation of the mode names.
    """
    names = mode_names(levels)
    if order is None:
        return names
    assert isinstance(order, tuple)
    if sorted(order) != sorted(names):
        raise DeclarationError(f"order must be the modes {', '.join(names)} in some order, got {list(order)}")
    return order


def check_order(order: object) -> tuple[str, ...] | None:
    """A declared order as a tuple of names, or a `DeclarationError`."""
    if order is None:
        return None
    if isinstance(order, str) or not isinstance(order, Sequence) or not all(isinstance(m, str) for m in order):
        raise DeclarationError(f'order must be a list of modes such as ["i", "n", "o"], got {order!r}')
    return tuple(order)


def mode_stems(levels: int, what: str) -> tuple[str, ...]:
    """Names of the factors of the modes, e.g. `expert_factor_1`, …, `input_factor`, `output_factor`."""
    return (*(numbered(f"expert_{what}", e, levels) for e in range(levels)), f"input_{what}", f"output_{what}")


def stage_names(prefix: str, experts: Sequence[Parameter], input_factor: Parameter) -> dict[frozenset[str], str]:
    """Names of the usual intermediate results of a layer whose experts and input have a factor each."""
    levels = len(experts)
    projected = {frozenset({input_factor.name, "x"}): prefix + "projected"}
    if not experts:
        return projected
    mixed = frozenset(p.name for p in experts) | {f"a{e + 1}" for e in range(levels)}
    single = {frozenset({p.name, f"a{e + 1}"}): prefix + numbered("experts", e, levels) for e, p in enumerate(experts)}
    return single | {mixed: prefix + "experts"} | projected | {mixed | {input_factor.name, "x"}: prefix + "gated"}


def mixing_energy(modes: Modes) -> Dim:
    """Second moment of a sum of N(1, 1) entries mixed by the initial coefficients: Π_e (s₁² + s₂)."""
    return sympy.prod([sympy.sympify(s1) ** 2 + s2 for s1, s2 in modes.gate_sums])
