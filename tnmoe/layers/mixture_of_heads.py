"""MoA: every token chooses some of many attention heads, which share keys and values (arXiv 2210.05144)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.pointwise_ops import Softmax
from tnmoe.ir.routing_ops import Gather, ScatterAdd, SortSlots, TopK, Unsort
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class MixtureOfHeads(Declaration):
    """y = Σ_k share_k · softmax_s(x Wq_n · (x_s Wk)) (x_s Wv) Wo_n over the k heads n of the largest logits.

    Maps (..., inputs) to (..., inputs). All tokens of a call are one sequence, in which every token attends to every
    other; shares are a softmax over the chosen logits. Nothing divides by √head_width: that is part of Wq. There is no
    masked form: it would attend with all N queries of every token, N · T² scores for k · T².

    Args:
        experts, active: number of heads N, and k of them for each token.
        head_width: width of queries, keys and values.
    """

    inputs: Size
    experts: Size
    active: Size
    head_width: Size
    kind: ClassVar[str] = "mixture_of_heads"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "experts", "active", "head_width")
        experts, active = self.dim("experts"), self.dim("active")
        if isinstance(active, int) and isinstance(experts, int) and active > experts:
            raise DeclarationError(f"active must be at most experts = {experts}, got {active}")

    def only_lowering(self) -> str:
        """As of every declaration."""
        return "a masked one would attend with the queries of all heads"

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "experts", "active", "head_width"), self.dim("inputs"))
        b.length("o", b.sizes.sizes["i"])
        b.size("n", "N", self.dim("experts"))
        choices = b.size("k", "k", self.dim("active"))
        b.size("d", "d_h", self.dim("head_width"))
        b.length("u", b.tokens)
        for index in ("m", "s"):
            b.length(index, choices * b.tokens)
        sequence = Value("sequence", ("u", "i"), "attention")
        b.add(Split(sequence, b.x, DYNAMIC, ("u",)))
        keys, values = (
            b.linear(f"{name}_", sequence, Value(f"{name}s", ("u", "d"), "attention")) for name in ("key", "value")
        )

        logits = b.logits(b.x, "n")
        top, shares = Value("top_logits", (DYNAMIC, "k"), "gate"), Value("shares", (DYNAMIC, "k"), "gate")
        chosen = Value("chosen", (DYNAMIC, "k"), "gate", True)
        b.add(TopK(top, chosen, logits, "n"), Softmax(shares, top, "k"))
        b.coefficients = (shares.name, chosen.name)
        slots, rows, counts = (
            Value(v, (i,), "dispatch", True) for v, i in (("slots", "s"), ("rows", "m"), ("counts", "n"))
        )
        dispatched = Value("dispatched", ("m", "i"), "dispatch")
        b.add(SortSlots(slots, rows, counts, chosen), Gather(dispatched, b.x, rows, DYNAMIC))
        sorted_queries = b.grouped_experts(
            "query_",
            dispatched,
            counts,
            None,
            Value("sorted_queries", ("m", "d"), "query"),
            bias=False,
            last_bias=False,
        )
        queries = Value("queries", (DYNAMIC, "k", "d"), "attention")
        b.add(Unsort(queries, sorted_queries, slots))

        scores = b.network(Value("scores", (DYNAMIC, "k", "u"), "attention"), queries, keys)
        found = b.network(Value("found", queries.indices, "attention"), b.softmax("attention", scores, "u"), values)
        every = Value("found_slots", ("s", "d"), "output")
        back = Value("sorted_found", ("m", "d"), "output")
        b.add(Merge(every, found, "s", (DYNAMIC, "k")), ScatterAdd(back, every, slots, "m"))
        outputs = b.grouped_experts(
            "output_", back, counts, None, Value("sorted_outputs", ("m", "o"), "output"), bias=False, last_bias=False
        )
        heads = Value("head_outputs", (DYNAMIC, "k", "o"), "combine")
        b.add(Unsort(heads, outputs, slots))
        y = b.network(Value("y", (DYNAMIC, "o"), "combine"), shares, heads)
        return b.layer("MixtureOfHeads", y, self, couples_tokens=True)
