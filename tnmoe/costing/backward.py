"""What reverse-mode differentiation of one op costs, and what it keeps: the backward half of the cost model.

Everything is counted for each operand that needs a gradient, never as a multiple of the forward pass: with frozen
weights, or an input that needs no gradient, half of the work may vanish, and with it what has to be saved.
Conventions are those of `tnmoe.costing.op_cost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import cast

from tnmoe.costing import contraction_cost, pointwise_cost, routing_cost
from tnmoe.costing.cost import Cost, Sizes
from tnmoe.costing.op_cost import op_cost
from tnmoe.errors import CostError, no_rule
from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.dataflow import elements
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Gather, RoutingOp
from tnmoe.ir.value import Role
from tnmoe.symbolic.dims import Dim


def gradient_names(program: Program, inputs: Iterable[str]) -> frozenset[str]:
    """Names of all values that need a gradient: trained parameters, those of `inputs`, and what depends on them."""
    leaves = {p.name for p in program.parameters if p.role is Role.WEIGHT}
    return propagate(program.ops, leaves.union(inputs), integers=False)


def gradient_sizes(program: Program, names: Set[str]) -> tuple[Dim, Dim]:
    """What the gradients of some leaves hold after a step: elements, and 64-bit positions.

    The gradient of a table whose rows are gathered with a sparse gradient is the rows that were read, with their
    positions; positions that several tables share are one tensor.
    """
    sizes = program.sizes
    sparse = [op for op in program.ops if isinstance(op, Gather) and op.sparse and op.x.name in names]
    listed = {op.x.name for op in sparse}
    dense = [v.indices for v in program.leaves if v.name in names and v.name not in listed]
    rows = [op.out.indices for op in sparse]
    positions = {op.positions.name: op.positions.indices for op in sparse}.values()
    return (
        sum((elements(indices, sizes) for indices in (*dense, *rows)), start=cast(Dim, 0)),
        sum((elements(indices, sizes) for indices in positions), start=cast(Dim, 0)),
    )


def backward_cost(op: Op, sizes: Sizes, requires_grad: Set[str]) -> Cost:
    """Work of the gradients of the operands of `op` that are in `requires_grad`.

    Raises:
        CostError: if the op has no formula.
    """
    if not any(v.name in requires_grad for v in operands(op)):
        return Cost()
    if isinstance(op, ContractionOp):
        return contraction_cost.backward(op, sizes, requires_grad)
    if isinstance(op, PointwiseOp):
        return pointwise_cost.backward(op, sizes, requires_grad)
    if isinstance(op, RoutingOp):
        return routing_cost.backward(op, sizes, requires_grad)
    if isinstance(op, FusedOp):
        raise CostError(f"{op.out.name!r} is fused, which is in functions with a backward pass of their own alone")
    no_rule(op, "the work of its gradients")


def training_cost(ops: Iterable[Op], sizes: Sizes, requires_grad: Set[str]) -> Cost:
    """Work of forward and backward together; `requires_grad` names the leaves that need a gradient."""
    total, live = Cost(), set(requires_grad)
    for op in ops:
        total += op_cost(op, sizes) + backward_cost(op, sizes, live)
        if any(v.name in live for v in operands(op)):
            live |= {v.name for v in results(op) if not v.integer}
    return total
