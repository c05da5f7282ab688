"""Deep mixture of experts: two stages of soft mixtures, each with a gate of its own (arXiv 1312.4314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class DeepMoE(Declaration):
    """z = Σ_n a_n(x) GELU(x W¹_n + b¹_n), y = Σ_m c_m(z) (z W²_m + b²_m); the second gate reads the first stage.

    Maps (..., inputs) to (..., outputs); both gates are softmaxes, and all experts run.

    Args:
        experts: number of experts of each stage.
    """

    inputs: Size
    hidden: Size
    outputs: Size
    experts: Size
    bias: bool = True
    kind: ClassVar[str] = "deep_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs", "experts")
        self.check_flags("bias")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "hidden", "outputs", "experts"), self.dim("inputs"))
        b.size("h", "H", self.dim("hidden"))
        b.size("o", "O", self.dim("outputs"))
        b.size("n", "N", self.dim("experts"))
        first = b.softmax("first_shares", b.logits(b.x, "n", "first_"), "n")
        single = Value("first_outputs", (DYNAMIC, "n", "h"), "first")
        b.experts("first_", b.x, None, single, bias=self.bias)
        active = Value("first_activated", single.indices, "first")
        b.add(Gelu(active, single))
        z = b.network(Value("hidden", (DYNAMIC, "h"), "first"), first, active)
        second = b.softmax("second_shares", b.logits(z, "n", "second_"), "n")
        b.coefficients = (first.name, second.name)
        y = Value("y", (DYNAMIC, "o"), "second")
        b.experts("second_", z, None, y, bias=self.bias, mix=second)
        return b.layer("DeepMoE", y, self)
