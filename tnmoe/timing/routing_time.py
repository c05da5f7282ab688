"""Seconds of the ops that dispatch and combine, by measured rates; products by expert are `tnmoe.timing.predict`'s."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tnmoe.errors import CostError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op
from tnmoe.ir.routing_ops import (
    CapacitySlots,
    Gather,
    GroupedContract,
    Noise,
    Normalise,
    PairPositions,
    ProductTopK,
    RoutingOp,
    ScatterAdd,
    SortSlots,
    Spread,
    TopK,
    Unsort,
)
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.rates import Rates

POSITION = 8
"""Bytes of a position."""

CALLS = {
    TopK: 3,
    ProductTopK: 12,
    PairPositions: 4,
    Noise: 0,
    Normalise: 4,
    SortSlots: 7,
    Unsort: 2,
    CapacitySlots: 18,
    ScatterAdd: 2,
    Spread: 2,
}
"""Calls of torch in an op's emitted function (`backends/runtime/routing_functions.py`); of any other op one."""

BLOCKED_CALLS = 26
"""Those of a `SortSlots` in blocks."""


def calls(op: Op, sizes: Mapping[str, Dim]) -> int:
    """Calls of torch that an op makes: each is looked up and launched."""
    if isinstance(op, GroupedContract):
        return round(grouped_products(op, sizes)) + 3
    if isinstance(op, SortSlots) and op.block > 1:
        choices, experts = (int(elements(v.indices, sizes)) for v in (op.positions, op.counts))
        return CALLS[SortSlots] if choices <= 2 * experts else BLOCKED_CALLS
    return CALLS.get(type(op), 1)


def grouped_products(op: GroupedContract, sizes: Mapping[str, Dim]) -> float:
    """Products in a loop over experts: one for each row of few, else one for each expert that has any."""
    rows, experts = (int(elements(v.indices[:1], sizes)) for v in (op.lhs, op.counts))
    found = rows if rows <= 2 * experts else touched_experts(experts, rows)
    return found * int(elements(op.rhs.indices[:1], sizes)) / experts  # null experts have none


def touched_experts(experts: int, choices: int) -> float:
    """How many of the experts at least one of so many choices meets, if all are chosen alike: N (1 - (1 - 1/N)^c)."""
    return experts * -math.expm1(choices * math.log1p(-1 / experts)) if experts > 1 else 1.0


def routing_seconds(op: RoutingOp, sizes: Mapping[str, Dim], rates: Rates, width: int) -> float:
    """Seconds of one routing op, without gradients.

    Raises:
        CostError: an op that runs beside forward passes alone.
    """

    def count(indices: tuple[str, ...]) -> int:
        return int(elements(indices, sizes))

    def measured(kind: str, rows: int, length: int, work: int) -> float:
        return work / rates.routing[kind].at(max(1, rows), length) + rates.routing_overhead[kind]

    def stream(kind: str, moved: int) -> float:
        return moved / rates.streams[kind].at(max(1, moved)) + rates.overhead[kind]

    match op:
        case TopK(_, _, x, index):
            entries, length = count(x.indices), count((index,))
            return measured("TopK", entries // length, length, entries)
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
    raise CostError(f"op {type(op).__name__} has no time model")
