"""Low rank per expert: every expert's matrix is a product of two of its own, W[n…] = A[n…] · B[n…]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes
from tnmoe.factorizations.start import assemble
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class LowRank(Declared):
    """Nothing is shared between experts; ΠN · R(I + O) parameters.

    Args:
        rank: of each expert's matrix.
    """

    rank: Size
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        self.check_size("rank")

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        sizes.add("r", "R", *self.dims())
        factors = {
            "input_factor": (*modes.experts, modes.input, "r"),
            "output_factor": (*modes.experts, "r", modes.output),
        }
        return assemble(factors, modes, sizes, prefix=prefix, bias=bias)
