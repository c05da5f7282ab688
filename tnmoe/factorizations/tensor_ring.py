"""Tensor ring: W[n1…nE, i, o] = trace of G¹[n1] … G^E[nE] · B[i] · C[o], each core a matrix between two bonds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from tnmoe.dims import Dim, Size, as_dim, dim_text
from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Factors, Modes, Sizes, mixing_energy, numbered, stage_names
from tnmoe.initialise import DiagonalNormal, Uniform
from tnmoe.layer import Parameter


@dataclass(frozen=True, slots=True)
class TensorRing:
    """TR μMoE (arXiv 2402.12550, equation 4); Σ_j r_j · mode_j · r_{j+1} parameters.

    Args:
        ranks: the bonds r1 … r_{E+2}, cyclic: core j lies between r_j and r_{j+1}, the output core between
            r_{E+2} and r1. E levels of experts need E + 2 ranks.
    """

    ranks: Sequence[Size]
    kind: ClassVar[str] = "tensor_ring"

    def __post_init__(self) -> None:
        given: object = self.ranks
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise DeclarationError(f"ranks must be a list such as [4, 4, 149], got {given!r}")
        ranks = tuple(as_dim(r, f"ranks[{k}]") for k, r in enumerate(given))
        object.__setattr__(self, "ranks", ranks)

    def dims(self) -> tuple[Dim, ...]:
        """The declared ranks."""
        return tuple(as_dim(r, "rank") for r in self.ranks)

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the ranks do not fit that many levels of experts."""
        if len(self.ranks) != levels + 2:
            raise DeclarationError(
                f"ranks has {len(self.ranks)} entries, expected {levels + 2}: a tensor ring over {levels} level(s) "
                f"of experts, input and output has {levels + 2} bonds; got {[dim_text(r) for r in self.dims()]}"
            )

    def declaration(self) -> dict[str, Any]:
        """The mapping that declares it, as in a TOML file."""
        return {"kind": self.kind, "ranks": [dim_text(r) for r in self.dims()]}

    def __str__(self) -> str:
        return f"TensorRing(ranks=({', '.join(map(str, self.ranks))}))"

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Expert slices start as diagonals of N(1, 1); the output core's scale makes the mixed map nn.Linear's."""
        levels = len(modes.experts)
        self.check_levels(levels)
        bonds = [f"r{k + 1}" for k in range(levels + 2)]
        bond_sizes = [sizes.add(b, b, r) for b, r in zip(bonds, self.dims(), strict=True)]
        part = prefix.rstrip("_")
        experts = [
            Parameter(
                prefix + numbered("expert_core", e, levels),
                (bonds[e], n, bonds[e + 1]),
                DiagonalNormal(bonds[e], bonds[e + 1]),
                part,
            )
            for e, n in enumerate(modes.experts)
        ]
        from_input = Uniform(1 / sympy.sqrt(modes.fan_in))
        # The mixed slices are diagonal, so min(r1 … r_{E+1}) of the ring's products are not zero.
        terms = sympy.Min(*bond_sizes[:-1]) * bond_sizes[-1]
        to_output = Uniform(sympy.sqrt(3 / (terms * mixing_energy(modes))))
        core_in = Parameter(prefix + "input_core", (bonds[-2], modes.input, bonds[-1]), from_input, part)
        core_out = Parameter(prefix + "output_core", (bonds[-1], modes.output, bonds[0]), to_output, part)
        return Factors(
            parameters=(*experts, core_in, core_out),
            bias=Parameter(prefix + "input_bias", (bonds[-2], bonds[-1]), from_input, part) if bias else None,
            input=core_in.name,
            names=stage_names(prefix, experts, core_in),
        )
