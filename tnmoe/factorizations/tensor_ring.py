"""Tensor ring: W[n1…nE, i, o] = trace of G¹[n1] … G^E[nE] · B[i] · C[o], each core a matrix between two bonds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.factorizations.base import (
    Declared,
    Factors,
    Modes,
    Sizes,
    check_order,
    mixing_energy,
    mode_names,
    mode_order,
    mode_stems,
    stage_names,
)
from tnmoe.ir.initialise import DiagonalNormal, Init, Uniform
from tnmoe.ir.value import Parameter
from tnmoe.symbolic.dims import Dim, Size


@dataclass(frozen=True, slots=True)
class TensorRing(Declared):
    """TR μMoE (arXiv 2402.12550, equation 4); Σ_j r_j · mode_j · r_{j+1} parameters.

    Args:
        ranks: the bonds r1 … r_{E+2}, cyclic: core j lies between r_j and r_{j+1}, the last core between
            r_{E+2} and r1. E levels of experts need E + 2 ranks.
        order: of the modes along the ring, by default experts, input, output: e.g. `("n1", "i", "n2", "o")`
            (one level: `"n"`).
    """

    ranks: Sequence[Size]
    order: Sequence[str] | None = None
    kind: ClassVar[str] = "tensor_ring"

    def __post_init__(self) -> None:
        self.check_list("ranks")
        object.__setattr__(self, "order", check_order(self.order))

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if ranks or order do not fit that many levels of experts."""
        self.check_count(self.dims(), [f"r{k + 1}" for k in range(levels + 2)], levels, "a tensor ring")
        mode_order(self.order, levels)

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Expert slices start as diagonals of N(1, 1); the output core's scale makes the mixed map nn.Linear's."""
        levels = len(modes.experts)
        self.check_levels(levels)
        order = mode_order(self.order, levels)
        bonds = [f"r{k + 1}" for k in range(levels + 2)]
        bond_sizes = [sizes.add(b, b, r) for b, r in zip(bonds, self.dims(), strict=True)]
        part = prefix.rstrip("_")
        from_input = Uniform(1 / sympy.sqrt(modes.fan_in))
        terms = _terms(order, bond_sizes)
        to_output = Uniform(sympy.sqrt(3 / (terms * mixing_energy(modes))))
        cores: list[Parameter] = []
        for mode, stem in zip(mode_names(levels), mode_stems(levels, "core"), strict=True):
            at = order.index(mode)
            left, right = bonds[at], bonds[(at + 1) % len(bonds)]
            init: Init = {"i": from_input, "o": to_output}.get(mode) or DiagonalNormal(left, right)
            cores.append(Parameter(prefix + stem, (left, modes.by_name[mode], right), init, part))
        *experts, core_in, _ = cores
        rest = tuple(i for i in core_in.indices if i != modes.input)
        return Factors(
            parameters=tuple(cores),
            bias=Parameter(prefix + "input_bias", rest, from_input, part) if bias else None,
            input=core_in.name,
            names=stage_names(prefix, experts, core_in),
        )


def _terms(order: tuple[str, ...], bonds: list[Dim]) -> Dim:
    """How many of the ring's products are not zero when expert slices are diagonal.

    A run of bonds with nothing but expert cores between them has one value on each diagonal: as many as the smallest.
    """
    first, last = sorted((order.index("i"), order.index("o")))
    between = bonds[first + 1 : last + 1]
    around = bonds[last + 1 :] + bonds[: first + 1]
    return sympy.Min(*around) * sympy.Min(*between)
