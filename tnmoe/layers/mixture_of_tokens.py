"""Mixture of Tokens: experts run on mixtures of a group of tokens (arXiv 2310.15961)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class MixtureOfTokens(Declaration):
    """Groups of `group` successive tokens; D = softmax of x G over the group; y = D · experts(Dᵀ x).

    Maps (..., inputs) to (..., outputs). The number of tokens of a call has to be a multiple of `group`. Coefficients
    are D, each token's share of the mixture that an expert sees, and of that expert's output.
    """

    inputs: Size
    hidden: Size
    outputs: Size
    experts: Size
    group: Size
    bias: bool = True
    input_norm: bool = False
    kind: ClassVar[str] = "mixture_of_tokens"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs", "experts", "group")
        self.check_flags("bias", "input_norm")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "hidden", "outputs", "experts", "group"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("n", "N", self.dim("experts"))
        b.size("h", "H", self.dim("hidden"))
        b.length("u", sympy.floor(b.tokens / b.size("g", "g", self.dim("group"))))
        b.norm(self.input_norm)
        grouped = Value("grouped", ("u", "g", "i"), "gate")
        b.add(Split(grouped, b.x, DYNAMIC, ("u", "g")))
        shares = b.softmax("shares", b.logits(grouped, "n"), "g")
        coefficients = Value("coefficients", (DYNAMIC, "n"), "gate")
        b.diagnostics.append(Merge(coefficients, shares, DYNAMIC, ("u", "g")))
        b.coefficients = (coefficients.name,)
        mixed = b.network(Value("mixed", ("u", "n", "i"), "mix"), shares, grouped)
        v = b.experts("", mixed, "h", Value("expert_outputs", ("u", "n", "o"), "down"), bias=self.bias)
        spread = b.network(Value("spread", ("u", "g", "o"), "combine"), shares, v)
        y = Value("y", (DYNAMIC, "o"), "combine")
        b.add(Merge(y, spread, DYNAMIC, ("u", "g")))
        return b.layer("MixtureOfTokens", y, self, couples_tokens=True)
