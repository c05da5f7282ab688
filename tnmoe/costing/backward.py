"""What reverse-mode differentiation of one op costs, and what it keeps: the backward half of the cost model.

Everything is counted for each operand that needs a gradient, never as a multiple of the forward pass: with frozen
weights, or an input that needs no gradient, half of the work may vanish, and with it what has to be saved.
Conventions are those of `tnmoe.costing.op_cost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from tnmoe.costing import routing_cost
from tnmoe.costing.op_cost import GELU_BACKWARD, Cost, op_cost
from tnmoe.errors import CostError
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Merge, Multiply, Permute, Reduce, Split, matmul_groups
from tnmoe.ir.dataflow import elements, joint_indices
from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Role
from tnmoe.symbolic.dims import Dim


def gradient_names(program: Program, inputs: Iterable[str]) -> frozenset[str]:
    """Names of all values that need a gradient: trained parameters, those of `inputs`, and what depends on them."""
    leaves = {p.name for p in program.parameters if p.role is Role.WEIGHT}
    return propagate(program.ops, leaves.union(inputs), integers=False)


def backward_cost(op: Op, sizes: Mapping[str, Dim], needing: Set[str]) -> Cost:
    """Work of the gradients of the operands of `op` that are in `needing`.

    Raises:
        CostError: if the op has no formula.
    """
    wanted = [v for v in operands(op) if v.name in needing]
    if not wanted:
        return Cost()
    written = elements(op.out.indices, sizes)
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
            # The gradient of either factor is a matrix product of the same extent; that of a bias sums over rows.
            products = sum(v in (lhs, rhs) for v in wanted)
            macs = products * elements(joint_indices(lhs, rhs), sizes)
            sums = written * sum(len(v.indices) < len(op.out.indices) for v in wanted if v not in (lhs, rhs))
            if lhs in wanted:
                sums += broadcast_elements(op, sizes)
            return Cost(macs=macs, matmul_flops=2 * macs, elementwise_flops=sums)
        case Multiply():  # one product an element, then a sum over what was broadcast
            sums = sum(len(v.indices) < len(op.out.indices) for v in wanted)
            return Cost(macs=len(wanted) * written, elementwise_flops=(len(wanted) + sums) * written)
        case Add():
            return Cost(elementwise_flops=sum(len(v.indices) < len(op.out.indices) for v in wanted) * written)
        case Reduce() | Permute() | Split() | Merge():  # a broadcast, a copy, a view
            return Cost()
        case _ if isinstance(op, RoutingOp):
            macs, elementwise, special = routing_cost.backward(op, sizes, needing)
            return Cost(macs, 2 * macs, elementwise, special)
        case _:
            return Cost(special_flops=_special_per_element(op, needing) * written)


def broadcast_elements(op: Op, sizes: Mapping[str, Dim]) -> Dim:
    """Elements of the gradient of a matrix that is broadcast, before it is summed over the items; else 0."""
    if not isinstance(op, Contract) or op.out.indices[:1] != op.rhs.indices[:1]:  # planners ask often
        return 0
    outer = matmul_groups(op).outer
    return elements(outer + op.lhs.indices, sizes) if outer else 0


def _special_per_element(op: Op, needing: Set[str]) -> int:
    """FLOPs for each element of the result, counted off what torch's (or the emitted) backward does."""
    match op:
        case Softmax():  # product with y, sum, difference, product
            return 4
        case Sigmoid():  # 1 - y, two products
            return 3
        case Entmax15():  # the square's two products; mask, two sums, product, difference, half
            return 8
        case Sparsemax():  # mask, sum, product, difference
            return 4
        case Gelu():
            return GELU_BACKWARD
        case LayerNorm(_, x, _, weight, bias):
            normal = 10 if x.name in needing else 0  # x̂ in two, product, two sums with a product, four to combine
            affine = 2 * (weight is not None and weight.name in needing) + (bias is not None and bias.name in needing)
            return normal + affine
        case BatchNorm():
            return 10
    raise CostError(f"op {type(op).__name__} has no backward formula; add one to tnmoe/costing/backward.py")


def training_cost(ops: Iterable[Op], sizes: Mapping[str, Dim], needing: Set[str]) -> Cost:
    """Work of forward and backward together; `needing` names the leaves that need a gradient."""
    total, live = Cost(), set(needing)
    for op in ops:
        total += op_cost(op, sizes) + backward_cost(op, sizes, live)
        if any(v.name in live for v in operands(op)):
            live |= {v.name for v in results(op) if not v.integer}
    return total
