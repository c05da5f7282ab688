"""Tucker: one factor for each mode around a core, W = S ×₁ U¹ … ×_E U^E ×_i B ×_o C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import Declared, Factors, Modes, Sizes, mode_names, mode_stems
from tnmoe.factorizations.start import assemble
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class Tucker(Declared):
    """Tucker (1966), the multilinear SVD; ΣN_e r_e + I r_i + O r_o + (Πr_e) r_i r_o parameters.

    Args:
        ranks: of the modes: one for each level of experts, then input, then output.
    """

    ranks: Sequence[Size]
    kind: ClassVar[str] = "tucker"

    def __post_init__(self) -> None:
        self.check_list("ranks", "[8, 64, 64]")

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if the ranks do not fit that many levels of experts."""
        self.check_count(self.dims(), [f"r_{m}" for m in mode_names(levels)], levels, "a Tucker factorization")

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean factors, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        levels = len(modes.experts)
        self.check_levels(levels)
        made: dict[str, tuple[str, ...]] = {}
        bonds = tuple(f"r_{mode}" for mode in mode_names(levels))
        for bond, rank, stem, mode in zip(
            bonds, self.dims(), mode_stems(levels, "factor"), modes.by_name.values(), strict=True
        ):
            sizes.add(bond, bond, rank)
            made[stem] = (mode, bond)
        output = made.popitem()
        made |= {"core": bonds} | dict([output])
        return assemble(made, modes, sizes, prefix=prefix, bias=bias)
