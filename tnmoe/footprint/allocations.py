"""Which bytes one op takes and gives back while it runs, forward and backward, as torch's tracker sees them.

The scripts of the gates follow the statements of `backends/runtime/activations.py` one by one, those of the routing
primitives (`tnmoe.footprint.routing_allocations`) those of `backends/runtime/routing_functions.py`. What a kernel
allocates inside itself (packed matrices of a BLAS, buckets of a sort) is no tensor, is invisible to torch's own
tracker, and is not counted: see `SCRATCH`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from tnmoe.costing import routing_saved
from tnmoe.costing.backward import broadcast_elements
from tnmoe.costing.op_cost import entmax15_steps, sparsemax_steps
from tnmoe.costing.saved import saved_inside
from tnmoe.errors import CostError
from tnmoe.footprint import routing_allocations
from tnmoe.footprint.timeline import Script, entries, lines, size, whole
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Merge, Multiply, Permute, Reduce, Split, matmul_groups
from tnmoe.ir.dataflow import is_view
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.routing_ops import Gather, Noise, RoutingOp
from tnmoe.ir.value import INTEGER_BYTES, Value
from tnmoe.symbolic.dims import Dim

SCRATCH = (
    "Left out: what kernels allocate inside themselves, which is no tensor (packed operands of a matrix product, "
    "buffers of a sort or a reduction)."
)


def forward_script(
    op: Op, sizes: Mapping[str, Dim], item: int, needing: Set[str] = frozenset(), *, evaluation: bool
) -> Script:
    """What the forward of `op` allocates and frees; what stays is its results, and what it keeps for a backward pass.

    Args:
        op, sizes: bound.
        item: bytes of an element.
        needing: names of the values that need a gradient.
        evaluation: the module's mode, in which batch norm uses its running statistics.

    Raises:
        CostError: an op that is not emitted.
    """
    out = size(op.out, sizes, item)
    kept = any(v.name in needing for v in operands(op))
    match op:
        case Entmax15(_, x, index):
            root = _entmax15(entries(x.indices, sizes), whole(sizes[index]), item)
            return (*root, out) if kept else (*root, out, -out)
        case Sparsemax(_, x, index):
            return _sparsemax(entries(x.indices, sizes), whole(sizes[index]), item)
        case LayerNorm() | BatchNorm():
            own_statistics = isinstance(op, LayerNorm) or not evaluation
            inside = saved_inside_bytes(op, sizes, item, {op.x.name}) if own_statistics else 0
            return (out + inside,) if kept else (out + inside, -inside)
        case Contract() | ContractAdd() | Multiply() | Add() | Reduce() | Permute() | Softmax() | Sigmoid() | Gelu():
            return (out,)
        case GeluBackward():
            return (out,)
        case _ if isinstance(op, FusedOp):  # by its kernel; on tensors that this does not take, as what it stands for
            return (out,)
        case Split() | Merge():
            return () if is_view(op) else (out,)
        case _ if isinstance(op, RoutingOp):
            return routing_allocations.forward(op, sizes, item, needing, evaluation=evaluation)
    raise CostError(f"op {type(op).__name__} has no allocations; add them to tnmoe/footprint/allocations.py")


def saved_inside_bytes(op: Op, sizes: Mapping[str, Dim], item: int, needing: Set[str]) -> int:
    """Bytes that the backward of `op` keeps and that are no value of the program, if some operand is in `needing`."""
    if not any(v.name in needing for v in operands(op)):
        return 0
    kept = item * whole(saved_inside(op, sizes, needing))
    if not isinstance(op, RoutingOp):
        return kept
    inside = routing_saved.inside(op, sizes, needing)
    return kept + INTEGER_BYTES * whole(inside.integers) + whole(inside.flags)


def backward_scripts(
    op: Op, sizes: Mapping[str, Dim], item: int, needing: Set[str], stored: Set[str] = frozenset()
) -> tuple[Script, ...]:
    """What the backward of `op` allocates and frees; `stored` are the names of parameters and buffers.

    One script for each node of torch's graph (or for some nodes in a row); after each the gradient that came in is
    given back, and after the first one the values that were saved (those of a `TopK` after the last). What stays of the
    last one are the gradients of the operands in `needing`, but for those that are the incoming gradient itself: see
    `passes_on`.
    """
    wanted = [v for v in operands(op) if v.name in needing]
    match op:
        case Contract() | ContractAdd():
            made = [v for v in wanted if not passes_on(op, v, sizes)]
            return (tuple(gradient_bytes(op, v, sizes, item) for v in made),)
        case Multiply(out):
            # Both products first, then the sums over what was broadcast.
            full = size(out, sizes, item)
            summed = [v for v in wanted if _is_summed(v, out, sizes)]
            return ((*(full for _ in wanted), *(d for v in summed for d in (size(v, sizes, item), -full))),)
        case Add():
            return (tuple(size(v, sizes, item) for v in wanted if not passes_on(op, v, sizes)),)
        case Reduce() | Permute():
            return ((),)
        case Split() | Merge():
            return ((() if passes_on(op, op.x, sizes) else (size(op.x, sizes, item),)),)
        case Softmax(out) | Sigmoid(out) | Gelu(out):
            return ((size(out, sizes, item),),)
        case LayerNorm() | BatchNorm():
            return ((sum(size(v, sizes, item) for v in wanted),),)
        case Entmax15(out, _, index):
            full, rows, count = size(out, sizes, item), item * lines(out, index, sizes), entries(out.indices, sizes)
            square = (full, full, full, -2 * full)
            # mask, product; two sums, their quotient; product, difference, half
            root = (count, full, -count, rows, rows, rows, -2 * rows, full, full, -full, full, -2 * full - rows)
            return square, root
        case Sparsemax(out, _, index):
            full, rows, count = size(out, sizes, item), item * lines(out, index, sizes), entries(out.indices, sizes)
            counts = INTEGER_BYTES * lines(out, index, sizes)
            return ((count, full, rows, counts, rows, -rows - counts, full, -rows, full, -2 * full - count),)
        case _ if isinstance(op, RoutingOp):
            return routing_allocations.backward(op, sizes, item, needing, stored)
    raise CostError(f"op {type(op).__name__} has no allocations; add them to tnmoe/footprint/allocations.py")


def gradient_bytes(op: Op, value: Value, sizes: Mapping[str, Dim], item: int) -> int:
    """Bytes of the gradient of an operand as the op's own node makes it: of a broadcast matrix for each item."""
    if isinstance(op, Contract) and value == op.lhs and (items := broadcast_elements(op, sizes)):
        return item * whole(items)
    return size(value, sizes, item)


