"""Soft MoE: slots are mixtures of all tokens, outputs mixtures of all slots (arXiv 2308.00951)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import Factorization
from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class SoftMoE(Declaration):
    """L = x Φ; D = softmax of L over the tokens, C over all slots; y = C · experts(Dᵀ x), each expert on its own slots.

    Maps (..., inputs) to (..., outputs). All tokens of a call are mixed, so a call should hold one sequence. The
    coefficients are C, the shares of an expert's slots side by side.
    """

    inputs: Size
    outputs: Size
    experts: Size
    slots: Size
    hidden: Size | None = None
    bias: bool = True
    input_norm: bool = False
    factorization: Factorization | None = None
    kind: ClassVar[str] = "soft_moe"

    def __post_init__(self) -> None:
        optional = ["hidden"] if self.hidden is not None else []
        self.check_sizes("inputs", "outputs", "experts", "slots", *optional)
        self.check_flags("bias", "input_norm")
        self.check_factorization()

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "experts", "slots", "hidden"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.length("p", b.size("n", "N", self.dim("experts")) * b.size("s", "s", self.dim("slots")))
        if self.hidden is not None:
            b.size("h", "H", self.dim("hidden"))
        b.norm(self.input_norm)
        logits = b.logits(b.x, "p")
        dispatch = b.softmax("dispatch", logits, DYNAMIC)
        combine = b.softmax("combine", logits, "p")
        b.coefficients = (combine.name,)
        slots = b.network(Value("slots", ("p", "i"), "slots"), dispatch, b.x)
        u = Value("dispatched", ("n", "s", "i"), "slots")
        b.add(Split(u, slots, "p", ("n", "s")))
        hidden = "h" if self.hidden is not None else None
        v = Value("expert_outputs", ("n", "s", "o"), "down" if hidden else "experts")
        b.experts("", u, hidden, v, bias=self.bias, factorization=self.factorization)
        merged = Value("slot_outputs", ("p", "o"), "mix")
        b.add(Merge(merged, v, "p", ("n", "s")))
        y = b.network(Value("y", (DYNAMIC, "o"), "mix"), combine, merged)
        return b.layer("SoftMoE", y, self, couples_tokens=True)
