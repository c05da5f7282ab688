"""Where a small matrix is multiplied to a mode in the middle of a tensor that lies as it lies: nothing is copied.

`x[b, e, f] · w[e, k]` wanted as `[b, k, f]` is a product `wᵀ x[b]` for each `b` (`MatmulGroups.outer`). As one large
product it would need x as `[b, f, e]`, and its result lies as `[b, f, k]`: a copy or two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tnmoe.ir.contractions import Contract, ContractAdd, MatmulGroups, index_groups
from tnmoe.ir.value import Value

Order = tuple[str, ...]

LEAST_COLUMNS = 16
"""Columns below which the kernels of batched products are slow; see `pays`."""


def pays(groups: MatmulGroups, sizes: Mapping[str, int]) -> bool:
    """Whether the broadcast product is faster than copies and one large product; False where a size is unknown.

    A batched product reads the matrix again for each item, so that may be no larger than what it reads and writes of
    the item, and rows have to be long. Measured: see docs/decisions/broadcast-products.md.
    """
    if not all(i in sizes for group in (groups.rows, groups.inner, groups.cols) for i in group):
        return False
    rows, inner, cols = (math.prod(sizes[i] for i in group) for group in (groups.rows, groups.inner, groups.cols))
    return cols >= LEAST_COLUMNS and rows * inner <= cols * (rows + inner)


def broadcast(op: Contract | ContractAdd, sizes: Mapping[str, int]) -> tuple[Value, Value, MatmulGroups] | None:
    """The matrix to broadcast, the tensor, and the groups of their product; None unless that lies so and it pays."""
    g = index_groups(op)
    for small, tensor in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        inner = tuple(i for i in tensor.indices if i in g.inner)
        start = tensor.indices.index(inner[0])
        outer, cols = tensor.indices[:start], tensor.indices[start + len(inner) :]
        if tensor.indices[start : start + len(inner)] == inner and _broadcasts(op, g, small, outer, cols):
            rows = tuple(i for i in small.indices if i not in inner)
            groups = MatmulGroups((), rows, inner, cols, outer)
            if pays(groups, sizes):
                return small, tensor, groups
    return None


def broadcast_demand(
    op: Contract | ContractAdd, want: Order, sizes: Mapping[str, int], known: Mapping[str, Order]
) -> tuple[tuple[Value, Order], ...] | None:
    """The orders of both operands by which the result lies as wanted, if a broadcast product gives that and it pays.

    Args:
        op: not laid out.
        want: the order of the result.
        sizes: as far as they are known.
        known: orders that are decided, by name; that of the tensor decides in which order several indices are summed.
    """
    g = index_groups(op)
    for small, tensor in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        rows = tuple(i for i in want if i in small.indices)
        if not rows:
            return None
        start = want.index(rows[0])
        outer, cols = want[:start], want[start + len(rows) :]
        if want[start : start + len(rows)] != rows or not _broadcasts(op, g, small, outer, cols):
            continue
        inner = tuple(i for i in known.get(tensor.name, g.inner) if i in g.inner)
        if pays(MatmulGroups((), rows, inner, cols, outer), sizes):
            return (tensor, (*outer, *inner, *cols)), (small, (*rows, *inner))
    return None


def _broadcasts(op: Contract | ContractAdd, g: MatmulGroups, small: Value, outer: Order, cols: Order) -> bool:
    """Whether these operands have the indices of a broadcast product."""
    rows = set(small.indices) - set(g.inner)
    return isinstance(op, Contract) and not g.batch and bool(rows and outer and cols)
