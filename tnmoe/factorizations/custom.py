"""Any einsum as the network of a layer's weight, with the data that it meets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from tnmoe.errors import DeclarationError, point_at
from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes
from tnmoe.factorizations.start import assemble
from tnmoe.ir.network import Network
from tnmoe.symbolic.dims import Size, as_dim, check_name

TAKEN = frozenset("tihon")
"""Indices that a layer uses itself; a bond called so gets an underscore."""


@dataclass(frozen=True, slots=True)
class Custom(Declared):
    """A weight given by an einsum such as `Custom("bn,nr,bi,ir,ro->bo", sizes={"r": 64})`, which is CP.

    The first letter of the output counts the tokens, the second one the outputs. Terms that hold the token letter
    are data: the last of them is the input, those before are the coefficients of the levels. All others are
    trained, and every letter that is not a mode of the layer is a bond.

    Args:
        expression: one letter an index.
        sizes: of every bond.

    Raises:
        DeclarationError: with carets under the fault.
    """

    expression: str
    sizes: Mapping[str, Size] = field(default_factory=dict)
    kind: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        self._parsed()
        if not isinstance(self.sizes, Mapping):
            raise DeclarationError(f"sizes must be a table such as {{ r = 64 }}, got {self.sizes!r}")
        checked = {str(k): as_dim(v, f"sizes.{k}") for k, v in self.sizes.items()}
        object.__setattr__(self, "sizes", checked)
        data, weights = self._parsed()
        ends = {i for term in data for i in term} | set(self._network().output)
        bonds = list(dict.fromkeys(i for term in weights for i in term if i not in ends))
        for bond in bonds:
            if bond not in checked:
                at = self.expression.index(bond)
                raise self._fault(f"bond {bond!r} has no size: add sizes={{{bond!r}: …}}", at)
        for name in checked:
            if name not in bonds:
                raise DeclarationError(f"sizes names {name!r}, which is no bond; the bonds are {', '.join(bonds)}")

    def _fault(self, reason: str, start: int, length: int = 1) -> DeclarationError:
        return DeclarationError(f"{reason}\n{point_at(self.expression, start, length)}")

    def _network(self) -> Network:
        return Network.parse(self.expression)

    def _parsed(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """The terms of data and of weights, in order."""
        network = self._network()
        arrow = self.expression.index("->")
        if len(network.output) != 2:
            raise self._fault(
                "the output must be two indices, tokens and outputs", arrow + 2, len(self.expression) - arrow - 2
            )
        token, output = network.output
        data: list[tuple[str, ...]] = []
        weights: list[tuple[str, ...]] = []
        position = 0
        for text, tensor in zip(self.expression[:arrow].split(","), network.tensors, strict=True):
            if token in tensor.indices:
                if len(tensor.indices) != 2 or tensor.indices[0] != token or output in tensor.indices:
                    raise self._fault(
                        f"a term with the token index {token!r} is data: {token!r} and one more index, a level of "
                        f"experts or (in the last such term) the input",
                        position,
                        len(text),
                    )
                data.append(tensor.indices)
            else:
                weights.append(tensor.indices)
            position += len(text) + 1
        if not data:
            raise self._fault(f"no term has the token index {token!r}, so there is no input", arrow + 2)
        known = [term[1] for term in data]
        for name in (*known, output):
            if not any(name in term for term in weights):
                raise self._fault(f"index {name!r} is in no weight", self.expression.index(name))
        return data, weights

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the expression has another number of levels of experts."""
        data, _ = self._parsed()
        if len(data) != levels + 1:
            terms = ", ".join("".join(d) for d in data)
            raise self._fault(
                f"the terms {terms} are the coefficients of {len(data) - 1} level(s) of experts and the input, but the "
                f"layer has {levels} level(s)",
                0,
                self.expression.index("->"),
            )

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        self.check_levels(len(modes.experts))
        data, weights = self._parsed()
        _, output = self._network().output
        names = dict(zip((term[1] for term in data), (*modes.experts, modes.input), strict=True)) | {
            output: modes.output
        }
        for bond, size in self.sizes.items():
            names[bond] = bond + "_" if bond in TAKEN else bond
            sizes.add(names[bond], names[bond], as_dim(size, bond))
        made: dict[str, tuple[str, ...]] = {}
        for term in weights:
            stem = check_name("w_" + "".join(term), "factor")
            while stem in made:
                stem += "_"
            made[stem] = tuple(names[i] for i in term)
        # The last factor is the one that pays for what is left, so let it be the output's.
        last = next(stem for stem in reversed(made) if modes.output in made[stem])
        made[last] = made.pop(last)
        return assemble(made, modes, sizes, prefix=prefix, bias=bias)
