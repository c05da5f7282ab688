"""Which bytes a routing primitive takes and gives back while it runs, statement by statement of the emitted functions.

The traces follow `backends/runtime/routing_functions.py` and `backends/runtime/grouped_matmul.py` (its loop over
experts), and what autograd does backwards with each statement. What depends on the load of the experts is counted for
the load of `LOAD`.
"""

from __future__ import annotations

from tnmoe.costing.routing_cost import best
from tnmoe.errors import no_rule
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import AllocationTrace
from tnmoe.ir.aliases import sorted_in_place
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

LOAD = (
    "Products of sorted rows are counted as the loop over experts makes them, with all experts chosen alike and no "
    "null one chosen; any other load needs as much in the forward pass, and in the backward pass no more (but for "
    "matrices of a few entries, of which fewer rows than experts choose the same). "
    "Not counted: what compiled modules, and the kernel for all experts at once (bfloat16 on CUDA), allocate instead."
)

INT = INTEGER_BYTES


def forward(op: RoutingOp, tensors: TensorBytes, *, evaluation: bool) -> AllocationTrace:
    """As `tnmoe.footprint.allocations.forward_trace`."""
    out = tensors.of(op.out)
    kept = bool(tensors.wanted(op))
    match op:
        case TopK(_, positions, x):
            full, ints = tensors.of(x), INT * tensors.entries(x.indices)
            if sorted_in_place(op, tensors.program.sizes):
                return full, ints
            return full, ints, out, tensors.of(positions), -full, 0 if kept else -ints
        case ProductTopK():
            return _product_top_k(op, tensors)
        case PairPositions(_, lhs):  # product, sum
            product = tensors.of(lhs)
            return product, out, -product
        case Noise(_, _, scale):  # softplus, draw, product, sum
            drawn = 0 if tensors.needs(scale) else -out
            return () if evaluation else (out, out, out, -out, drawn, out, -out)
        case Normalise():
            return _normalise(op, tensors, kept=kept)
        case SortSlots():
            return _sort_slots(op, tensors)
        case CapacitySlots():
            return _capacity_slots(op, tensors, kept=kept)
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


