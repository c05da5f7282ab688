"""No factorization: the whole weight tensor W[n1…nE, i, o] is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from tnmoe.dims import Dim
from tnmoe.factorizations.base import Factors, Modes, Sizes
from tnmoe.initialise import SharedUniform
from tnmoe.layer import Parameter


@dataclass(frozen=True, slots=True)
class Dense:
    """Every expert has a full matrix; ΠN · I · O parameters."""

    kind: ClassVar[str] = "dense"

    def dims(self) -> tuple[Dim, ...]:
        """The declared ranks."""
        return ()

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the ranks do not fit that many levels of experts; there are none."""

    def declaration(self) -> dict[str, Any]:
        """The mapping that declares it, as in a TOML file."""
        return {"kind": self.kind}

    def __str__(self) -> str:
        return "Dense()"

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Experts start around one shared draw; the scale makes the mixed map nn.Linear's in variance."""
        part = prefix.rstrip("_")
        shared = sympy.prod([sympy.sympify(s1) ** 2 for s1, _ in modes.gate_sums])
        own = sympy.prod([sympy.sympify(s2) for _, s2 in modes.gate_sums])
        init = SharedUniform(modes.experts, 1 / sympy.sqrt(modes.fan_in * (shared + own)))
        weight = Parameter(prefix + "weight", (*modes.experts, modes.input, modes.output), init, part)
        bias_parameter = Parameter(prefix + "bias", (*modes.experts, modes.output), init, part)
        return Factors((weight,), bias_parameter if bias else None, weight.name)
