"""Kronecker: every expert's matrix is a sum of Kronecker products of two small matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes
from tnmoe.factorizations.splitting import split_axis
from tnmoe.factorizations.start import assemble
from tnmoe.symbolic.dims import Size, as_dim


@dataclass(frozen=True, slots=True)
class Kronecker(Declared):
    """W[n…] = Σ_s A[n…, s] ⊗ B[n…, s] (Van Loan & Pitsianis, 1993); ΠN · S(I1 O1 + I2 O2) parameters.

    Input and output are split in two, I = I1·I2 and O = O1·O2: A is I1 × O1, B is I2 × O2.

    Args:
        left: I1 and O1; I2 and O2 follow from the layer's widths.
        terms: the number S of products.
        pad: if I1 or O1 does not divide its width, append zeros (cut off outputs) instead of refusing.
    """

    left: Sequence[Size]
    terms: Size = 1
    pad: bool = False
    kind: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        self.check_list("left", "[16, 32]")
        if len(self.left) != 2:
            raise DeclarationError(f"left must be the two sizes of the left factor, e.g. [16, 32], got {self.left!r}")
        self.check_size("terms")
        self.check_flag("pad")

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        first_in, first_out, *_ = self.dims()
        into = split_axis(sizes, modes.input, first_in, pad=self.pad, what="left[0]")
        out = split_axis(sizes, modes.output, first_out, pad=self.pad, what="left[1]")
        sizes.add("s", "S", as_dim(self.terms, "terms"))
        factors = {
            "left": (*modes.experts, "s", into.parts[0], out.parts[0]),
            "right": (*modes.experts, "s", into.parts[1], out.parts[1]),
        }
        return assemble(factors, modes, sizes, prefix=prefix, bias=bias, splits=(into, out))