def backward(op: RoutingOp, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    """As `tnmoe.footprint.allocations.backward_traces`.

    All but the first of several traces also give back what the first has made, and what the op keeps inside.
    """
    out = tensors.of(op.out)
    match op:
        case TopK(_, _, x):  # a slice; a scatter, out of place
            full = tensors.of(x)
            whole_row = tensors.size(op.out.indices[-1]) == tensors.size(op.index)
            scatter = (full, full, -full)
            return (scatter,) if whole_row else ((full,), (*scatter, -full))
        case ProductTopK():
            return _product_top_k_backward(op, tensors)
        case Noise(_, _, scale):  # product; the derivative of softplus
            return ((out, -out, out, -out),) if tensors.needs(scale) else ((),)
        case Normalise():
            return _normalise_backward(op, tensors)
        case CapacitySlots(_, _, shares):  # where; a sum into the choices, out of place
            full, places = tensors.of(shares), tensors.entries(op.out.indices)
            return (tensors.itemsize, out, -tensors.itemsize), (-places, full, full, -full, -out, -INT * places)
        case Gather(_, x, _, _, sparse):
            full = tensors.of(x)
            if sparse:
                return ((),)
            embedded = len(x.indices) == 2 and x.name in tensors.program.stored
            return ((full,),) if embedded else ((full, full, -full),)  # else a sum into zeros, out of place
        case Unsort(_, x):  # a sum into zeros, out of place
            full = tensors.of(x)
            return ((full, full, -full),)
        case ScatterAdd(_, x) | Spread(_, Value() as x):
            return ((tensors.of(x),),)
        case Select(_, x):
            return ((tensors.of(x),),)
        case GroupedContract():
            return _grouped_backward(op, tensors)
        case Spread():  # of ones, which need no gradient
            return ((),)
        case PairPositions() | SortSlots() | LoadBalance() | ZLoss() | Dropped() | Missed():  # no gradient passes
            return ((),)
        case _:
            no_rule(op, "what its gradients allocate")


# ---- gradients that are no arrays of their own -----------------------------------------------------------------


def passes_on(op: RoutingOp, value: Value) -> bool:
    """True if the gradient of an operand is that of the result, the same bytes."""
    # Of a sparse gather these are the rows of the gradient, beside their positions.
    return (isinstance(op, Noise) and value == op.x) or is_sparse(op)


def gradient_order(op: RoutingOp, value: Value) -> tuple[str, ...]:
    """How torch lays out the gradient of an operand: that of `CapacitySlots` as a transpose."""
    return value.indices[::-1] if isinstance(op, CapacitySlots) else value.indices


def copies_gradient(op: RoutingOp, tensors: TensorBytes) -> bool:
    """Whether a gradient of the result that is not laid out as it is has to be copied."""
    return is_sparse(op) or (isinstance(op, Unsort) and all(tensors.size(i) != 1 for i in op.out.indices[:2]))


def reads_to_the_end(op: RoutingOp) -> bool:
    """`TopK` undoes its slice first, for which it needs no positions."""
    return isinstance(op, TopK)


def is_sparse(op: RoutingOp) -> bool:
    """Whether the gradient of what an op reads is a list of rows with their positions."""
    return isinstance(op, Gather) and op.sparse


# ---- choosing ------------------------------------------------------------------------------------------------


def _product_top_k(op: ProductTopK, tensors: TensorBytes) -> AllocationTrace:
    """`product_top_k`: the best of either side, their sums, the best of these; positions on either side."""
    out, ints = tensors.of(op.out), tensors.of(op.positions)
    a, b = (int(best(op, v, tensors.program.sizes)) for v in (op.lhs, op.rhs))
    pairs = tensors.itemsize * _pairs(op, tensors)
    kept_a, kept_b = (tensors.needs(op.lhs), tensors.needs(op.rhs))
    return (
        *(tensors.itemsize * a, INT * a, tensors.itemsize * b, INT * b),
        *(pairs, out, ints, -pairs),
        *(ints, ints, -ints, ints, -ints),  # on the left: quotient, gather, product
        *(ints, ints, -ints, ints, -2 * ints),  # on the right: remainder, gather; sum
        *(0 if kept_a or kept_b else -ints, -tensors.itemsize * (a + b)),
        *(0 if kept_a else -INT * a, 0 if kept_b else -INT * b),
    )


def _pairs(op: ProductTopK, tensors: TensorBytes) -> int:
    """All pairs of the best."""
    each = tensors.lines(op.out, op.out.indices[-1])
    a, b = (int(best(op, v, tensors.program.sizes)) for v in (op.lhs, op.rhs))
    return a * b // max(1, each)


def _product_top_k_backward(op: ProductTopK, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    """A scatter into the pairs; sums over either side; a scatter into each."""
    pairs, each = tensors.itemsize * _pairs(op, tensors), tensors.lines(op.out, op.out.indices[-1])
    ints = tensors.of(op.positions)
    parts = {v.name: int(best(op, v, tensors.program.sizes)) for v in (op.lhs, op.rhs)}
    wanted = [v for v in (op.lhs, op.rhs) if tensors.needs(v)]
    other = {op.lhs.name: op.rhs.name, op.rhs.name: op.lhs.name}
    summed = [0 if parts[other[v.name]] == each else tensors.itemsize * parts[v.name] for v in wanted]
    # A sum over one entry is no sum: then the gradient of the pairs is that of the side, and lives as long.
    until = 0 if 0 in summed else -pairs
    after: list[int] = [-ints, *summed, until]
    for v, of_side in reversed(list(zip(wanted, summed, strict=True))):
        full = tensors.of(v)
        after += [full, full, -full, -of_side, -INT * parts[v.name]]
    return (pairs, pairs, -pairs), tuple(after)


def _normalise(op: Normalise, tensors: TensorBytes, *, kept: bool) -> AllocationTrace:
    """(What is counted, the product with that;) sum, whether it is 0, one instead of 0, quotient."""
    full, sums = tensors.entries(op.x.indices), tensors.entries(op.x.indices[:-1])
    line = tensors.itemsize * sums
    masked = (full, tensors.itemsize * full, 0 if kept else -full) if op.positions is not None else ()
    unmasked = -tensors.itemsize * full if op.positions is not None and not kept else 0
    where = (line, sums, tensors.itemsize, line, -tensors.itemsize, 0 if kept else -sums)
    return (*masked, *where, tensors.itemsize * full, -line, 0 if kept else -line, unmasked)


def _normalise_backward(op: Normalise, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    full, sums = tensors.of(op.x), tensors.entries(op.x.indices[:-1])
    line = tensors.itemsize * sums
    quotient = (full, full, full, full, -3 * full, full, line, -full)  # of the divisor in four; of what is divided
    masked = op.positions is not None
    total = (tensors.itemsize, line, -tensors.itemsize, -line, -sums)  # where
    added = (full, -full, -line)  # both gradients of x
    product = (full, -full, -full // tensors.itemsize) if masked else ()
    return quotient, (-line, -full if masked else 0, *total, *added, *product)


# ---- dispatch ------------------------------------------------------------------------------------------------


def _sort_slots(op: SortSlots, tensors: TensorBytes) -> AllocationTrace:
    """`sort_slots`: a sort, counts, the sort of its order, the tokens; `sort_slots_in_blocks` after it."""
    slots, experts = INT * tensors.entries(op.positions.indices), INT * tensors.entries(op.counts.indices)
    total = INT * tensors.entries(op.rows.indices)
    one_by_one = (
        *(slots, slots, -slots),  # entries are given back
        *(experts, slots, experts, -experts, -slots),  # zeros, ones, counts
        *(slots, slots, -slots),
        *(slots, -slots),
    )
    choices = slots // INT
    if op.block == 1 or choices <= 2 * (experts // INT):
        return one_by_one
    last = (experts // INT, experts, INT, experts, -INT, -experts // INT, -experts, INT, -experts)
    return (
        *one_by_one,
        *(experts, experts, -experts, experts, -experts, experts, -experts),  # padded
        *last,
        *(INT, INT, -INT, experts, -INT, -experts),  # what is left
        *(experts, experts, -experts, experts, experts, -experts, experts, -2 * experts),  # before
        *(slots, slots, -2 * slots),  # slots: of these, the rows in front; the sum
        *(total, slots, slots, -slots, slots, -slots, total, -total, -slots),
        *(-slots, -experts, -INT, -experts),
    )


def _capacity_slots(op: CapacitySlots, tensors: TensorBytes, *, kept: bool) -> AllocationTrace:
    """`capacity_slots`: a sort; where each expert's choices start; the choice in each slot; its share and token."""
    tokens, choices = (tensors.size(i) for i in op.positions.indices)
    experts, width = (tensors.size(i) for i in op.out.indices)
    places, slots = experts * width, tokens * choices
    copied = 0 if 1 in (tokens, choices) else 1  # a transpose of one row is a view
    chosen, order, ends, table = INT * slots * copied, INT * slots, INT * experts, INT * places
    shares = tensors.itemsize * slots * copied
    return (
        chosen,
        *(order, order, -order),
        *(order, ends, ends, -order, -ends),
        *(INT, ends, -INT),
        *(INT * width, table, -INT * width),
        places,
        *(table, table, -table, -table),
        *(
            shares,
            tensors.itemsize * places,
            -shares,
            tensors.itemsize,
            tensors.itemsize * places,
            -tensors.itemsize,
            -tensors.itemsize * places,
        ),
        *(table, INT, table, -INT, -table),
        *(-chosen, -order, -2 * ends),
        *(() if kept else (-table, -places)),
    )


# ---- products of rows ----------------------------------------------------------------------------------------


def _grouped_backward(op: GroupedContract, tensors: TensorBytes) -> tuple[AllocationTrace, ...]:
    """The products of each expert, the last one first; then the gradients of the slices in one, of rows at the end."""
    of_rows = tensors.of(op.lhs) if tensors.needs(op.lhs) else 0
    experts = tensors.size(op.rhs.indices[0])
    of_weight = tensors.of(op.rhs) if tensors.needs(op.rhs) else 0
    of_bias = tensors.of(op.bias) if op.bias is not None and tensors.needs(op.bias) else 0
    matrix, offset = of_weight // experts, of_bias // experts
    total = tensors.size(op.lhs.indices[0])
    trace: list[int] = []
    added: list[int] = []  # after the last product
    if total > 2 * tensors.size(op.counts.indices[0]):
        trace += [of_rows, of_weight, of_bias]
        used = experts
    else:  # a product for each row, whose gradients add up out of place
        row, used = of_rows // max(1, total), min(experts, total)
        for n in reversed(range(used)):
            for again in range(total // experts + (n < total % experts)):
                trace += [*added, row, matrix, offset]
                added = [offset, -offset, matrix, -matrix, -offset - matrix] if again else []
    after = added
    for each, every in ((offset, of_bias), (matrix, of_weight)):
        if every:  # a slice without a gradient is a zero, as wide as it has to be
            parts = each * used + tensors.itemsize * (experts - used)
            after += [tensors.itemsize * (experts - used), every, -parts]
    return tuple(trace), (*after, of_rows, -of_rows)
