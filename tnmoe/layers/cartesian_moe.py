"""CartesianMoE: two stages of routed experts, each blended with a shared one (arXiv 2410.16077)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.ir.contractions import Multiply
from tnmoe.ir.initialise import Ones
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.network import FoldedBias
from tnmoe.ir.pointwise_ops import LayerNorm, Softmax
from tnmoe.ir.routing_ops import Select, TopK
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.dispatch import chosen_experts
from tnmoe.layers.parts import LOWERINGS, Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class CartesianMoE(Declaration):
    """Two stages s(z) = β₀ · shared(z) + β₁ · Σ_k share_k · expert_k(z), β = softmax(z W + b); y = s₂(norm(s₁(x))).

    A pair of experts, one of each stage, acts as one of N² composed ones. Each stage chooses `active` of its `experts`
    by a softmax over the chosen logits; the norm has a weight and no bias. Maps (..., inputs) to (..., inputs).

    Args:
        lowering: of both stages, as `tnmoe.layers.parts.LOWERINGS` tells. The shared experts run in either.
    """

    inputs: Size
    hidden: Size
    experts: Size
    active: Size
    bias: bool = True
    lowering: str = "auto"
    kind: ClassVar[str] = "cartesian_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "experts", "active")
        self.check_flags("bias")
        self.check_choice("lowering", LOWERINGS)
        experts, active = self.dim("experts"), self.dim("active")
        if isinstance(active, int) and isinstance(experts, int) and active > experts:
            raise DeclarationError(f"active must be at most experts = {experts}, got {active}")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "hidden", "experts", "active"), self.dim("inputs"))
        b.length("o", b.sizes.sizes["i"])
        b.size("h", "H", self.dim("hidden"))
        b.size("n", "N", self.dim("experts"))
        b.size("k", "k", self.dim("active"))
        b.size("w", "W", 2)
        first = self._stage(b, "first_", b.x, Value("first", (DYNAMIC, "o"), "first_blend"))
        weight = b.weight("norm_weight", ("o",), Ones(), "norm")
        normed = Value("normed", first.indices, "norm")
        b.add(LayerNorm(normed, first, "o", Value(weight.name, weight.indices, "norm")))
        y = self._stage(b, "second_", normed, Value("y", (DYNAMIC, "i"), "second_blend"))
        return b.layer("CartesianMoE", y, self)

    def _stage(self, b: Builder, prefix: str, x: Value, out: Value) -> Value:
        logits = b.logits(x, "n", prefix)
        top = Value(f"{prefix}top_logits", (DYNAMIC, "k"), logits.part)
        shares = Value(f"{prefix}shares", top.indices, logits.part)
        chosen = Value(f"{prefix}chosen", top.indices, logits.part, True)
        b.add(TopK(top, chosen, logits, "n"), Softmax(shares, top, "k"))
        routed = Value(f"{prefix}routed", out.indices, f"{prefix}combine")
        chosen_experts(b, prefix, x, shares, chosen, "h", routed, bias=self.bias, lowering=self.lowering)
        shared = Value(f"{prefix}shared", out.indices, f"{prefix}shared_down")
        b.feed_forward(f"{prefix}shared_", x, "h", shared, bias=self.bias)

        i, init = x.indices[-1], b.fan_in(x.indices[-1])
        weight = b.weight(f"{prefix}blend_weight", (i, "w"), init, out.part)
        offset = b.weight(f"{prefix}blend_bias", ("w",), init, out.part)
        scores = Value(f"{prefix}blend_logits", (DYNAMIC, "w"), out.part)
        b.network(scores, x, weight, bias=FoldedBias(i, x.name, weight.name, offset))
        blend = b.softmax(f"{prefix}blend", scores, "w")
        terms = []
        for position, value in enumerate((shared, routed)):
            share = Value(f"{prefix}blend_{position}", (DYNAMIC,), out.part)
            term = Value(f"{value.name}_blended", out.indices, out.part)
            b.add(Select(share, blend, "w", position), Multiply(term, share, value))
            terms.append(term)
        return b.sum(out.name, terms[0], terms[1], out.part)
