"""Which bytes a routing primitive takes and gives back while it runs, statement by statement of the emitted functions.

The scripts follow `backends/runtime/routing_functions.py` and `backends/runtime/grouped_matmul.py` (its loop over
experts), and what autograd does backwards with each statement. What depends on the load of the experts is counted for
the load of `LOAD`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from tnmoe.costing import routing_saved
from tnmoe.errors import no_rule
from tnmoe.footprint.timeline import Script, entries, lines, size, whole
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
from tnmoe.ir.value import INTEGER_BYTES, Value
from tnmoe.symbolic.dims import Dim

LOAD = (
    "Products of sorted rows are counted as the loop over experts makes them, with all experts chosen alike and no "
    "null one chosen; any other load needs as much in the forward pass, and in the backward pass no more (but for "
    "matrices of a few entries, of which fewer rows than experts choose the same). "
    "Not counted: what compiled modules, and the kernel for all experts at once (bfloat16 on CUDA), allocate instead."
)

Sizes = Mapping[str, Dim]
INT = INTEGER_BYTES


def forward(op: RoutingOp, sizes: Sizes, item: int, needing: Set[str], *, evaluation: bool) -> Script:
    """As `tnmoe.footprint.allocations.forward_script`."""
    out = size(op.out, sizes, item)
    kept = any(v.name in needing for v in _read(op))
    match op:
        case TopK(_, positions, x):
            full, ints = size(x, sizes, item), INT * entries(x.indices, sizes)
            if routing_saved.sorted_in_place(op, sizes):
                return full, ints
            return full, ints, out, size(positions, sizes, item), -full, 0 if kept else -ints
        case ProductTopK():
            return _product_top_k(op, sizes, item, needing)
        case PairPositions(_, lhs):  # product, sum
            product = size(lhs, sizes, item)
            return product, out, -product
        case Noise(_, _, scale):  # softplus, draw, product, sum
            drawn = 0 if scale.name in needing else -out
            return () if evaluation else (out, out, out, -out, drawn, out, -out)
        case Normalise():
            return _normalise(op, sizes, item, kept=kept)
        case SortSlots():
            return _sort_slots(op, sizes)
        case CapacitySlots():
            return _capacity_slots(op, sizes, item, kept=kept)
        case ScatterAdd() | Spread():  # zeros; the sum, out of place
            return out, out, -out
        case GroupedContract():  # one product for each expert, zeros for the null ones; all of them in one
            return out, out, -out
        case Gather() | Unsort():
            return (out,)
        case Select() | LoadBalance() | ZLoss() | Dropped() | Missed():  # a view; what no pass of a layer computes
            return ()
        case _:
            no_rule(op, "what it allocates")


def backward(op: RoutingOp, sizes: Sizes, item: int, needing: Set[str], stored: Set[str]) -> tuple[Script, ...]:
    """As `tnmoe.footprint.allocations.backward_scripts`.

    All but the first of several scripts also give back what the first has made, and what the op keeps inside.
    """
    out = size(op.out, sizes, item)
    match op:
        case TopK(_, _, x):  # a slice; a scatter, out of place
            full = size(x, sizes, item)
            whole_row = sizes[op.out.indices[-1]] == sizes[op.index]
            scatter = (full, full, -full)
            return (scatter,) if whole_row else ((full,), (*scatter, -full))
        case ProductTopK():
            return _product_top_k_backward(op, sizes, item, needing)
        case Noise(_, _, scale):  # product; the derivative of softplus
            return ((out, -out, out, -out),) if scale.name in needing else ((),)
        case Normalise():
            return _normalise_backward(op, sizes, item)
        case CapacitySlots(_, _, shares):  # where; a sum into the choices, out of place
            full, places = size(shares, sizes, item), entries(op.out.indices, sizes)
            return (item, out, -item), (-places, full, full, -full, -out, -INT * places)
        case Gather(_, x, _, _, sparse):
            full = size(x, sizes, item)
            if sparse:
                return ((),)
            embedded = len(x.indices) == 2 and x.name in stored
            return ((full,),) if embedded else ((full, full, -full),)  # else a sum into zeros, out of place
        case Unsort(_, x):  # a sum into zeros, out of place
            full = size(x, sizes, item)
            return ((full, full, -full),)
        case ScatterAdd(_, x) | Spread(_, Value() as x):
            return ((size(x, sizes, item),),)
        case Select(_, x):
            return ((size(x, sizes, item),),)
        case GroupedContract():
            return _grouped_backward(op, sizes, item, needing)
        case Spread():  # of ones, which need no gradient
            return ((),)
        case PairPositions() | SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # no gradient passes
            return ((),)
        case _:
            no_rule(op, "what its gradients allocate")


def _read(op: RoutingOp) -> Sequence[Value]:
    """Operands that may need a gradient."""
    names = ("x", "lhs", "rhs", "bias", "scale", "shares")
    return [v for name in names if isinstance(v := getattr(op, name, None), Value)]


# ---- choosing ------------------------------------------------------------------------------------------------


def _product_top_k(op: ProductTopK, sizes: Sizes, item: int, needing: Set[str]) -> Script:
    """`product_top_k`: the best of either side, their sums, the best of these; positions on either side."""
    out, ints = size(op.out, sizes, item), size(op.positions, sizes, item)
    a, b = (whole(routing_saved.best(op, v, sizes)) for v in (op.lhs, op.rhs))
    pairs = item * _pairs(op, sizes)
    kept_a, kept_b = (op.lhs.name in needing, op.rhs.name in needing)
    return (
        *(item * a, INT * a, item * b, INT * b),
        *(pairs, out, ints, -pairs),
        *(ints, ints, -ints, ints, -ints),  # on the left: quotient, gather, product
        *(ints, ints, -ints, ints, -2 * ints),  # on the right: remainder, gather; sum
        *(0 if kept_a or kept_b else -ints, -item * (a + b)),
        *(0 if kept_a else -INT * a, 0 if kept_b else -INT * b),
    )


def _pairs(op: ProductTopK, sizes: Sizes) -> int:
    """All pairs of the best."""
    each = lines(op.out, op.out.indices[-1], sizes)
    a, b = (whole(routing_saved.best(op, v, sizes)) for v in (op.lhs, op.rhs))
    return a * b // max(1, each)


def _product_top_k_backward(op: ProductTopK, sizes: Sizes, item: int, needing: Set[str]) -> tuple[Script, ...]:
    """A scatter into the pairs; sums over either side; a scatter into each."""
    pairs, each = item * _pairs(op, sizes), lines(op.out, op.out.indices[-1], sizes)
    ints = size(op.positions, sizes, item)
    parts = {v.name: whole(routing_saved.best(op, v, sizes)) for v in (op.lhs, op.rhs)}
    wanted = [v for v in (op.lhs, op.rhs) if v.name in needing]
    other = {op.lhs.name: op.rhs.name, op.rhs.name: op.lhs.name}
    summed = [0 if parts[other[v.name]] == each else item * parts[v.name] for v in wanted]
    # A sum over one entry is no sum: then the gradient of the pairs is that of the side, and lives as long.
    until = 0 if 0 in summed else -pairs
    after: list[int] = [-ints, *summed, until]
    for v, best in reversed(list(zip(wanted, summed, strict=True))):
        full = size(v, sizes, item)
        after += [full, full, -full, -best, -INT * parts[v.name]]
    return (pairs, pairs, -pairs), tuple(after)


def _normalise(op: Normalise, sizes: Sizes, item: int, *, kept: bool) -> Script:
    """(What is counted, the product with that;) sum, whether it is 0, one instead of 0, quotient."""
    full, sums = entries(op.x.indices, sizes), entries(op.x.indices[:-1], sizes)
    line = item * sums
    masked = (full, item * full, 0 if kept else -full) if op.positions is not None else ()
    unmasked = -item * full if op.positions is not None and not kept else 0
    where = (line, sums, item, line, -item, 0 if kept else -sums)
    return (*masked, *where, item * full, -line, 0 if kept else -line, unmasked)


def _normalise_backward(op: Normalise, sizes: Sizes, item: int) -> tuple[Script, ...]:
    full, sums = size(op.x, sizes, item), entries(op.x.indices[:-1], sizes)
    line = item * sums
    quotient = (full, full, full, full, -3 * full, full, line, -full)  # of the divisor in four; of what is divided
    masked = op.positions is not None
    total = (item, line, -item, -line, -sums)  # where
    added = (full, -full, -line)  # both gradients of x
    product = (full, -full, -full // item) if masked else ()
    return quotient, (-line, -full if masked else 0, *total, *added, *product)


# ---- dispatch ------------------------------------------------------------------------------------------------


def _sort_slots(op: SortSlots, sizes: Sizes) -> Script:
    """`sort_slots`: a sort, counts, the sort of its order, the tokens; `sort_slots_in_blocks` after it."""
    slots, experts = INT * entries(op.positions.indices, sizes), INT * entries(op.counts.indices, sizes)
    total = INT * entries(op.rows.indices, sizes)
    found = (
        *(slots, slots, -slots),  # entries are given back
        *(experts, slots, experts, -experts, -slots),  # zeros, ones, counts
        *(slots, slots, -slots),
        *(slots, -slots),
    )
    choices = slots // INT
    if op.block == 1 or choices <= 2 * (experts // INT):
        return found
    last = (experts // INT, experts, INT, experts, -INT, -experts // INT, -experts, INT, -experts)
    return (
        *found,
        *(experts, experts, -experts, experts, -experts, experts, -experts),  # padded
        *last,
        *(INT, INT, -INT, experts, -INT, -experts),  # what is left
        *(experts, experts, -experts, experts, experts, -experts, experts, -2 * experts),  # before
        *(slots, slots, -2 * slots),  # slots: of these, the rows in front; the sum
        *(total, slots, slots, -slots, slots, -slots, total, -total, -slots),
        *(-slots, -experts, -INT, -experts),
    )


def _capacity_slots(op: CapacitySlots, sizes: Sizes, item: int, *, kept: bool) -> Script:
    """`capacity_slots`: a sort; where each expert's choices start; the choice in each slot; its share and token."""
    tokens, choices = (whole(sizes[i]) for i in op.positions.indices)
    experts, width = (whole(sizes[i]) for i in op.out.indices)
    places, slots = experts * width, tokens * choices
    copied = 0 if 1 in (tokens, choices) else 1  # a transpose of one row is a view
    chosen, order, ends, table = INT * slots * copied, INT * slots, INT * experts, INT * places
    shares = item * slots * copied
    return (
        chosen,
        *(order, order, -order),
        *(order, ends, ends, -order, -ends),
        *(INT, ends, -INT),
        *(INT * width, table, -INT * width),
        places,
        *(table, table, -table, -table),
        *(shares, item * places, -shares, item, item * places, -item, -item * places),
        *(table, INT, table, -INT, -table),
        *(-chosen, -order, -2 * ends),
        *(() if kept else (-table, -places)),
    )


