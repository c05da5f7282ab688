"""Block term decomposition: a sum of Tucker factorizations of the same ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes, mode_names, mode_stems
from tnmoe.factorizations.start import assemble
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class BlockTerm(Declared):
    """Block terms (De Lathauwer, 2008); P times the parameters of one Tucker block.

    Args:
        blocks: the number of terms P.
        ranks: of each term's modes: one for each level of experts, then input, then output.
    """

    blocks: Size
    ranks: Sequence[Size]
    kind: ClassVar[str] = "block_term"

    def __post_init__(self) -> None:
        self.check_size("blocks")
        self.check_list("ranks", "[8, 64, 64]")

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the ranks do not fit that many levels of experts."""
        self.check_count(self.dims()[1:], [f"r_{m}" for m in mode_names(levels)], levels, "a block term")

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        levels = len(modes.experts)
        self.check_levels(levels)
        blocks, *ranks = self.dims()
        sizes.add("p", "P", blocks)
        made: dict[str, tuple[str, ...]] = {}
        bonds = tuple(f"r_{mode}" for mode in mode_names(levels))
        for bond, rank, stem, mode in zip(
            bonds, ranks, mode_stems(levels, "factor"), modes.by_name.values(), strict=True
        ):
            sizes.add(bond, bond, rank)
            made[stem] = ("p", mode, bond)
        output = made.popitem()
        made |= {"core": ("p", *bonds)} | dict([output])
        return assemble(made, modes, sizes, prefix=prefix, bias=bias)