def passes_on(op: Op, value: Value, sizes: Mapping[str, Dim]) -> bool:
    """True if the gradient of an operand is that of the result, the same bytes."""
    match op:
        case Reduce() | Permute():
            return True
        case Noise(_, x):
            return value == x
        case Gather():  # the rows of a sparse gradient, beside their positions
            return op.sparse
        case Split() | Merge():
            return not op.padded
        case Add():
            return not _is_summed(value, op.out, sizes)
        case ContractAdd(out, _, _, bias) if value == bias:
            # A bias of the columns is one axis short of the product; one of the rows has an axis of 1.
            row = set(bias.indices) == set(matmul_groups(op).cols)
            return not row and all(i in bias.indices or sizes[i] == 1 for i in out.indices)
    return False


def _is_summed(value: Value, out: Value, sizes: Mapping[str, Dim]) -> bool:
    """Whether torch sums the gradient over axes that the value lacks: all in front of its own, else those beyond 1."""
    first = next((k for k, i in enumerate(out.indices) if i in value.indices), len(out.indices))
    return first > 0 or any(i not in value.indices and sizes[i] != 1 for i in out.indices)


# ---- gates, statement by statement ---------------------------------------------------------------------------


SORTED_BELOW = 4096
"""Entries below which `backends/runtime/activations.py` sorts, instead of taking steps of Newton's method."""


@dataclass(frozen=True, slots=True)
class _Logits:
    """Bytes of what a gate computes with: all entries, one number a row, and one count a row."""

    count: int
    width: int
    item: int

    @property
    def wide(self) -> int:
        """Bytes of an element: half precision is computed in float32."""
        return max(self.item, 4)

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

    def gate(self, threshold: Script, *, halved: bool) -> Script:
        """The forward pass of either autograd function, around its threshold; what stays is its result."""
        full, rows = self.full, self.rows
        cast = (full,) if self.wide != self.item else ()
        return (
            *cast,
            *(rows, full, -rows),  # z - maximum
            *((full, -full) if halved else ()),
            *(-c for c in cast),
            *(full, -full),  # clamp
            *threshold,
            *(full, -rows, full, -full),  # z - threshold, clamp
            *((self.item * self.count, -full) if cast else ()),
            -full,
        )

    def ordered(self) -> Script:
        """Sorted entries (their positions are given back) and `count`."""
        return self.full, INTEGER_BYTES * self.count, -INTEGER_BYTES * self.count, self.wide * self.width


def _entmax15(count: int, width: int, item: int) -> Script:
    """`_Entmax15Root.forward` on `count` entries in rows of `width`; what stays is its result."""
    z = _Logits(count, width, item)
    e, row, chosen = z.full, z.rows, z.counts
    if count < SORTED_BELOW:
        threshold: Script = (
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
    steps = whole(entmax15_steps(z.digits)) + (item == 8)
    return z.gate((row, *first, *later * (steps - 1), -(e + row)), halved=True)


def _sparsemax(count: int, width: int, item: int) -> Script:
    """`_Sparsemax.forward`, as `_entmax15`."""
    z = _Logits(count, width, item)
    e, row, chosen = z.full, z.rows, z.counts
    if count < SORTED_BELOW:
        threshold: Script = (
            *z.ordered(),
            *(e, e, -e),  # excess
            *(e, count, -e, chosen, -count, chosen, -chosen),  # chosen: product, comparison, sum, clamp
            *(chosen, row, -chosen, row, -row),  # excess at chosen, over chosen
            -(2 * e + z.wide * width + chosen),
        )
        return z.gate(threshold, halved=False)
    tau = (row, row, row, -2 * row, row, -row, -row)  # difference, sum, quotient, sum; the one before
    first, later = (e, row, *tau), (e, -e, row, -row, *tau)
    steps = whole(sparsemax_steps(z.digits)) + 2 * (item == 8)
    return z.gate((row, *first, *later * (steps - 1), -(e + row)), halved=False)