# ---- products of rows ----------------------------------------------------------------------------------------


def _grouped_backward(op: GroupedContract, sizes: Sizes, item: int, needing: Set[str]) -> tuple[Script, ...]:
    """The products of each expert, the last one first; then the gradients of the slices in one, of rows at the end."""
    of_rows = size(op.lhs, sizes, item) if op.lhs.name in needing else 0
    experts = whole(sizes[op.rhs.indices[0]])
    of_weight = size(op.rhs, sizes, item) if op.rhs.name in needing else 0
    of_bias = size(op.bias, sizes, item) if op.bias is not None and op.bias.name in needing else 0
    matrix, offset = of_weight // experts, of_bias // experts
    total = whole(sizes[op.lhs.indices[0]])
    script: list[int] = []
    added: list[int] = []  # after the last product
    if total > 2 * whole(sizes[op.counts.indices[0]]):
        script += [of_rows, of_weight, of_bias]
        used = experts
    else:  # a product for each row, whose gradients add up out of place
        row, used = of_rows // max(1, total), min(experts, total)
        for n in reversed(range(used)):
            for again in range(total // experts + (n < total % experts)):
                script += [*added, row, matrix, offset]
                added = [offset, -offset, matrix, -matrix, -offset - matrix] if again else []
    after = added
    for each, every in ((offset, of_bias), (matrix, of_weight)):
        if every:  # a slice without a gradient is a zero, as wide as it has to be
            parts = each * used + item * (experts - used)
            after += [item * (experts - used), every, -parts]
    return tuple(script), (*after, of_rows, -of_rows)
