"""Residual mixture: every expert is one shared matrix plus a difference of its own, W_n = W₀ + ΔW_n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.factorizations.base import Factorization
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class ResidualMoE(Declaration):
    """y = x W₀ + b + Σ_n softmax(x G)_n · x ΔW_n: shares sum to one, so that W₀ needs none. ΔW of any factorization.

    Maps (..., inputs) to (..., outputs).
    """

    inputs: Size
    outputs: Size
    experts: Size
    factorization: Factorization | None = None
    bias: bool = True
    kind: ClassVar[str] = "residual_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts")
        self.check_flags("bias")
        self.check_factorization()

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "experts"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("n", "N", self.dim("experts"))
        shares = b.softmax("coefficients", b.logits(b.x, "n"), "n")
        b.coefficients = (shares.name,)
        base = b.linear("base_", b.x, Value("base", (DYNAMIC, "o"), "base"), bias=self.bias)
        own = Value("differences", (DYNAMIC, "o"), "experts")
        b.experts("", b.x, None, own, bias=False, factorization=self.factorization, mix=shares)
        y = b.sum("y", base, own, "experts")
        return b.layer("ResidualMoE", y, self)
