"""Seconds of the ops that dispatch and combine, by measured rates; their calls of torch; what gradients are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from tnmoe.errors import CostError, no_rule
from tnmoe.ir.contractions import Permute
from tnmoe.ir.ops import Op
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
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.device import entries
from tnmoe.timing.rates import GROUPED, Rates

POSITION = 8
"""Bytes of a position."""

BLOCKED_CALLS = 26
"""Calls of torch of a `SortSlots` in blocks."""

MOST_NODES = 4
"""Nodes of autograd's graph that an op records at most, a loop over experts aside."""


def calls(op: RoutingOp, sizes: Mapping[str, Dim]) -> int:
    """Calls of torch that an op's emitted function makes (`backends/runtime/routing_functions.py`).

    Raises:
        CostError: an op that runs beside forward passes alone.
    """
    match op:
        case Noise():  # in evaluation
            return 0
        case Gather() | Select():
            return 1
        case ScatterAdd() | Spread() | Unsort():
            return 2
        case TopK():
            return 3
        case Normalise() | PairPositions():
            return 4
        case SortSlots():
            choices, experts = (entries(v.indices, sizes) for v in (op.positions, op.counts))
            return BLOCKED_CALLS if op.block > 1 and choices > 2 * experts else 7
        case ProductTopK():
            return 12
        case CapacitySlots():
            return 18
        case GroupedContract():
            return round(grouped_products(op, sizes)) + 3
        case LoadBalance() | ZLoss() | Dropped() | Missed():
            raise CostError(f"op {type(op).__name__} has no number of calls; it is no step of a forward pass")
        case _:
            no_rule(op, "its calls of torch")


@dataclass(frozen=True, slots=True)
class RoutingGradients:
    """What the gradients of a routing op take the time of.

    Attributes:
        ops: that they are made of.
        filled: of the shape of a tensor of zeros that they begin with; None if there is none.
        scaled: whether they also take the op's own time, as their FLOPs are to its FLOPs.
    """

    ops: tuple[Op, ...] = ()
    filled: Value | None = None
    scaled: bool = False


def gradients(op: RoutingOp, requires_grad: Set[str]) -> RoutingGradients:
    """What autograd's gradients of the operands in `requires_grad` are made of.

    Raises:
        CostError: an op that nobody differentiates.
    """
    match op:
        case GroupedContract():  # each product has two of its extent; the slices' gradients are joined
            joined = tuple(Permute(v, v) for v in (op.lhs, op.rhs) if v.name in requires_grad)
            return RoutingGradients(joined, scaled=True)
        case Gather(out, x, positions, index, sparse):
            return RoutingGradients((ScatterAdd(x, out, positions, index),), None if sparse else x)
        case Unsort(out, x, slots):
            return RoutingGradients((ScatterAdd(x, out, slots, x.indices[0]),))
        case ScatterAdd(out, x, positions, index):
            return RoutingGradients((Gather(x, out, positions, index),))
        case TopK() | ProductTopK() | Noise() | Normalise() | CapacitySlots() | Spread() | Select():
            return RoutingGradients(scaled=True)
        case PairPositions() | SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():
            raise CostError(f"op {type(op).__name__} has no gradients in a training pass")
        case _:
            no_rule(op, "the time of its gradients")


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


def seconds(op: RoutingOp, sizes: Mapping[str, Dim], rates: Rates, itemsize: int, moved: int) -> float:
    """Seconds of one routing op, without gradients; in evaluation, where the result of noise is its operand.

    Args:
        op: laid out.
        sizes: integers by index.
        rates: of the device in this dtype.
        itemsize: bytes of an element.
        moved: bytes of what is chosen of the operands, and of the results.

    Raises:
        CostError: an op that runs beside forward passes alone.
    """

    def count(indices: tuple[str, ...]) -> int:
        return entries(indices, sizes)

    def stream(size: int) -> float:
        return size / rates.streams["Multiply"].at(max(1, size)) + rates.overhead["Multiply"]

    def measured(kind: str, rows: int, length: int, work: int, besides: float = 0.0) -> float:
        own = work / rates.routing[kind].at(max(1, rows), length) + rates.routing_overhead[kind]
        return max(besides + own, least)

    least = moved / rates.bandwidth

    match op:
        case Noise():
            return 0.0
        case Select():  # a view
            return rates.overhead["split"]
        case GroupedContract():
            return max(_grouped(op, sizes, rates, itemsize), least)
        case TopK(_, _, x, index):
            every, length = count(x.indices), count((index,))
            return measured("TopK", every // length, length, every)
        case ProductTopK(_, _, lhs, rhs):
            side = max(count(lhs.indices[-1:]), count(rhs.indices[-1:]))
            rows = count(lhs.indices[:-1])
            return measured("ProductTopK", rows, side, rows * side)
        case PairPositions(out):  # product, sum
            return max(2 * stream(2 * POSITION * count(out.indices)), least)
        case Normalise(out, _, positions):
            rows, length = count(out.indices[:-1]), count(out.indices[-1:])
            compared = 0.0 if positions is None else 2 * stream((2 * itemsize + POSITION) * rows * length)
            return measured("Normalise", rows, length, rows * length, compared)
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
        case LoadBalance() | ZLoss() | Dropped() | Missed():
            raise CostError(f"op {type(op).__name__} has no time model; it is no step of a forward pass")
        case _:
            no_rule(op, "its time")


def _grouped(op: GroupedContract, sizes: Mapping[str, Dim], rates: Rates, itemsize: int) -> float:
    """A product for each expert that is chosen, as the emitted loop runs them, and their concatenation.

    How many rows an expert has, only the data knows; here all are chosen alike.
    """
    (row, index), experts = op.lhs.indices, entries(op.counts.indices, sizes)
    rows, inner, cols = (entries((i,), sizes) for i in (row, index, op.out.indices[-1]))
    products = grouped_products(op, sizes)
    each = max(1.0, rows / max(1.0, products)) if rows > 2 * experts else 1.0
    one = 2 * each * inner * cols / rates.gemm.at(each, inner, cols) + rates.overhead["matmul"]
    if op.bias is not None:
        one += itemsize * each * cols / rates.streams["Add"].at(3 * itemsize * each * cols) + rates.overhead["bias"]
    joined = 2 * itemsize * rows * cols
    copying = joined / rates.streams["Permute"].at(joined) + rates.overhead["Permute"]
    loop, expert = (rates.routing_overhead[kind] for kind in GROUPED)
    return loop + products * (one + expert) + copying
