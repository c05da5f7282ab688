"""Which bytes gates, GELU and norms take and give back; those of the gates statement by statement of the emitted code.

The traces of the gates follow `backends/runtime/activations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tnmoe.costing.pointwise_cost import entmax15_steps, sparsemax_steps
from tnmoe.errors import CostError, no_rule
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import AllocationTrace
from tnmoe.ir.pointwise_ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    GeluBackward,
    LayerNorm,
    PointwiseOp,
    Sigmoid,
    Softmax,
    Sparsemax,
)
from tnmoe.ir.value import INTEGER_BYTES


def forward(op: PointwiseOp, tensors: TensorBytes, *, evaluation: bool) -> AllocationTrace:
    """As `tnmoe.footprint.allocations.forward_trace`."""
    out, kept = tensors.of(op.out), bool(tensors.wanted(op))
    match op:
        case Entmax15(_, x, index):
            root = _entmax15(tensors.entries(x.indices), tensors.size(index), tensors.itemsize)
            return (*root, out) if kept else (*root, out, -out)
        case Sparsemax(_, x, index):
            return _sparsemax(tensors.entries(x.indices), tensors.size(index), tensors.itemsize)
        case LayerNorm() | BatchNorm():
            own_statistics = isinstance(op, LayerNorm) or not evaluation
            statistics = replace(tensors, requires_grad={op.x.name}).kept_inside(op) if own_statistics else 0
            return (out + statistics,) if kept else (out + statistics, -statistics)
        case Softmax() | Sigmoid() | Gelu() | GeluBackward():
            return (out,)
        case _:
            no_rule(op, "what it allocates")


def backward(op: PointwiseOp, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    """As `tnmoe.footprint.allocations.backward_traces`."""
    match op:
        case Softmax(out) | Sigmoid(out) | Gelu(out):
            return ((tensors.of(out),),)
        case LayerNorm() | BatchNorm():
            return ((sum(map(tensors.of, tensors.wanted(op))),),)
        case Entmax15(out, _, index):
            full, rows, count = (
                tensors.of(out),
                tensors.itemsize * tensors.lines(out, index),
                tensors.entries(out.indices),
            )
            square = (full, full, full, -2 * full)
            # mask, product; two sums, their quotient; product, difference, half
            root = (count, full, -count, rows, rows, rows, -2 * rows, full, full, -full, full, -2 * full - rows)
            return square, root
        case Sparsemax(out, _, index):
            full, rows, count = (
                tensors.of(out),
                tensors.itemsize * tensors.lines(out, index),
                tensors.entries(out.indices),
            )
            counts = INTEGER_BYTES * tensors.lines(out, index)
            return ((count, full, rows, counts, rows, -rows - counts, full, -rows, full, -2 * full - count),)
        case GeluBackward():
            raise CostError(f"{op.out.name!r} is of a backward pass, which nobody differentiates")
        case _:
            no_rule(op, "what its gradients allocate")


# ---- gates, statement by statement ---------------------------------------------------------------------------


SORTED_BELOW = 4096
"""Entries below which `backends/runtime/activations.py` sorts, instead of taking steps of Newton's method."""


@dataclass(frozen=True, slots=True)
class _Logits:
    """Bytes of what a gate computes with: all entries, one number a row, and one count a row."""

    count: int
    width: int
    itemsize: int

    @property
    def wide(self) -> int:
        """Bytes of an element: half precision is computed in float32."""
        return max(self.itemsize, 4)

    @property
    def full(self) -> int:
        return self.wide * self.count

    @property
    def rows(self) -> int:
        return self.wide * (self.count // self.width)

    @property
    def counts(self) -> int:
        return INTEGER_BYTES * (self.count // self.width)

    @property
    def digits(self) -> int:
        """⌈log2 of the width⌉, on which the number of Newton's steps depends."""
        return (self.width - 1).bit_length()

    def gate(self, threshold: AllocationTrace, *, halved: bool) -> AllocationTrace:
        """The forward pass of either autograd function, around its threshold; what stays is its result."""
        full, rows = self.full, self.rows
        cast = (full,) if self.wide != self.itemsize else ()
        return (
            *cast,
            *(rows, full, -rows),  # z - maximum
            *((full, -full) if halved else ()),
            *(-c for c in cast),
            *(full, -full),  # clamp
            *threshold,
            *(full, -rows, full, -full),  # z - threshold, clamp
            *((self.itemsize * self.count, -full) if cast else ()),
            -full,
        )

    def ordered(self) -> AllocationTrace:
        """Sorted entries (their positions are given back) and `count`."""
        return self.full, INTEGER_BYTES * self.count, -INTEGER_BYTES * self.count, self.wide * self.width


def _entmax15(count: int, width: int, itemsize: int) -> AllocationTrace:
    """`_Entmax15Root.forward` on `count` entries in rows of `width`; what stays is its result."""
    z = _Logits(count, width, itemsize)
    e, row, chosen = z.full, z.rows, z.counts
    if count < SORTED_BELOW:
        threshold: AllocationTrace = (
            *z.ordered(),
            *(e, e, e, -e, e, e),  # total, squares, mean, spread
            *(e, e, -e, e, -e),  # rest: difference, quotient, clamp
            *(e, e, -e),  # tau, and before it the reciprocal root
            *(count, chosen, -count, chosen, -chosen, row),  # last: comparison, sum, difference; tau there
            -(7 * e + z.wide * width + chosen),
        )
        return z.gate(threshold, halved=True)
    # difference, product, sum, step; the threshold before
    tau = (row, row, -row, row, row, -2 * row, -row)
    first, later = (e, row, *tau), (e, -e, row, -row, *tau)
    steps = int(entmax15_steps(z.digits)) + (itemsize == 8)
    return z.gate((row, *first, *later * (steps - 1), -(e + row)), halved=True)


def _sparsemax(count: int, width: int, itemsize: int) -> AllocationTrace:
    """`_Sparsemax.forward`, as `_entmax15`."""
    z = _Logits(count, width, itemsize)
    e, row, chosen = z.full, z.rows, z.counts
    if count < SORTED_BELOW:
        threshold: AllocationTrace = (
            *z.ordered(),
            *(e, e, -e),  # excess
            *(e, count, -e, chosen, -count, chosen, -chosen),  # chosen: product, comparison, sum, clamp
            *(chosen, row, -chosen, row, -row),  # excess at chosen, over chosen
            -(2 * e + z.wide * width + chosen),
        )
        return z.gate(threshold, halved=False)
    tau = (row, row, row, -2 * row, row, -row, -row)  # difference, sum, quotient, sum; the one before
    first, later = (e, row, *tau), (e, -e, row, -row, *tau)
    steps = int(sparsemax_steps(z.digits)) + 2 * (itemsize == 8)
    return z.gate((row, *first, *later * (steps - 1), -(e + row)), halved=False)
