"""Grouped products: each row by the matrix of its own expert, whatever the router says."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.counting.torch_formulas.call import Call, Formula, Moved, tensor_bytes
from tnmoe.counting.work import Flops


def grouped_flops(rows: int, inner: int, outer: int, biased: bool = False) -> Flops:
    """Every row meets one matrix (inner × outer), so that the loads of the experts do not count."""
    return Flops(matmul=2 * rows * inner * outer, elementwise=rows * outer if biased else 0)


def grouped_bytes(rows: int, experts: int, weights: int) -> int:
    """Of all experts' `weights` those that so many rows can touch at most: each may choose another one."""
    return weights // experts * min(experts, rows) if experts else 0


def grouped_shape(left: Sequence[int], right: Sequence[int], groups: int) -> tuple[int, ...]:
    """Of the result of `torch._grouped_mm`: rows or columns are grouped, or the sum is, or the batch axis is shared."""
    if len(left) == 2 and len(right) == 2:  # the sum is grouped: gradients of weights
        return groups, left[0], right[1]
    if len(left) == 2:
        return left[0], right[2]
    return (left[1], right[1]) if len(right) == 2 else (left[0], left[1], right[2])


def _grouped(call: Call) -> Flops:
    left, right = call.shape("self"), call.shape("mat2")
    scaled = call["scale_a"] is not None
    others = call.size * (scaled + (call["bias"] is not None))
    if len(left) == 3:  # stacked matrices times columns, or times as many matrices
        each = left[1] * left[2] * right[-1]
        return Flops(2 * each * (left[0] if len(right) == 3 else 1), others)
    return Flops(2 * left[0] * left[1] * right[-1], others)


def _moved(call: Call) -> tuple[int, int]:
    """Operands, but of stacked matrices only as many as rows can choose."""
    read = sum(tensor_bytes(t) for t in call.tensors)
    left, right = call["self"], call["mat2"]
    stacked, rows = (right, left.shape[0]) if right.dim() == 3 else (left, right.shape[-1])
    if left.dim() != right.dim():
        whole = tensor_bytes(stacked)
        read += grouped_bytes(rows, stacked.shape[0], whole) - whole
    return read, sum(tensor_bytes(t) for t in call.results)


FORMULAS: dict[str, Formula] = {
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm_v2": _grouped,
}

MOVED: dict[str, Moved] = dict.fromkeys(FORMULAS, _moved)
