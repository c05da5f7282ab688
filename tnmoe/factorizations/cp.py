"""CP (canonical polyadic) factorization: W[n1…nE, i, o] = Σ_r Π_e A^e[n_e, r] · B[i, r] · C[o, r]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes, mixing_energy, numbered, stage_names
from tnmoe.ir.initialise import Normal, Uniform
from tnmoe.ir.value import Parameter
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class CP(Declared):
    """CP μMoE (arXiv 2402.12550, equation 2); R(ΣN + I + O) parameters.

    Args:
        rank: number of terms R; an int or a symbol.
    """

    rank: Size
    kind: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        self.check_size("rank")

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Expert factors start at N(1, 1); the output factor's scale makes the mixed map nn.Linear's in variance."""
        levels = len(modes.experts)
        rank = sizes.add("r", "R", *self.dims())
        part = prefix.rstrip("_")
        experts = [
            Parameter(prefix + numbered("expert_factor", e, levels), (n, "r"), Normal(1, 1), part)
            for e, n in enumerate(modes.experts)
        ]
        from_input = Uniform(1 / sympy.sqrt(modes.fan_in))
        to_output = Uniform(sympy.sqrt(3 / (rank * mixing_energy(modes))))
        factor_in = Parameter(prefix + "input_factor", (modes.input, "r"), from_input, part)
        factor_out = Parameter(prefix + "output_factor", (modes.output, "r"), to_output, part)
        return Factors(
            parameters=(*experts, factor_in, factor_out),
            bias=Parameter(prefix + "input_bias", ("r",), from_input, part) if bias else None,
            input=factor_in.name,
            names=stage_names(prefix, experts, factor_in),
        )
