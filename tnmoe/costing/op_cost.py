"""What one op costs, by the formulas of its family. `estimate` sums it over a program.

Conventions, the same for every figure:

* One MAC is one product in a contraction step, whether or not it is added to a sum.
* FLOPs are in three classes. *matmul*: 2 per MAC of a contraction that sums. *element-wise*: 1 per product of a
  step that sums nothing (Hadamard, outer), 1 per addition. *special*: norms, gates and GELU, every arithmetic
  operation, comparison or special function on one element counting 1.
* `torch.utils.flop_counter` counts the matmul class alone.
* Activation bytes are those of every intermediate that the forward pass writes, the result included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from tnmoe.costing import contraction_cost, pointwise_cost, routing_cost
from tnmoe.costing.cost import Cost, Sizes
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.dataflow import elements
from tnmoe.ir.fused_ops import FusedOp, unfused
from tnmoe.ir.ops import Op
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.symbolic.dims import Dim


def op_cost(op: Op, sizes: Sizes) -> Cost:
    """The cost of one op.

    Raises:
        CostError: if the op has no formula; an unknown op is never free.
    """
    if isinstance(op, ContractionOp):
        return contraction_cost.forward(op, sizes)
    if isinstance(op, PointwiseOp):
        return pointwise_cost.forward(op, sizes)
    if isinstance(op, RoutingOp):
        return routing_cost.forward(op, sizes)
    if isinstance(op, FusedOp):  # the work of what it stands for, of which the last alone is written
        work = sum((op_cost(part, sizes) for part in unfused(op)), start=Cost())
        return replace(work, activations=elements(op.out.indices, sizes))
    no_rule(op, "its cost")


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
