"""PEER: retrieval among up to a million rank-one experts by product keys (arXiv 2407.04153)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.ir.initialise import Uniform
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.network import Tensor
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.routing_ops import Gather, ProductTopK
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class PEER(Declaration):
    """y = Σ over heads and over the k best keys of softmax(score) · GELU(x · u_n) v_n.

    Experts are pairs of vectors (u_n, v_n), shared by all heads. Key n is a pair of sub-keys, so that the k best of N
    are found among √N + √N scores, never N. Maps (..., inputs) to (..., outputs). There is no masked form: it would run
    all N experts.

    Args:
        experts: N, the square of an integer.
        active: k, experts for each head and token; at most √N.
        key_width: width of a sub-key; queries are twice as wide.
        sparse_gradients: the gradients of u and v are sparse tensors (for SGD and SparseAdam), so that a training step
            needs no memory for experts that are not met.
    """

    inputs: Size
    outputs: Size
    experts: int
    heads: Size
    active: Size
    key_width: Size
    sparse_gradients: bool = False
    kind: ClassVar[str] = "peer"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts", "heads", "active", "key_width")
        self.check_flags("sparse_gradients")
        if not isinstance(self.experts, int) or math.isqrt(self.experts) ** 2 != self.experts:
            raise DeclarationError(f"experts must be the square of an integer, such as 1048576, got {self.experts!r}")
        active, side = self.dim("active"), math.isqrt(self.experts)
        if isinstance(active, int) and active > side:
            raise DeclarationError(f"active must be at most the root of experts = {side}, got {active}")

    def only_lowering(self) -> str:
        """As of every declaration."""
        return "a masked one would run all experts"

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "heads", "active", "key_width"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("j", "h", self.dim("heads"))
        b.size("k", "k", self.dim("active"))
        b.size("d", "d_k", self.dim("key_width"))
        side = b.size("a", "S", math.isqrt(self.experts))
        b.length("b", side)
        b.length("n", side**2)
        scores = [self._scores(b, index) for index in "ab"]
        best = Value("best_scores", (DYNAMIC, "j", "k"), "gate")
        chosen = Value("chosen", (DYNAMIC, "j", "k"), "gate", True)
        b.add(ProductTopK(best, chosen, *scores))
        shares = b.softmax("shares", best, "k")
        b.coefficients = (shares.name, chosen.name)
        u, v = (self._chosen(b, name, index, chosen) for name, index in (("down", "i"), ("up", "o")))
        hidden = b.network(Value("hidden", chosen.indices, "experts"), b.x, u)
        active = Value("activated", hidden.indices, "experts")
        b.add(Gelu(active, hidden))
        y = b.network(Value("y", (DYNAMIC, "o"), "experts"), shares, active, v)
        return b.layer("PEER", y, self)

    def _scores(self, b: Builder, index: str) -> Value:
        """Products of one half of the queries with one set of sub-keys."""
        project = b.weight(f"query_{index}", ("i", "j", "d"), b.fan_in("i"), "gate")
        query = b.network(Value(f"queries_{index}", (DYNAMIC, "j", "d"), "gate"), b.x, project)
        keys = b.weight(f"keys_{index}", ("j", "d", index), b.fan_in("d"), "gate")
        return b.network(Value(f"scores_{index}", (DYNAMIC, "j", index), "gate"), query, keys)

    def _chosen(self, b: Builder, name: str, index: str, positions: Value) -> Tensor:
        """The chosen vectors of one side of the experts."""
        init = b.fan_in("i") if index == "i" else Uniform(1 / sympy.sqrt(b.sizes.sizes["k"] * b.sizes.sizes["j"]))
        stored = b.weight(f"{name}_vectors", ("n", index), init, "experts")
        chosen = Value(f"{name}_chosen", (*positions.indices, index), "experts")
        b.add(Gather(chosen, Value(stored.name, stored.indices, "experts"), positions, "n", self.sparse_gradients))
        return Tensor(chosen.name, chosen.indices)
