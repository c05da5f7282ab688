"""Tensor train: a chain of cores, each a matrix between two bonds, the first and the last a vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import (
    Declared,
    Factors,
    Modes,
    Sizes,
    check_order,
    mode_names,
    mode_order,
    mode_stems,
)
from tnmoe.factorizations.start import assemble
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class TensorTrain(Declared):
    """W = G¹[m1] · G²[m2] … G^K[mK] (Oseledets, 2011); Σ_j r_{j-1} · mode_j · r_j parameters, with r_0 = r_K = 1.

    Args:
        ranks: the bonds r1 … r_{E+1} between neighbouring cores; E levels of experts need E + 1 ranks.
        order: of the modes along the train, by default experts, input, output: e.g. `("i", "n", "o")`
            (several levels: `"n1"`, `"n2"`, …).
    """

    ranks: Sequence[Size]
    order: Sequence[str] | None = None
    kind: ClassVar[str] = "tensor_train"

    def __post_init__(self) -> None:
        self.check_list("ranks", "[4, 149]")
        object.__setattr__(self, "order", check_order(self.order))

    def check_levels(self, levels: int) -> None:
        """Raise `DeclarationError` if ranks or order do not fit that many levels of experts."""
        self.check_count(self.dims(), [f"r{k + 1}" for k in range(levels + 1)], levels, "a tensor train")
        mode_order(self.order, levels)

    def factors(self, modes: Modes, sizes: Sizes, *, prefix: str, bias: bool) -> Factors:
        """Zero-mean cores, experts around a shared draw, scaled so that the mixed map starts as nn.Linear."""
        levels = len(modes.experts)
        self.check_levels(levels)
        order = mode_order(self.order, levels)
        for k, rank in enumerate(self.dims()):
            sizes.add(f"r{k + 1}", f"r{k + 1}", rank)
        cores: dict[str, tuple[str, ...]] = {}
        for mode, stem in zip(mode_names(levels), mode_stems(levels, "core"), strict=True):
            at = order.index(mode)
            left, right = (f"r{at}",) if at else (), (f"r{at + 1}",) if at < levels + 1 else ()
            cores[stem] = (*left, modes.by_name[mode], *right)
        return assemble(cores, modes, sizes, prefix=prefix, bias=bias)
