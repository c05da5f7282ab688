"""What one op costs. `estimate` sums it over a program; only `tnmoe.costing.backward`, its other half, has formulas
too.

Conventions, the same for every figure:

* One MAC is one product in a contraction step, whether or not it is added to a sum.
* FLOPs are in three classes. *matmul*: 2 per MAC of a contraction that sums. *element-wise*: 1 per product of a
  step that sums nothing (Hadamard, outer), 1 per addition. *special*: norms, gates and GELU, every arithmetic
  operation, comparison or special function on one element counting 1.
* `torch.utils.flop_counter` counts the matmul class alone.
* Activation bytes are those of every intermediate that the forward pass writes, the result included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from tnmoe.costing import routing_cost
from tnmoe.errors import CostError
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Merge, Multiply, Permute, Reduce, Split
from tnmoe.ir.dataflow import elements, is_view, joint_indices
from tnmoe.ir.fused_ops import FusedOp, unfused
from tnmoe.ir.ops import Op, results
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.symbolic.dims import Dim, ceil_log2

GELU_BACKWARD = 11
"""FLOPs for each element: Φ in four, the density in four, product with x, sum, product with the gradient."""


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


def op_cost(op: Op, sizes: Mapping[str, Dim]) -> Cost:
    """The cost of one op.

    Raises:
        CostError: if the op has no formula; an unknown op is never free.
    """
    written = sum((elements(v.indices, sizes) for v in results(op)), start=cast(Dim, 0))
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
            macs = elements(joint_indices(lhs, rhs), sizes)
            added = written if isinstance(op, ContractAdd) else 0
            return Cost(macs=macs, matmul_flops=2 * macs, elementwise_flops=added, activations=written)
        case Multiply():
            return Cost(macs=written, elementwise_flops=written, activations=written)
        case Add():
            return Cost(elementwise_flops=written, activations=written)
        case Reduce(_, x):
            return Cost(elementwise_flops=elements(x.indices, sizes), activations=written)
        case Permute():
            return Cost(activations=written)
        case Split() | Merge():  # views, but for zeros appended
            return Cost(activations=0 if is_view(op) else written)
        case _ if isinstance(op, FusedOp):  # the work of what it stands for, of which it writes the last result alone
            work = sum((op_cost(part, sizes) for part in unfused(op)), start=Cost())
            return replace(work, activations=written)
        case _ if isinstance(op, RoutingOp):
            macs, elementwise, special = routing_cost.forward(op, sizes)
            return Cost(macs, 2 * macs, elementwise, special, 0 if is_view(op) else written)
        case _:
            return Cost(special_flops=_special(op, sizes), activations=written)


def _special(op: Op, sizes: Mapping[str, Dim]) -> Dim:
    """FLOPs of an op that is not multilinear, counted off its definition in `backends/numpy/execute.py`.

    The threshold of a sparse gate is searched as the emitted module does it for all but small batches, which it sorts,
    in as many steps as it takes for types of up to 32 bits.
    """
    match op:
        case Softmax(_, x):  # maximum, difference, exponential, sum, quotient
            return 5 * elements(x.indices, sizes)
        case Entmax15(_, x, index):
            # maximum, difference, half, clamp; a step: difference, clamp, square, sum, sum; difference, clamp, square
            return elements(x.indices, sizes) * (7 + 5 * entmax15_steps(ceil_log2(sizes[index])))
        case Sparsemax(_, x, index):
            # maximum, difference, clamp; a step: difference, clamp, sum, sign, sum; difference, clamp
            return elements(x.indices, sizes) * (5 + 5 * sparsemax_steps(ceil_log2(sizes[index])))
        case Sigmoid(_, x):  # minus, exponential, 1 +, reciprocal
            return 4 * elements(x.indices, sizes)
        case Gelu(_, x):  # over √2, erf, 1 +, half, times x
            return 5 * elements(x.indices, sizes)
        case GeluBackward(_, _, x):
            return GELU_BACKWARD * elements(x.indices, sizes)
        case LayerNorm(_, x, _, weight, bias):  # sum, difference, square, sum, times 1/σ
            affine = (weight is not None) + (bias is not None)
            return (5 + affine) * elements(x.indices, sizes)
        case BatchNorm(_, x):  # as LayerNorm, in training
            return 5 * elements(x.indices, sizes)
        case _:
            raise CostError(f"op {type(op).__name__} has no cost formula; add one to tnmoe/costing/op_cost.py")


def entmax15_steps(digits: Dim) -> Dim:
    """Steps to the threshold of ⌈log2 of the experts⌉ `digits`, for types of up to 32 bits, as emitted."""
    return cast(Dim, 3 + digits // 2)


def sparsemax_steps(digits: Dim) -> Dim:
    """As `entmax15_steps`."""
    return cast(Dim, 3 + digits - digits // 4)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a program.

    Attributes:
        parameters: stored trained and frozen weights, without buffers.
        buffers: stored numbers that are no parameters, e.g. running statistics.
        per_op: cost of each op, in order.
        total: their sum.
    """

    parameters: Dim
    buffers: Dim
    per_op: tuple[Cost, ...]
    total: Cost


def estimate(program: Program) -> Estimate:
    """The cost of a program: formulas if its sizes are symbolic, integers if it is bound."""
    per_op = tuple(op_cost(op, program.sizes) for op in program.ops)

    def stored(group: str) -> Dim:
        return sum((elements(p.indices, program.sizes) for p in getattr(program, group)), start=cast(Dim, 0))

    return Estimate(stored("parameters"), stored("buffers"), per_op, sum(per_op, start=Cost()))
