"""Seconds of the ops that dispatch and combine, by measured rates, and the calls of torch that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tnmoe.errors import CostError, no_rule
from tnmoe.ir.routing_ops import (
    CapacitySlots,
    Dropped,
    Gather,
    GroupedContract,
    LoadBalance,
    Missed,
    Noise,
    Normalise,
    PairPositions,
    ProductTopK,
    RoutingOp,
    ScatterAdd,
    Select,
    SortSlots,
    Spread,
    TopK,
    Unsort,
    ZLoss,
)
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.device import entries
from tnmoe.timing.rates import GROUPED, Rates

POSITION = 8
"""Bytes of a position."""

CALLS: Mapping[type, int] = {
    TopK: 3,
    ProductTopK: 12,
    PairPositions: 4,
    Noise: 0,
    Normalise: 4,
    SortSlots: 7,
    Unsort: 2,
    CapacitySlots: 18,
    Gather: 1,
    ScatterAdd: 2,
    Spread: 2,
    Select: 1,
}
"""Calls of torch in an op's emitted function (`backends/runtime/routing_functions.py`)."""

BLOCKED_CALLS = 26
"""Those of a `SortSlots` in blocks."""

MOST_NODES = 4
"""Nodes of autograd's graph that an op records at most, a loop over experts aside."""


def calls(op: RoutingOp, sizes: Mapping[str, Dim]) -> int:
    """Calls of torch that an op makes: each is looked up and launched.

    Raises:
        CostError: an op that runs beside forward passes alone.
    """
    if isinstance(op, GroupedContract):
        return round(grouped_products(op, sizes)) + 3
    if isinstance(op, SortSlots) and op.block > 1:
        choices, experts = (entries(v.indices, sizes) for v in (op.positions, op.counts))
        return CALLS[SortSlots] if choices <= 2 * experts else BLOCKED_CALLS
    if type(op) not in CALLS:
        raise CostError(f"op {type(op).__name__} has no number of calls; it is no step of a forward pass")
    return CALLS[type(op)]


def graph_nodes(op: RoutingOp, sizes: Mapping[str, Dim]) -> int:
    """Nodes of autograd's graph that an op records: of its many calls, those on positions record none."""
    if isinstance(op, GroupedContract):  # each product; what takes the slices apart, and what joins the results
        return calls(op, sizes) + (op.bias is not None)
    return min(calls(op, sizes), MOST_NODES)


def grouped_products(op: GroupedContract, sizes: Mapping[str, Dim]) -> float:
    """Products in a loop over experts: one for each row of few, else one for each expert that has any."""
    rows, experts = (entries(v.indices[:1], sizes) for v in (op.lhs, op.counts))
    products = rows if rows <= 2 * experts else touched_experts(experts, rows)
    return products * entries(op.rhs.indices[:1], sizes) / experts  # null experts have none


def touched_experts(experts: int, choices: int) -> float:
    """How many of the experts at least one of so many choices meets, if all are chosen alike: N (1 - (1 - 1/N)^c)."""
    return experts * -math.expm1(choices * math.log1p(-1 / experts)) if experts > 1 else 1.0


def seconds(op: RoutingOp, sizes: Mapping[str, Dim], rates: Rates, width: int, moved: int) -> float:
    """Seconds of one routing op, without gradients; in evaluation, where the result of noise is its operand.

    Args:
        op: laid out.
        sizes: integers by index.
        rates: of the device in this dtype.
        width: bytes of an element.
        moved: bytes of what is chosen of the operands, and of the results.

    Raises:
        CostError: an op that runs beside forward passes alone.
    """
    match op:
        case Noise():
            return 0.0
        case Select():  # a view
            return rates.overhead["split"]
        case GroupedContract():
            return max(_grouped(op, sizes, rates, width), moved / rates.bandwidth)
        case _:
            return max(_measured(op, sizes, rates, width), moved / rates.bandwidth)


def _measured(op: RoutingOp, sizes: Mapping[str, Dim], rates: Rates, width: int) -> float:
    def count(indices: tuple[str, ...]) -> int:
        return entries(indices, sizes)

    def measured(kind: str, rows: int, length: int, work: int) -> float:
        return work / rates.routing[kind].at(max(1, rows), length) + rates.routing_overhead[kind]

    def stream(kind: str, moved: int) -> float:
        return moved / rates.streams[kind].at(max(1, moved)) + rates.overhead[kind]

    match op:
        case TopK(_, _, x, index):
            every, length = count(x.indices), count((index,))
            return measured("TopK", every // length, length, every)
        case ProductTopK(_, _, lhs, rhs):
            side = max(count(lhs.indices[-1:]), count(rhs.indices[-1:]))
            rows = count(lhs.indices[:-1])
            return measured("ProductTopK", rows, side, rows * side)
        case Normalise(out, _, positions):
            rows, length = count(out.indices[:-1]), count(out.indices[-1:])
            compared = 2 * stream("Multiply", (2 * width + POSITION) * rows * length) if positions is not None else 0.0
            return compared + measured("Normalise", rows, length, rows * length)
        case Spread(out):
            rows, length = count(out.indices[:-1]), count(out.indices[-1:])
            return measured("Spread", rows, length, rows * length)
        case Gather(out, _, positions) | Unsort(out, _, positions):
            rows = count(positions.indices)
            return measured("Gather", rows, count(out.indices) // max(1, rows), count(out.indices))
        case ScatterAdd(_, x, positions):
            rows = count(positions.indices)
            return measured("ScatterAdd", rows, count(x.indices) // max(1, rows), count(x.indices))
        case SortSlots(counts=counts, positions=positions):
            slots = count(positions.indices)
            return measured("SortSlots", slots, count(counts.indices), slots)
        case CapacitySlots(out, _, shares):
            slots = count(shares.indices)
            return measured("CapacitySlots", slots, count(out.indices[:1]), slots)
        case PairPositions(out):  # product, sum
            return 2 * stream("Multiply", 2 * POSITION * count(out.indices))
        case LoadBalance() | ZLoss() | Dropped() | Missed():
            raise CostError(f"op {type(op).__name__} has no time model; it is no step of a forward pass")
        case Noise() | Select() | GroupedContract():
            return seconds(op, sizes, rates, width, 0)
        case _:
            no_rule(op, "its time")


def _grouped(op: GroupedContract, sizes: Mapping[str, Dim], rates: Rates, width: int) -> float:
    """A product for each expert that is chosen, as the emitted loop runs them, and their concatenation.

    How many rows an expert has, only the data knows; here all are chosen alike.
    """
    (row, index), experts = op.lhs.indices, entries(op.counts.indices, sizes)
    rows, inner, cols = (entries((i,), sizes) for i in (row, index, op.out.indices[-1]))
    products = grouped_products(op, sizes)
    each = max(1.0, rows / max(1.0, products)) if rows > 2 * experts else 1.0
    one = 2 * each * inner * cols / rates.gemm.at(each, inner, cols) + rates.overhead["matmul"]
    if op.bias is not None:
        one += width * each * cols / rates.streams["Add"].at(3 * width * each * cols) + rates.overhead["bias"]
    joined = 2 * width * rows * cols
    copying = joined / rates.streams["Permute"].at(joined) + rates.overhead["Permute"]
    loop, expert = (rates.routing_overhead[kind] for kind in GROUPED)
    return loop + products * (one + expert) + copying
