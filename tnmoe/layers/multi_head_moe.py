"""Multi-head MoE: tokens are split into sub-tokens, which are routed one by one (arXiv 2404.15045)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.pointwise_ops import Softmax
from tnmoe.ir.routing_ops import LoadBalance, TopK, ZLoss
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.dispatch import chosen_experts
from tnmoe.layers.parts import LOWERINGS, Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class MultiHeadMoE(Declaration):
    """x W_head + b, split into `heads` sub-tokens of width inputs/heads; top-k experts for each; merged, · W_merge + b.

    Maps (..., inputs) to (..., inputs). Experts are MLPs of width `hidden` on sub-tokens; shares are a softmax over
    the chosen logits. None is dropped.

    Args:
        lowering: as `tnmoe.layers.parts.LOWERINGS` tells.
    """

    inputs: int
    hidden: Size
    experts: Size
    active: Size
    heads: int
    bias: bool = True
    lowering: str = "auto"
    kind: ClassVar[str] = "multi_head_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "experts", "active", "heads")
        self.check_flags("bias")
        self.check_choice("lowering", LOWERINGS)
        if not isinstance(self.inputs, int) or not isinstance(self.heads, int) or self.inputs % self.heads:
            raise DeclarationError(f"heads = {self.heads} must divide inputs = {self.inputs}; both are integers")
        experts, active = self.dim("experts"), self.dim("active")
        if isinstance(active, int) and isinstance(experts, int) and active > experts:
            raise DeclarationError(f"active must be at most experts = {experts}, got {active}")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "hidden", "experts", "active", "heads"), self.dim("inputs"))
        b.size("n", "N", self.dim("experts"))
        b.size("k", "k", self.dim("active"))
        b.size("h", "H", self.dim("hidden"))
        heads = b.size("a", "h", self.dim("heads"))
        width = b.size("d", "D", self.inputs // self.heads)
        for index in "jlo":  # what the head layer gives, what the merge layer takes and gives
            b.length(index, heads * width)
        b.length("e", width)
        b.length("q", b.tokens * heads)
        projected = b.linear("head_", b.x, Value("projected", (DYNAMIC, "j"), "head"), bias=True)
        split = Value("split", (DYNAMIC, "a", "d"), "head")
        sub = Value("sub_tokens", ("q", "d"), "head")
        b.add(Split(split, projected, "j", ("a", "d")), Merge(sub, split, "q", (DYNAMIC, "a")))

        logits = b.logits(sub, "n")
        top, shares = Value("top_logits", ("q", "k"), "gate"), Value("shares", ("q", "k"), "gate")
        chosen = Value("chosen", ("q", "k"), "gate", True)
        b.add(TopK(top, chosen, logits, "n"), Softmax(shares, top, "k"))
        probabilities = Value("probabilities", logits.indices, "gate")
        balance = LoadBalance(Value("load_balance_loss", (), "diagnostics"), probabilities, chosen)
        b.diagnostics += [
            Softmax(probabilities, logits, "n"),
            balance,
            ZLoss(Value("z_loss", (), "diagnostics"), logits),
        ]
        mixed = Value("mixed", ("q", "e"), "combine")
        chosen_experts(b, "", sub, shares, chosen, "h", mixed, bias=self.bias, lowering=self.lowering)
        b.coefficients_of_tokens("q", (DYNAMIC, "a"))

        back = Value("split_outputs", (DYNAMIC, "a", "e"), "merge")
        whole = Value("merged", (DYNAMIC, "l"), "merge")
        b.add(Split(back, mixed, "q", (DYNAMIC, "a")), Merge(whole, back, "l", ("a", "e")))
        y = b.linear("merge_", whole, Value("y", (DYNAMIC, "o"), "merge"), bias=True)
        return b.layer("MultiHeadMoE", y, self)
