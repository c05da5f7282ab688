"""MoEfication: the neurons of an existing FFN in groups, of which only some run (arXiv 2110.01786)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.ir.contractions import Add
from tnmoe.ir.initialise import Uniform
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.routing_ops import TopK
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.dispatch import chosen_experts
from tnmoe.layers.parts import LOWERINGS, Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class MoEfied(Declaration):
    """y = Σ over the `active` groups of the largest score of GELU(x W¹_n + b¹_n) W²_n, plus b²; scores x P, no shares.

    No gradient of y reaches P: train it apart, to predict which groups matter. The figures of training include that.
    Groups are parts of the neurons of one MLP of width `hidden`; with all of them active it is that MLP
    (`tnmoe.weights.moefication.split_ffn` converts its weights). Maps (..., inputs) to (..., outputs).

    Args:
        lowering: as `tnmoe.layers.parts.LOWERINGS` tells; the masked form is the whole MLP, with ones for the chosen
            groups and zeros for the others.
    """

    inputs: Size
    hidden: int
    outputs: Size
    groups: int
    active: Size
    lowering: str = "auto"
    kind: ClassVar[str] = "moefied"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs", "groups", "active")
        if not isinstance(self.hidden, int) or not isinstance(self.groups, int) or self.hidden % self.groups:
            raise DeclarationError(f"groups = {self.groups} must divide hidden = {self.hidden}; both are integers")
        self.check_choice("lowering", LOWERINGS)
        active = self.dim("active")
        if isinstance(active, int) and active > self.groups:
            raise DeclarationError(f"active must be at most groups = {self.groups}, got {active}")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "hidden", "outputs", "groups", "active"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("h", "H_n", self.hidden // self.groups)
        b.size("n", "N", self.groups)
        b.size("k", "k", self.dim("active"))
        scores = b.logits(b.x, "n")
        best = Value("best_scores", (DYNAMIC, "k"), "gate")
        chosen = Value("chosen", (DYNAMIC, "k"), "gate", True)
        b.add(TopK(best, chosen, scores, "n"))
        shifted = Value("summed", (DYNAMIC, "o"), "combine")
        chosen_experts(b, "", b.x, None, chosen, "h", shifted, bias=True, last_bias=False, lowering=self.lowering)
        offset = b.weight("output_bias", ("o",), Uniform(1 / sympy.sqrt(b.sizes.sizes["h"])), "combine")
        y = Value("y", (DYNAMIC, "o"), "combine")
        b.add(Add(y, shifted, Value(offset.name, offset.indices, "combine")))
        return b.layer("MoEfied", y, self)
