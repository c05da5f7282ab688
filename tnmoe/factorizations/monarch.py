"""Monarch, or block tensor train of two cores: two block-diagonal matrices with a permutation between them."""

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
class Monarch(Declared):
    """W[n…, (i1 i2), (o1 o2)] = Σ_r A[n…, i1, i2, o1, r] · B[n…, i1, o1, r, o2]; ΠN · R·I1·O1(I2 + O2) parameters.

    Monarch matrices (Dao et al., 2022, arXiv 2204.00595) have R = 1; R > 1 is the block tensor train of Qiu et al.
    (2024, arXiv 2406.06248) with two cores. A works within each of the I1 blocks of the input, B within each of the
    O1 blocks of the output.

    Args:
        blocks: I1 and O1, which split the input and the output; I2 and O2 follow from the layer's widths.
        rank: the bond R between the two cores.
        pad: if I1 or O1 does not divide its width, append zeros (cut off outputs) instead of refusing.
    """

    blocks: Sequence[Size]
    rank: Size = 1
    pad: bool = False
    kind: ClassVar[str] = "monarch"

    def __post_init__(self) -> None:
        self.check_list("blocks", "[16, 16]")
        if len(self.blocks) != 2:
            raise DeclarationError(f"blocks must be two, of input and output, e.g. [16, 16], got {self.blocks!r}")
        self.check_size("rank")
        self.check_flag("pad")

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        first_in, first_out, *_ = self.dims()
        into = split_axis(sizes, modes.input, first_in, pad=self.pad, what="blocks[0]")
        out = split_axis(sizes, modes.output, first_out, pad=self.pad, what="blocks[1]")
        sizes.add("r", "R", as_dim(self.rank, "rank"))
        i1, i2 = into.parts
        o1, o2 = out.parts
        factors = {"left": (*modes.experts, i1, i2, o1, "r"), "right": (*modes.experts, i1, o1, "r", o2)}
        return assemble(factors, modes, sizes, prefix=prefix, bias=bias, splits=(into, out))
