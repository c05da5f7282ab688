"""What a routing primitive costs, forward and backward; conventions are those of `tnmoe.costing.op_cost`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import cast

import sympy

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
from tnmoe.symbolic.dims import Dim, ceil_log2

Sizes = Mapping[str, Dim]


def _elements(value: Value, sizes: Sizes) -> Dim:
    return cast(Dim, math.prod([sizes[i] for i in value.indices]))


def grouped_macs(op: GroupedContract, sizes: Sizes) -> Dim:
    """Rows times the matrix of one expert. With null experts: the expected rows, if all experts are chosen alike."""
    rows, inner = (sizes[i] for i in op.lhs.indices)
    true, counted = sizes[op.rhs.indices[0]], sizes[op.counts.indices[0]]
    if op.rhs.indices[0] != op.counts.indices[0]:
        rows = rows * true // counted if isinstance(rows, int) else sympy.floor(rows * true / counted)
    return rows * inner * sizes[op.out.indices[-1]]


def forward(op: RoutingOp, sizes: Sizes) -> tuple[Dim, Dim, Dim]:
    """(matmul MACs, element-wise FLOPs, special FLOPs) of one op."""
    out = _elements(op.out, sizes)
    match op:
        case TopK(_, _, x, index):  # a sort
            return 0, 0, _elements(x, sizes) * ceil_log2(sizes[index])
        case ProductTopK(out=value, lhs=lhs, rhs=rhs):  # two partial sorts, all pairs of the best, a third
            slots = sizes[value.indices[-1]]
            sides = sum(_elements(v, sizes) * ceil_log2(sizes[v.indices[-1]]) for v in (lhs, rhs))
            return 0, 0, sides + out * slots * (1 + ceil_log2(slots * slots))
        case PairPositions():  # product, sum
            return 0, 0, 2 * out
        case Noise():  # softplus in three, a normal draw, product, sum
            return 0, 0, 6 * out
        case Normalise(_, _, positions):  # (comparison, product,) sum, quotient
            return 0, 0, (4 if positions else 2) * out
        case SortSlots():  # sort, count, quotient
            return 0, 0, out * (2 + ceil_log2(out))
        case CapacitySlots(_, _, shares):  # sort, search; place, comparison, remainder
            slots = _elements(shares, sizes)
            return 0, 0, slots * ceil_log2(slots) + 3 * out
        case ScatterAdd(_, x):
            return 0, _elements(x, sizes), 0
        case GroupedContract(bias=bias):
            return grouped_macs(op, sizes), out if bias else 0, 0
        case Gather() | Unsort() | Spread() | Select():
            return 0, 0, 0
        case LoadBalance(_, x, positions):  # mean, count, product
            return 0, 0, 2 * _elements(x, sizes) + _elements(positions, sizes)
        case ZLoss(_, x):  # maximum, difference, exponential, sum
            return 0, 0, 4 * _elements(x, sizes)
        case Dropped(_, positions):
            return 0, 0, _elements(positions, sizes)
        case Missed(index=index):  # the sum
            return 0, 0, sizes[index]


def backward(op: RoutingOp, sizes: Sizes, needing: Set[str]) -> tuple[Dim, Dim, Dim]:
    """(matmul MACs, element-wise FLOPs, special FLOPs) of the gradients of the operands in `needing`."""
    out = _elements(op.out, sizes)
    match op:
        case GroupedContract(_, lhs, rhs, bias):
            products = (lhs.name in needing) + (rhs.name in needing)
            return products * grouped_macs(op, sizes), out if bias and bias.name in needing else 0, 0
        case Gather() | CapacitySlots():  # the transpose adds
            return 0, out, 0
        case Noise(_, _, scale):  # ε times the gradient, times the sigmoid in four
            return 0, 0, 5 * out if scale.name in needing else 0
        case Normalise():  # product, sum, difference, quotient
            return 0, 0, 4 * out
        case TopK() | ProductTopK() | PairPositions() | Unsort() | ScatterAdd() | Spread() | Select():
            return 0, 0, 0  # the transpose moves what it is given
        case SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # nobody differentiates them
            return 0, 0, 0
        case _:
            no_rule(op, "the work of its gradients")
