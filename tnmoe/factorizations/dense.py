"""No factorization: the whole weight tensor W[n1…nE, i, o] is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes
from tnmoe.factorizations.start import assemble


@dataclass(frozen=True, slots=True)
class Dense(Declared):
    """Every expert has a full matrix; ΠN · I · O parameters."""

    kind: ClassVar[str] = "dense"

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Experts start around one shared draw; the scale makes the mixed map nn.Linear's in variance."""
        weight = (*modes.experts, modes.input, modes.output)
        return assemble({"weight": weight}, modes, sizes, prefix=prefix, bias=bias)
