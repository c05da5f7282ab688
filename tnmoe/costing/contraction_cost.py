"""What a contraction, a sum or a change of axes costs, forward and backward, and what its backward pass keeps."""

from __future__ import annotations

from collections.abc import Set

from tnmoe.costing.cost import Cost, Inside, Sizes
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    ContractionOp,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    matmul_groups,
)
from tnmoe.ir.dataflow import elements, joint_indices
from tnmoe.ir.ops import operands
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


def forward(op: ContractionOp, sizes: Sizes) -> Cost:
    """Work and result of one op."""
    written = elements(op.out.indices, sizes)
    match op:
        case Contract(_, lhs, rhs):
            macs = elements(joint_indices(lhs, rhs), sizes)
            return Cost(macs=macs, matmul_flops=2 * macs, activations=written)
        case ContractAdd(_, lhs, rhs):
            macs = elements(joint_indices(lhs, rhs), sizes)
            return Cost(macs=macs, matmul_flops=2 * macs, elementwise_flops=written, activations=written)
        case Multiply():
            return Cost(macs=written, elementwise_flops=written, activations=written)
        case Add():
            return Cost(elementwise_flops=written, activations=written)
        case Reduce(_, x):
            return Cost(elementwise_flops=elements(x.indices, sizes), activations=written)
        case Permute():
            return Cost(activations=written)
        case Split() | Merge():  # views, but for zeros appended
            return Cost(activations=written if isinstance(op, Split) and op.padded else 0)
        case _:
            no_rule(op, "its cost")


def backward(op: ContractionOp, sizes: Sizes, requires_grad: Set[str]) -> Cost:
    """Work of the gradients of the operands in `requires_grad`, of which there is one."""
    wanted = [v for v in operands(op) if v.name in requires_grad]
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
        case _:
            no_rule(op, "the work of its gradients")


def broadcast_elements(op: ContractionOp, sizes: Sizes) -> Dim:
    """Elements of the gradient of a matrix that is broadcast, before it is summed over the items; else 0."""
    if not isinstance(op, Contract) or op.out.indices[:1] != op.rhs.indices[:1]:  # planners ask often
        return 0
    outer = matmul_groups(op).outer
    return elements(outer + op.lhs.indices, sizes) if outer else 0


def saved(op: ContractionOp, requires_grad: Set[str]) -> tuple[Value, ...]:
    """Operands and results that the backward of `op` reads; some operand is in `requires_grad`."""
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs) | Multiply(_, lhs, rhs):
            return tuple(v for v, other in ((lhs, rhs), (rhs, lhs)) if other.name in requires_grad)
        case Add() | Reduce() | Permute() | Split() | Merge():
            return ()
        case _:
            no_rule(op, "what its backward pass reads")


def inside(op: ContractionOp) -> Inside:
    """What the backward of `op` keeps besides values of the program."""
    match op:
        case Contract() | ContractAdd() | Multiply() | Add() | Reduce() | Permute() | Split() | Merge():
            return Inside()
        case _:
            no_rule(op, "what its backward pass keeps")
