"""Which bytes one op takes and gives back while it runs, forward and backward, as torch's tracker sees them.

The traces follow the statements that are emitted, family by family. What a kernel allocates inside itself (packed
matrices of a BLAS, buckets of a sort) is no tensor, is invisible to torch's own tracker, and is not counted: see
`SCRATCH`.
"""

from __future__ import annotations

from tnmoe.errors import CostError, no_rule
from tnmoe.footprint import contraction_allocations, pointwise_allocations, routing_allocations
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import AllocationTrace
from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Value

SCRATCH = (
    "Left out: what kernels allocate inside themselves, which is no tensor (packed operands of a matrix product, "
    "buffers of a sort or a reduction)."
)


def forward_trace(op: Op, tensors: TensorBytes, *, evaluation: bool) -> AllocationTrace:
    """What the forward of `op` allocates and frees; what stays is its results, and what it keeps for a backward pass.

    Args:
        op: of the program of `tensors`.
        tensors: bytes of its values, and which of them need a gradient.
        evaluation: the module's mode, in which batch norm uses its running statistics.
    """
    if isinstance(op, ContractionOp):
        return contraction_allocations.forward(op, tensors)
    if isinstance(op, PointwiseOp):
        return pointwise_allocations.forward(op, tensors, evaluation=evaluation)
    if isinstance(op, RoutingOp):
        return routing_allocations.forward(op, tensors, evaluation=evaluation)
    if isinstance(op, FusedOp):  # by its kernel; on tensors that this does not take, as what it stands for
        return (tensors.of(op.out),)
    no_rule(op, "what it allocates")


def backward_traces(op: Op, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    """What the backward of `op` allocates and frees.

    One trace for each node of torch's graph (or for some nodes in a row); after each the gradient that came in is
    given back, and after the first one the values that were saved (see `reads_to_the_end`). What stays of the last one
    are the gradients of the operands that need one, but for those that are the incoming gradient itself: see
    `passes_on`.
    """
    if isinstance(op, ContractionOp):
        return contraction_allocations.backward(op, tensors)
    if isinstance(op, PointwiseOp):
        return pointwise_allocations.backward(op, tensors)
    if isinstance(op, RoutingOp):
        return routing_allocations.backward(op, tensors)
    if isinstance(op, FusedOp):
        raise CostError(f"{op.out.name!r} is fused, which is in functions with a backward pass of their own alone")
    no_rule(op, "what its gradients allocate")


def gradient_bytes(op: Op, value: Value, tensors: TensorBytes) -> int:
    """Bytes of the gradient of an operand as the op's own node makes it."""
    return (
        contraction_allocations.gradient_bytes(op, value, tensors)
        if isinstance(op, ContractionOp)
        else tensors.of(value)
    )


def passes_on(op: Op, value: Value, tensors: TensorBytes) -> bool:
    """True if the gradient of an operand is that of the result, the same bytes."""
    if isinstance(op, ContractionOp):
        return contraction_allocations.passes_on(op, value, tensors)
    return isinstance(op, RoutingOp) and routing_allocations.passes_on(op, value)


def gradient_order(op: Op, value: Value) -> tuple[str, ...]:
    """The axes of an operand's gradient in the order in which torch lays them out."""
    if isinstance(op, ContractionOp):
        return contraction_allocations.gradient_order(op, value)
    return routing_allocations.gradient_order(op, value) if isinstance(op, RoutingOp) else value.indices


def copies_gradient(op: Op, order: tuple[str, ...] | None, tensors: TensorBytes) -> bool:
    """Whether the gradient of the result is copied if its axes lie in that order (None: with gaps)."""
    if isinstance(op, ContractionOp):
        return contraction_allocations.copies_gradient(op, order, tensors)
    return isinstance(op, RoutingOp) and routing_allocations.copies_gradient(op, tensors)


def reads_to_the_end(op: Op) -> bool:
    """Whether the backward of an op holds what was saved for it until its last node, not its first one."""
    return isinstance(op, RoutingOp) and routing_allocations.reads_to_the_end(op)


def is_sparse(op: Op) -> bool:
    """Whether the gradient of what an op reads is a list of rows with their positions."""
    return isinstance(op, RoutingOp) and routing_allocations.is_sparse(op)
