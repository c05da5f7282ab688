"""What a rule of the cost model returns: work by class, and what a backward pass keeps beside values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tnmoe.symbolic.dims import Dim

Sizes = Mapping[str, Dim]
"""Each index's size: integers, or formulas."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Work and result of one op, or a sum of them. Integers for bound programs, else sympy expressions."""

    macs: Dim = 0
    matmul_flops: Dim = 0
    elementwise_flops: Dim = 0
    special_flops: Dim = 0
    activations: Dim = 0

    @property
    def flops(self) -> Dim:
        """All three classes."""
        return self.matmul_flops + self.elementwise_flops + self.special_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.matmul_flops + other.matmul_flops,
            self.elementwise_flops + other.elementwise_flops,
            self.special_flops + other.special_flops,
            self.activations + other.activations,
        )


@dataclass(frozen=True, slots=True)
class Inside:
    """Numbers that an op keeps and that are no value of the program.

    Attributes:
        what: they are, in words, e.g. "mean and 1/σ of rows".
        elements, integers, flags: how many of the program's dtype, of 64 bits, and of one byte.
    """

    what: str = ""
    elements: Dim = 0
    integers: Dim = 0
    flags: Dim = 0
