"""What training keeps and does for each stored weight besides its activations: gradient, master copy, optimizer state.

An optimizer says how many numbers it keeps for a weight and what its step does to them; a precision says how wide each
kind of number is. Both are tables, to be read and extended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import sympy

from tnmoe.costing.traffic import total
from tnmoe.errors import CostError, unknown
from tnmoe.ir.dataflow import elements
from tnmoe.ir.program import Program
from tnmoe.ir.value import Role
from tnmoe.symbolic.dims import Dim


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer's numbers for each trained weight.

    Attributes:
        moments: running averages that it keeps.
        flops: arithmetic of one step, special functions counting 1; counted off torch's update rules.
        block: of 8-bit moments, how many share one float32 scale; None if moments are as wide as the precision says.
        wide_below: tensors of fewer weights keep float32 moments although there is a `block`.
    """

    moments: int
    flops: int
    block: int | None = None
    wide_below: int = 0


OPTIMIZERS = {
    "sgd": Optimizer(moments=0, flops=2),  # w -= lr · g
    "sgd_momentum": Optimizer(moments=1, flops=4),  # v = μ v + g; w -= lr · v
    # m and v: two products and a sum, three products and a sum; √v, over √(1 - β₂ᵗ), + ε, m over it, · lr, w - it
    "adam": Optimizer(moments=2, flops=13),
    "adamw": Optimizer(moments=2, flops=14),  # and w · (1 - lr λ)
    # Dettmers et al. (2022), arXiv 2110.02861; blocks of 256 and float32 below 4,096 weights as in bitsandbytes.
    # Each moment is read through its scale (1), and stored again by the block's maximum (1), a quotient and rounding.
    "adamw_8bit": Optimizer(moments=2, flops=14 + 2 * 4, block=256, wide_below=4096),
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of a weight as the forward pass reads it, of its gradient, of a master copy, and of each moment."""

    weight: int
    gradient: int
    master: int
    moments: tuple[int, int]


PRECISIONS = {
    "fp32": Precision(4, 4, 0, (4, 4)),
    # Everything in one 16-bit type, as torch does for a module of that dtype.
    "bf16": Precision(2, 2, 0, (2, 2)),
    "fp16": Precision(2, 2, 0, (2, 2)),
    # Rajbhandari et al. (2020), arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes a weight under Adam.
    "mixed": Precision(2, 2, 4, (4, 4)),
    # Peng et al. (2023), arXiv 2310.18313, section 2.2: gradient 1, master 2, moments 1 and 2; weights are cast to 1.
    "fp8": Precision(1, 1, 2, (1, 2)),
    # int8 weights for the matrix products, trained through a float32 master copy and 16-bit gradients.
    "int8": Precision(1, 2, 4, (4, 4)),
}


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Bytes that exist for as long as training goes on, and the optimizer's work in one step.

    Integers for a bound program, else sympy expressions.
    """

    weight_bytes: Dim
    gradient_bytes: Dim
    master_bytes: Dim
    state_bytes: Dim
    step_flops: Dim

    @property
    def total_bytes(self) -> Dim:
        """All of them."""
        return self.weight_bytes + self.gradient_bytes + self.master_bytes + self.state_bytes


def training_state(program: Program, optimizer: str = "adamw", precision: str = "mixed") -> TrainingState:
    """What one training step of a program's weights keeps and does; frozen weights are stored and no more.

    Args:
        program: its sizes may be symbols.
        optimizer: one of `OPTIMIZERS`.
        precision: one of `PRECISIONS`.

    Raises:
        CostError: an unknown optimizer or precision.
    """
    if optimizer not in OPTIMIZERS:
        raise CostError(unknown("optimizer", optimizer, OPTIMIZERS))
    if precision not in PRECISIONS:
        raise CostError(unknown("precision", precision, PRECISIONS))
    rule, widths = OPTIMIZERS[optimizer], PRECISIONS[precision]
    stored = total(elements(p.indices, program.sizes) for p in program.parameters)
    trained = [elements(p.indices, program.sizes) for p in program.parameters if p.role is Role.WEIGHT]
    count = total(trained)
    return TrainingState(
        weight_bytes=widths.weight * stored,
        gradient_bytes=widths.gradient * count,
        master_bytes=widths.master * count,
        state_bytes=_state_bytes(rule, widths, trained),
        step_flops=rule.flops * count,
    )


def _state_bytes(rule: Optimizer, widths: Precision, trained: Iterable[Dim]) -> Dim:
    if rule.block is None:
        return sum(widths.moments[: rule.moments]) * total(trained)
    return rule.moments * total(_quantised_bytes(rule.block, rule.wide_below, n) for n in trained)


def _quantised_bytes(block: int, wide_below: int, count: Dim) -> Dim:
    """Bytes of one 8-bit moment of a tensor: a byte each, and a float32 scale a block."""
    if isinstance(count, int):
        return count + 4 * -(-count // block) if count >= wide_below else 4 * count
    wide = count + 4 * sympy.ceiling(count / block)
    return cast(Dim, sympy.Piecewise((wide, count >= wide_below), (4 * count, True)))
