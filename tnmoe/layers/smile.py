"""SMILE: bi-level routing, first over nodes, then over the experts of a node (arXiv 2212.05191)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.ir.contractions import Merge, Multiply
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.routing_ops import PairPositions, TopK
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.dispatch import chosen_experts
from tnmoe.layers.parts import LOWERINGS, Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class SMILE(Declaration):
    """Expert n = (p, q) with share g¹_p g²_q, both softmaxes over their level; the largest of either level are chosen.

    Two gates of P and Q columns stand for one of P · Q. Experts are MLPs with a GELU; none is dropped. Maps
    (..., inputs) to (..., outputs).

    Args:
        nodes, experts: P, and Q experts in each node.
        active_nodes, active: how many of either level are chosen; their product runs.
        lowering: as `tnmoe.layers.parts.LOWERINGS` tells.
    """

    inputs: Size
    hidden: Size
    outputs: Size
    nodes: Size
    experts: Size
    active_nodes: Size = 1
    active: Size = 1
    bias: bool = True
    lowering: str = "auto"
    kind: ClassVar[str] = "smile"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs", "nodes", "experts", "active_nodes", "active")
        self.check_flags("bias")
        self.check_choice("lowering", LOWERINGS)
        for key, whole in (("active_nodes", "nodes"), ("active", "experts")):
            part, total = self.dim(key), self.dim(whole)
            if isinstance(part, int) and isinstance(total, int) and part > total:
                raise DeclarationError(f"{key} must be at most {whole} = {total}, got {part}")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        keys = ("inputs", "hidden", "outputs", "nodes", "experts", "active_nodes", "active")
        b = Builder(self.dims(*keys), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("h", "H", self.dim("hidden"))
        b.length("n", b.size("p", "P", self.dim("nodes")) * b.size("q", "Q", self.dim("experts")))
        b.length("k", b.size("c", "k_1", self.dim("active_nodes")) * b.size("d", "k_2", self.dim("active")))
        (first, nodes), (second, inner) = (
            self._level(b, name, index, slot) for name, index, slot in (("node_", "p", "c"), ("inner_", "q", "d"))
        )
        product = Value("share_products", (DYNAMIC, "c", "d"), "gate")
        pairs = Value("pairs", product.indices, "gate", True)
        shares = Value("shares", (DYNAMIC, "k"), "gate")
        chosen = Value("chosen", (DYNAMIC, "k"), "gate", True)
        b.add(Multiply(product, first, second), PairPositions(pairs, nodes, inner, "q"))
        b.add(Merge(shares, product, "k", ("c", "d")), Merge(chosen, pairs, "k", ("c", "d")))
        out = Value("y", (DYNAMIC, "o"), "combine")
        y = chosen_experts(b, "", b.x, shares, chosen, "h", out, bias=self.bias, lowering=self.lowering)
        return b.layer("SMILE", y, self)

    def _level(self, b: Builder, prefix: str, index: str, slot: str) -> tuple[Value, Value]:
        """Shares and positions of the chosen entries of one level."""
        scores = b.softmax(f"{prefix}scores", b.logits(b.x, index, prefix), index)
        best = Value(f"{prefix}shares", (DYNAMIC, slot), scores.part)
        chosen = Value(f"{prefix}chosen", best.indices, scores.part, True)
        b.add(TopK(best, chosen, scores, index))
        return best, chosen
