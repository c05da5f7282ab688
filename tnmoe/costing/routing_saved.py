"""What the backward pass of a routing primitive keeps, as autograd does it for the emitted functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import cast

from tnmoe.errors import no_rule
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

Sizes = Mapping[str, Dim]


@dataclass(frozen=True, slots=True)
class Inside:
    """Numbers that an op keeps and that are no value of the program: elements, 64-bit integers and single bytes."""

    elements: Dim = 0
    integers: Dim = 0
    flags: Dim = 0


def saved(op: RoutingOp, sizes: Sizes, needing: Set[str]) -> tuple[Value, ...]:
    """Operands and results that the backward of `op` reads."""
    match op:
        case GroupedContract(_, lhs, rhs):
            return tuple(v for v, other in ((lhs, rhs), (rhs, lhs)) if other.name in needing)
        case Spread(x=None):
            return ()
        case Spread() | Gather():
            return (op.positions,)
        case ScatterAdd(_, x, positions):  # torch's `index_add` keeps what it adds, for its shape
            return (x, positions)
        case TopK(_, positions) if sorted_in_place(op, sizes):
            return (positions,)
        case Unsort(_, _, slots):
            return (slots,)
        case Normalise(_, x, None):
            return (x,)
        case Noise(_, _, scale):
            return (scale,) if scale.name in needing else ()
        case TopK() | ProductTopK() | Normalise() | CapacitySlots() | Select():  # see `inside`
            return ()
        case PairPositions() | SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # no gradient passes
            return ()
        case _:
            no_rule(op, "what its backward pass reads")


def inside(op: RoutingOp, sizes: Sizes, needing: Set[str]) -> Inside:
    """What the backward of `op` keeps besides values of the program; some operand is in `needing`."""
    out = elements(op.out, sizes)
    match op:
        case TopK(_, _, x):  # the whole order of its sort, if that is no value
            return Inside(integers=0 if sorted_in_place(op, sizes) else elements(x, sizes))
        case ProductTopK(_, _, lhs, rhs):  # of either side, and of their pairs
            sides = [best(op, v, sizes) for v in (lhs, rhs) if v.name in needing]
            return Inside(integers=sum(sides, start=out))
        case Noise(_, _, scale):  # what was drawn
            return Inside(elements=out if scale.name in needing else 0)
        case Normalise(_, x, positions):  # the sums, and which are 0; what is counted, and the products with that
            sums = elements(x, sizes, x.indices[:-1])
            return Inside(sums, flags=sums) if positions is None else Inside(out + sums, flags=out + sums)
        case CapacitySlots():  # the choice in each slot, and whether there is one
            return Inside(integers=out, flags=out)
        case Unsort() | Gather() | ScatterAdd() | Spread() | GroupedContract() | Select():
            return Inside()
        case PairPositions() | SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # no gradient passes
            return Inside()
        case _:
            no_rule(op, "what its backward pass keeps")


def best(op: ProductTopK, side: Value, sizes: Sizes) -> Dim:
    """Entries of the best of one side: never more a row than it has."""
    slots, width = sizes[op.out.indices[-1]], sizes[side.indices[-1]]
    fewer = min(slots, width) if isinstance(slots, int) and isinstance(width, int) else slots
    return elements(side, sizes, side.indices[:-1]) * fewer


def sorted_in_place(op: TopK, sizes: Sizes) -> bool:
    """Whether both results of a `TopK` are views of its sort: of one row, or of as many slots as there are entries."""
    return elements(op.x, sizes, op.x.indices[:-1]) == 1 or sizes[op.out.indices[-1]] == sizes[op.index]


def storages(op: RoutingOp, sizes: Sizes) -> Mapping[str, Value]:
    """Results that are views of something larger, which no value of the program is: its shape, by their names."""
    if isinstance(op, TopK) and sorted_in_place(op, sizes):
        return {v.name: Value(v.name, op.x.indices, v.part, v.integer) for v in (op.out, op.positions)}
    return {}


def elements(value: Value, sizes: Sizes, indices: tuple[str, ...] | None = None) -> Dim:
    """Elements of a value, or of some of its indices."""
    return cast(Dim, math.prod([sizes[i] for i in (value.indices if indices is None else indices)]))
