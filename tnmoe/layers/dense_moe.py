"""The classic soft mixture to compare with: every expert is a two-layer MLP with full matrices, and all of them run."""

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
class DenseMoE(Declaration):
    """Soft mixture of MLP experts, all of them run: y = Σ_n softmax(x G)_n · (GELU(x W¹_n + b¹_n) W²_n + b²_n).

    Maps (..., inputs) to (..., outputs). `factorization` is that of W¹ and W²; None for full matrices.
    """

    inputs: Size
    hidden: Size
    outputs: Size
    experts: Size
    bias: bool = True
    input_norm: bool = False
    factorization: Factorization | None = None
    kind: ClassVar[str] = "dense_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs", "experts")
        self.check_flags("bias", "input_norm")
        self.check_factorization()

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        dims = [self.dim(k) for k in ("inputs", "hidden", "outputs", "experts")]
        b = Builder([*dims, *(self.factorization.dims() if self.factorization else ())], dims[0])
        for index, dim in zip("hon", dims[1:], strict=True):
            b.size(index, index.upper(), dim)
        shares = b.softmax("coefficients", b.logits(b.x, "n"), "n")
        b.coefficients = (shares.name,)
        b.norm(self.input_norm)
        y = Value("y", (DYNAMIC, "o"), "down")
        b.experts("", b.x, "h", y, bias=self.bias, factorization=self.factorization, mix=shares)
        return b.layer("DenseMoE", y, self)
