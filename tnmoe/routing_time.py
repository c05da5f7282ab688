"""Seconds of the ops that dispatch and combine, by measured rates; products by expert are `tnmoe.hardware`'s."""

from __future__ import annotations

from collections.abc import Mapping

from tnmoe.cost import elements
from tnmoe.dims import Dim
from tnmoe.errors import CostError
from tnmoe.ops import RoutingOp
from tnmoe.rates import Rates
from tnmoe.routing_ops import (
    CapacitySlots,
    Gather,
    Normalise,
    PairPositions,
    ProductTopK,
    ScatterAdd,
    SortSlots,
    Spread,
    TopK,
    Unsort,
)

POSITION = 8
"""Bytes of a position."""


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
