"""Expert choice: every expert takes the tokens that it scores highest (arXiv 2202.09368)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Factorization
from tnmoe.ir.contractions import Permute
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.routing_ops import Missed, Spread, TopK
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.dispatch import slot_experts
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class ExpertChoice(Declaration):
    """S = softmax(x G) over the experts; expert n runs on its c = ⌈capacity/100 · T/N⌉ largest S[t, n], as weights.

    Maps (..., inputs) to (..., outputs). A token may be taken by several experts or by none, and who takes it depends
    on the other tokens: `diagnostics` counts those that none takes, whose output is zero. The coefficients are the
    weights of all experts, zero for those that do not take the token. Experts as in `SparseMoE`.

    Args:
        capacity: percentage; 100 times the number of experts that a token meets on average.
    """

    inputs: Size
    outputs: Size
    experts: Size
    capacity: int = 200
    hidden: Size | None = None
    bias: bool = True
    input_norm: bool = False
    factorization: Factorization | None = None
    kind: ClassVar[str] = "expert_choice"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts", "capacity", *(["hidden"] if self.hidden is not None else []))
        self.check_flags("bias", "input_norm")
        self.check_factorization()
        if not isinstance(self.capacity, int):
            raise DeclarationError(f"capacity must be a percentage, an integer such as 200, got {self.capacity!r}")
        experts = self.dim("experts")
        if isinstance(experts, int) and self.capacity > 100 * experts:
            raise DeclarationError(f"capacity must be at most 100 · experts = {100 * experts}, got {self.capacity}")

    def only_lowering(self) -> str:
        """As of every declaration."""
        return "its slots are batched products already, and a masked one would run all experts on all tokens"

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "experts", "hidden"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        experts = b.size("n", "N", self.dim("experts"))
        if self.hidden is not None:
            b.size("h", "H", self.dim("hidden"))
        b.length("c", sympy.ceiling(sympy.Rational(self.capacity, 100) * b.tokens / experts))
        scores = b.softmax("scores", b.logits(b.x, "n"), "n")
        held, rows = Value("held", ("n", "c"), "gate"), Value("rows", ("n", "c"), "gate", True)
        columns = Value("columns", ("n", DYNAMIC), "gate")
        b.add(Permute(columns, scores), TopK(held, rows, columns, DYNAMIC))
        spread = Value("coefficients_of_experts", ("n", DYNAMIC), "gate")
        coefficients = Value("coefficients", (DYNAMIC, "n"), "gate")
        b.diagnostics += [
            Spread(spread, held, rows, DYNAMIC),
            Permute(coefficients, spread),
            Missed(Value("dropped", (), "diagnostics", True), rows, DYNAMIC),
        ]
        b.coefficients = (coefficients.name,)
        b.norm(self.input_norm)
        hidden = "h" if self.hidden is not None else None
        y = Value("y", (DYNAMIC, "o"), "combine")
        slot_experts(b, b.x, held, rows, hidden, y, bias=self.bias, factorization=self.factorization)
        return b.layer("ExpertChoice", y, self, couples_tokens=True)
