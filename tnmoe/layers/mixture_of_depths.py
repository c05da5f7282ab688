"""Mixture of Depths: only the highest scored tokens run through a block (arXiv 2404.02258)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.routing_ops import Gather, Missed, ScatterAdd, TopK
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class MixtureOfDepths(Declaration):
    """y = x + r · MLP(x) for the ⌈capacity/100 · T⌉ tokens of the largest score r = x · w, y = x for all others.

    Maps (..., inputs) to (..., inputs). All tokens of a call compete; `diagnostics` counts those that skip the block.

    Args:
        capacity: percentage of the tokens that run, from 1 to 100; 12.5 is the paper's best.
    """

    inputs: Size
    hidden: Size
    capacity: float = 12.5
    bias: bool = True
    kind: ClassVar[str] = "mixture_of_depths"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden")
        self.check_flags("bias")
        if type(self.capacity) not in (int, float) or not 1 <= self.capacity <= 100:
            raise DeclarationError(f"capacity must be a percentage from 1 to 100, got {self.capacity!r}")

    def only_lowering(self) -> str:
        """As of every declaration."""
        return "a masked one would run the block on all tokens"

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "hidden"), self.dim("inputs"))
        b.size("h", "H", self.dim("hidden"))
        b.length("c", sympy.ceiling(sympy.Rational(str(self.capacity)) / 100 * b.tokens))
        weight = b.weight("router_weight", ("i",), b.fan_in("i"), "gate")
        scores = b.network(Value("scores", (DYNAMIC,), "gate"), b.x, weight)
        chosen, rows = Value("chosen_scores", ("c",), "gate"), Value("rows", ("c",), "gate", True)
        b.add(TopK(chosen, rows, scores, DYNAMIC))
        b.diagnostics.append(Missed(Value("skipped", (), "diagnostics", True), rows, DYNAMIC))
        u = Value("dispatched", ("c", "i"), "dispatch")
        b.add(Gather(u, b.x, rows, DYNAMIC))
        v = b.feed_forward("", u, "h", Value("block_outputs", ("c", "i"), "down"), bias=self.bias, ranked=True)
        weighted = b.network(Value("weighted", ("c", "i"), "combine"), chosen, v)
        added = Value("added", (DYNAMIC, "i"), "combine")
        b.add(ScatterAdd(added, weighted, rows, DYNAMIC))
        y = b.sum("y", b.x, added, "combine")
        return b.layer("MixtureOfDepths", y, self, couples_tokens=True)
