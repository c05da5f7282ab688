"""Which bytes contractions, sums and changes of axes take and give back, forward and backward."""

from __future__ import annotations

from tnmoe.costing.contraction_cost import broadcast_elements
from tnmoe.errors import no_rule
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import AllocationTrace
from tnmoe.ir.aliases import is_view, merges
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
from tnmoe.ir.value import Value


def forward(op: ContractionOp, tensors: TensorBytes) -> AllocationTrace:
    """As `tnmoe.footprint.allocations.forward_trace`."""
    match op:
        case Contract() | ContractAdd() | Multiply() | Add() | Reduce() | Permute():
            return (tensors.of(op.out),)
        case Split() | Merge():
            return () if is_view(op) else (tensors.of(op.out),)
        case _:
            no_rule(op, "what it allocates")


def backward(op: ContractionOp, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    """As `tnmoe.footprint.allocations.backward_traces`."""
    wanted = tensors.wanted(op)
    match op:
        case Contract() | ContractAdd():
            made = [v for v in wanted if not passes_on(op, v, tensors)]
            return (tuple(gradient_bytes(op, v, tensors) for v in made),)
        case Multiply(out):
            # Both products first, then the sums over what was broadcast.
            full = tensors.of(out)
            summed = [v for v in wanted if _is_summed(v, out, tensors)]
            return ((*(full for _ in wanted), *(d for v in summed for d in (tensors.of(v), -full))),)
        case Add():
            return (tuple(tensors.of(v) for v in wanted if not passes_on(op, v, tensors)),)
        case Reduce() | Permute():
            return ((),)
        case Split() | Merge():
            return ((() if passes_on(op, op.x, tensors) else (tensors.of(op.x),)),)
        case _:
            no_rule(op, "what its gradients allocate")


def gradient_bytes(op: ContractionOp, value: Value, tensors: TensorBytes) -> int:
    """Bytes of the gradient of an operand as the op's own node makes it: of a broadcast matrix for each item."""
    items = broadcast_elements(op, tensors.program.sizes) if is_broadcast(op, value) else 0
    return int(tensors.itemsize * items) or tensors.of(value)


def is_broadcast(op: ContractionOp, value: Value) -> bool:
    """Whether an operand is a matrix that a node of its own expands to every item."""
    return isinstance(op, Contract) and value == op.lhs and bool(matmul_groups(op).outer)


def passes_on(op: ContractionOp, value: Value, tensors: TensorBytes) -> bool:
    """True if the gradient of an operand is that of the result, the same bytes."""
    match op:
        case Reduce() | Permute():
            return True
        case Split() | Merge():
            return not op.padded
        case Add():
            return not _is_summed(value, op.out, tensors)
        case ContractAdd(out, _, _, bias):
            # A bias of the columns is one axis short of the product; one of the rows has an axis of 1.
            row = set(bias.indices) == set(matmul_groups(op).cols)
            alike = all(i in bias.indices or tensors.size(i) == 1 for i in out.indices)
            return value == bias and not row and alike
        case Contract() | Multiply():
            return False
        case _:
            no_rule(op, "whether it hands its gradient on")


def gradient_order(op: ContractionOp, value: Value) -> tuple[str, ...]:
    """How torch lays out the gradient of an operand: transposed, where products of batches take it as it was read."""
    if not isinstance(op, Contract | ContractAdd):
        return value.indices
    g = matmul_groups(op)
    if (g.outer and value == op.rhs) or not (g.batch or g.outer):
        return value.indices
    straight = (*g.batch, *g.rows, *g.inner) if value == op.lhs else (*g.batch, *g.inner, *g.cols)
    return straight if set(straight) == set(value.indices) else value.indices


def copies_gradient(op: ContractionOp, order: tuple[str, ...] | None, tensors: TensorBytes) -> bool:
    """Whether the gradient of the result, in that order, has to be copied: a product merges its axes in three."""
    if not isinstance(op, Contract | ContractAdd):
        return False
    g = matmul_groups(op)
    return not merges(order, (g.outer, g.rows, g.cols), tensors.program.sizes)


def _is_summed(value: Value, out: Value, tensors: TensorBytes) -> bool:
    """Whether torch sums the gradient over axes that the value lacks: all in front of its own, else those beyond 1."""
    first = next((k for k, i in enumerate(out.indices) if i in value.indices), len(out.indices))
    return first > 0 or any(i not in value.indices and tensors.size(i) != 1 for i in out.indices)
