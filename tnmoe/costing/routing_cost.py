"""What a routing primitive costs, forward and backward, and what its backward pass keeps.

Conventions are those of `tnmoe.costing.op_cost`; what is kept is what autograd keeps of the emitted functions.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import cast

import sympy

from tnmoe.costing.cost import Cost, Inside, Sizes
from tnmoe.errors import no_rule
from tnmoe.ir.aliases import sorted_in_place
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import results
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


def grouped_macs(op: GroupedContract, sizes: Sizes) -> Dim:
    """Rows times the matrix of one expert. With null experts: the expected rows, if all experts are chosen alike."""
    rows, inner = (sizes[i] for i in op.lhs.indices)
    true, counted = sizes[op.rhs.indices[0]], sizes[op.counts.indices[0]]
    if op.rhs.indices[0] != op.counts.indices[0]:
        rows = rows * true // counted if isinstance(rows, int) else sympy.floor(rows * true / counted)
    return rows * inner * sizes[op.out.indices[-1]]


def forward(op: RoutingOp, sizes: Sizes) -> Cost:
    """Work and result of one op."""
    work = _work(op, sizes)
    written = (
        0 if isinstance(op, Select) else sum((elements(v.indices, sizes) for v in results(op)), start=cast(Dim, 0))
    )
    return replace(work, matmul_flops=2 * work.macs, activations=written)


def _work(op: RoutingOp, sizes: Sizes) -> Cost:
    out = elements_of(op.out, sizes)
    match op:
        case TopK(_, _, x, index):  # a sort
            return Cost(special_flops=elements_of(x, sizes) * ceil_log2(sizes[index]))
        case ProductTopK(out=value, lhs=lhs, rhs=rhs):  # two partial sorts, all pairs of the best, a third
            slots = sizes[value.indices[-1]]
            sides = sum(elements_of(v, sizes) * ceil_log2(sizes[v.indices[-1]]) for v in (lhs, rhs))
            return Cost(special_flops=sides + out * slots * (1 + ceil_log2(slots * slots)))
        case PairPositions():  # product, sum
            return Cost(special_flops=2 * out)
        case Noise():  # softplus in three, a normal draw, product, sum
            return Cost(special_flops=6 * out)
        case Normalise(_, _, positions):  # (comparison, product,) sum, quotient
            return Cost(special_flops=(4 if positions else 2) * out)
        case SortSlots():  # sort, count, quotient
            return Cost(special_flops=out * (2 + ceil_log2(out)))
        case CapacitySlots(_, _, shares):  # sort, search; place, comparison, remainder
            slots = elements_of(shares, sizes)
            return Cost(special_flops=slots * ceil_log2(slots) + 3 * out)
        case ScatterAdd(_, x):
            return Cost(elementwise_flops=elements_of(x, sizes))
        case GroupedContract(bias=bias):
            return Cost(macs=grouped_macs(op, sizes), elementwise_flops=out if bias else 0)
        case Gather() | Unsort() | Spread() | Select():
            return Cost()
        case LoadBalance(_, x, positions):  # mean, count, product
            return Cost(special_flops=2 * elements_of(x, sizes) + elements_of(positions, sizes))
        case ZLoss(_, x):  # maximum, difference, exponential, sum
            return Cost(special_flops=4 * elements_of(x, sizes))
        case Dropped(_, positions):
            return Cost(special_flops=elements_of(positions, sizes))
        case Missed(index=index):  # the sum
            return Cost(special_flops=sizes[index])
        case _:
            no_rule(op, "its cost")


def backward(op: RoutingOp, sizes: Sizes, requires_grad: Set[str]) -> Cost:
    """Work of the gradients of the operands in `requires_grad`, of which there is one."""
    work = _work_of_gradients(op, sizes, requires_grad)
    return replace(work, matmul_flops=2 * work.macs)


def _work_of_gradients(op: RoutingOp, sizes: Sizes, requires_grad: Set[str]) -> Cost:
    out = elements_of(op.out, sizes)
    match op:
        case GroupedContract(_, lhs, rhs, bias):
            products = (lhs.name in requires_grad) + (rhs.name in requires_grad)
            return Cost(
                macs=products * grouped_macs(op, sizes),
                elementwise_flops=out if bias and bias.name in requires_grad else 0,
            )
        case Gather() | CapacitySlots():  # the transpose adds
            return Cost(elementwise_flops=out)
        case Noise(_, _, scale):  # ε times the gradient, times the sigmoid in four
            return Cost(special_flops=5 * out if scale.name in requires_grad else 0)
        case Normalise():  # product, sum, difference, quotient
            return Cost(special_flops=4 * out)
        case TopK() | ProductTopK() | PairPositions() | Unsort() | ScatterAdd() | Spread() | Select():
            return Cost()  # the transpose moves what it is given
        case SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # nobody differentiates them
            return Cost()
        case _:
            no_rule(op, "the work of its gradients")


def saved(op: RoutingOp, sizes: Sizes, requires_grad: Set[str]) -> tuple[Value, ...]:
    """Operands and results that the backward of `op` reads."""
    match op:
        case GroupedContract(_, lhs, rhs):
            return tuple(v for v, other in ((lhs, rhs), (rhs, lhs)) if other.name in requires_grad)
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
            return (scale,) if scale.name in requires_grad else ()
        case TopK() | ProductTopK() | Normalise() | CapacitySlots() | Select():  # see `inside`
            return ()
        case PairPositions() | SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # no gradient passes
            return ()
        case _:
            no_rule(op, "what its backward pass reads")


def inside(op: RoutingOp, sizes: Sizes, requires_grad: Set[str]) -> Inside:
    """What the backward of `op` keeps besides values of the program; some operand is in `requires_grad`."""
    out = elements_of(op.out, sizes)
    match op:
        case TopK(_, _, x):  # the whole order of its sort, if that is no value
            return Inside("order of the sort", integers=0 if sorted_in_place(op, sizes) else elements_of(x, sizes))
        case ProductTopK(_, _, lhs, rhs):  # of either side, and of their pairs
            sides = [best(op, v, sizes) for v in (lhs, rhs) if v.name in requires_grad]
            return Inside("positions of the best of either side, and of their pairs", integers=sum(sides, start=out))
        case Noise(_, _, scale):  # what was drawn
            return Inside("what was drawn", out if scale.name in requires_grad else 0)
        case Normalise(_, x, positions):  # the sums, and which are 0; what is counted, and the products with that
            sums = elements(x.indices[:-1], sizes)
            what = "what is divided by, and whether it was 0"
            if positions is None:
                return Inside(what, sums, flags=sums)
            return Inside(f"{what}; what counts, and the products with that", out + sums, flags=out + sums)
        case CapacitySlots():  # the choice in each slot, and whether there is one
            return Inside("the choice in each slot, and whether there is one", integers=out, flags=out)
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
    return elements(side.indices[:-1], sizes) * fewer


def chosen_slices(op: RoutingOp, name: str, sizes: Sizes) -> Dim | None:
    """How many slices of the value `name` an op reads at most, if it reads but those that its tokens choose."""
    match op:
        case GroupedContract(lhs=lhs, rhs=rhs, bias=bias) if name in (rhs.name, bias.name if bias else None):
            return least(sizes[rhs.indices[0]], sizes[lhs.indices[0]])
        case Gather(x=x, positions=positions, index=index) if name == x.name:
            return least(sizes[index], elements_of(positions, sizes))
        case _:
            return None


def least(a: Dim, b: Dim) -> Dim:
    """The smaller of two sizes."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else cast(Dim, sympy.Min(a, b))


def elements_of(value: Value, sizes: Sizes) -> Dim:
    """Elements of a value."""
    return elements(value.indices, sizes)
