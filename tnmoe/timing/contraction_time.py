"""Seconds of contractions, sums and changes of axes, by measured rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tnmoe.costing.contraction_cost import forward
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    ContractionOp,
    MatmulGroups,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    matmul_groups,
)
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.device import entries
from tnmoe.timing.rates import Products, Rates

BATCHED_NODES = 6
"""Nodes of a batched product: torch expands and views both operands, multiplies them, and views the result."""


def seconds(
    op: ContractionOp, sizes: Mapping[str, Dim], rates: Rates, itemsize: int, moved: int, fast: Products | None = None
) -> float:
    """Seconds of an op whose operands, `moved` bytes with the result, lie where they lay when it was measured.

    Args:
        op: laid out.
        sizes: integers by index.
        rates: of the device in this dtype.
        itemsize: bytes of an element.
        moved: bytes of the operands and of the result.
        fast: rates of the products of the flavour `fast`, if they are used.
    """
    least = moved / rates.bandwidth
    match op:
        case Contract() | ContractAdd():
            return _product(op, sizes, rates, itemsize, least, fast)
        case Multiply() | Add() | Reduce() | Permute():
            return _stream(type(op).__name__, rates, moved, least)
        case Split() | Merge():
            if isinstance(op, Split) and op.padded:  # zeros are appended, a copy like that of another order
                return _stream("Permute", rates, moved, least)
            return rates.overhead[type(op).__name__.lower()]
        case _:
            no_rule(op, "its time")


def _stream(kind: str, rates: Rates, moved: int, least: float) -> float:
    return max(moved / rates.streams[kind].at(moved), least) + rates.overhead[kind]


def _product(
    op: Contract | ContractAdd,
    sizes: Mapping[str, Dim],
    rates: Rates,
    itemsize: int,
    least: float,
    fast: Products | None,
) -> float:
    cost = forward(op, sizes)
    groups = matmul_groups(op)
    batched = groups.batch + groups.outer
    batch, rows, inner, cols = (entries(g, sizes) for g in (batched, groups.rows, groups.inner, groups.cols))
    point: tuple[int, ...]
    # A batched product, or one with a bias for each entry, is the public one in every flavour.
    public = bool(batched) or (isinstance(op, ContractAdd) and set(op.bias.indices) != set(groups.cols))
    products = None if public else fast
    if batched:
        grid, point, overhead = rates.batched, (batch, rows, inner, cols), rates.overhead["batched"]
    elif products is not None:
        grid, point, overhead = products.gemm, (rows, inner, cols), products.overhead
    else:
        grid, point, overhead = rates.gemm, (rows, inner, cols), rates.overhead["matmul"]
    taken = max(int(cost.matmul_flops) / grid.at(*point), least) + overhead
    # The public one spreads the bias over the result first, to which the product is added.
    if isinstance(op, ContractAdd) and products is None:
        spread = itemsize * int(cost.elementwise_flops)
        taken += spread / rates.streams["Add"].at(3 * spread) + rates.overhead["bias"]
    # Beyond the grid the rate is that of its edge, whose result was smaller and its memory at hand.
    written = itemsize * int(cost.activations)
    measured = math.prod(min(size, axis[-1]) for size, axis in zip(point, grid.axes, strict=True))
    known = min(written, max(itemsize, itemsize * measured // min(inner, grid.axes[-2][-1])))
    taken += max(0.0, written / rates.fresh.at(written) - written / rates.fresh.at(known))
    return taken + _view_seconds(groups, rates.overhead)


def _views(groups: MatmulGroups) -> tuple[int, int]:
    """Views that give the operands two axes by merging some, and the result its own by splitting some.

    Each is a call of torch that moves nothing.
    """

    def odd(*axes: tuple[str, ...]) -> int:
        return sum(len(g) != 1 for g in axes)

    outer = (groups.outer,) if groups.outer else ()
    merges = odd(groups.rows, groups.inner) + odd(*outer, groups.inner, groups.cols)
    merges += len(outer)  # the matrix is expanded
    return merges, odd(*outer, groups.rows, groups.cols)


def graph_nodes(op: ContractionOp) -> int:
    """Nodes of autograd's graph that an op records, one for each differentiated call of torch, views included."""
    match op:
        case Contract() | ContractAdd():
            groups = matmul_groups(op)
            bias = isinstance(op, ContractAdd) and len(op.bias.indices) != 1
            return (BATCHED_NODES if groups.batch else 1) + bias + sum(_views(groups))
        case Multiply() | Add() | Reduce() | Permute() | Split() | Merge():
            return 1
        case _:
            no_rule(op, "its nodes of autograd's graph")


def _view_seconds(groups: MatmulGroups, overhead: Mapping[str, float]) -> float:
    merges, splits = _views(groups)
    return merges * overhead["merge"] + splits * overhead["split"]
