"""Routing primitives: dispatch, combine, and the products in between that depend on where a token goes.

`tnmoe.backends.numpy.routing` defines what each one computes. Each states its operands' layout: the order in which
a declaration names their indices. Positions and counts are integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from tnmoe.errors import no_rule
from tnmoe.ir.value import Value

# ---- choosing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TopK:
    """The largest entries of `x` along its last axis, `index`, largest first, with their positions.

    `out` and `positions` have a slot index in the place of `index`. Of equal entries the first is taken first, and
    NaN counts as the largest. Over the experts this is token choice, over the tokens expert choice.
    """

    out: Value
    positions: Value
    x: Value
    index: str


@dataclass(frozen=True, slots=True)
class ProductTopK:
    """The largest sums lhs[…, a] + rhs[…, b], with positions a·B + b, never forming all A·B (arXiv 1907.05242).

    Exact: the best k pairs are among the best k of either side. Equal sums come in any order.
    """

    out: Value
    positions: Value
    lhs: Value
    rhs: Value


@dataclass(frozen=True, slots=True)
class PairPositions:
    """Positions lhs·size + rhs in a product of two levels, `rhs` being positions along `index`."""

    out: Value
    lhs: Value
    rhs: Value
    index: str


@dataclass(frozen=True, slots=True)
class Noise:
    """x + softplus(scale) · ε with standard normal ε in training, x in evaluation (arXiv 1701.06538, eq. 4)."""

    out: Value
    x: Value
    scale: Value


@dataclass(frozen=True, slots=True)
class Normalise:
    """x over its sum along the last axis; entries whose `positions` are no position along `index` count as zero.

    A row without any counted entry gives zeros.
    """

    out: Value
    x: Value
    positions: Value | None = None
    index: str = ""


# ---- dispatch and combine ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SortSlots:
    """Rows for the slots (token, choice), sorted by the expert in `positions`, earlier tokens first.

    `out` is the row of each slot, `rows` the token of each row, and `counts` the rows of each expert. With a `block`
    and more than two slots an expert, every expert has a multiple of that many rows, and the last one chosen what is
    left of as many as are always enough (`padded_rows`): rows beyond the slots are token 0 once more.
    """

    out: Value
    rows: Value
    counts: Value
    positions: Value
    block: int = 1


def padded_rows(choices: sympy.Expr, experts: sympy.Expr, block: int) -> sympy.Expr:
    """Rows of a `SortSlots`: each of `experts` may need up to `block` - 1 more than it has slots."""
    many = block * (experts + sympy.floor((choices - experts) / block))
    return choices if block == 1 else sympy.Piecewise((choices, choices <= 2 * experts), (many, True))


@dataclass(frozen=True, slots=True)
class Unsort:
    """The row of `x` of each slot, as `slots` (the result of a `SortSlots`) has them."""

    out: Value
    x: Value
    slots: Value


@dataclass(frozen=True, slots=True)
class CapacitySlots:
    """A table of as many slots for each expert: `rows` are the tokens in it, `out` their shares.

    First choices go before second ones, then earlier tokens before later ones; what finds no place is dropped.
    An empty slot holds token 0 with share 0.
    """

    out: Value
    rows: Value
    shares: Value
    positions: Value


@dataclass(frozen=True, slots=True)
class Gather:
    """The slices of `x` at `positions` along its first axis, `index`: out[p…, …] = x[positions[p…], …].

    `sparse` makes the gradient of a stored `x` a sparse tensor.
    """

    out: Value
    x: Value
    positions: Value
    index: str
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class ScatterAdd:
    """The transpose of `Gather`: out[positions[p…], …] += x[p…, …]; `out` has `index` first."""

    out: Value
    x: Value
    positions: Value
    index: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Entries of `x` (or ones, if it is None) at their `positions` along `index`, the last axis of `out`; else zeros.

    Ones have no gradient.
    """

    out: Value
    x: Value | None
    positions: Value
    index: str


@dataclass(frozen=True, slots=True)
class GroupedContract:
    """Rows of `lhs`, sorted by expert with `counts` rows each, times the matrix of their expert in `rhs`.

    Rows of experts that `rhs` has not (null experts, which come last) give zeros.
    """

    out: Value
    lhs: Value
    rhs: Value
    bias: Value | None
    counts: Value


@dataclass(frozen=True, slots=True)
class Select:
    """The slice of `x` at one `position` along `index`; a view."""

    out: Value
    x: Value
    index: str
    position: int


# ---- diagnostics: scalars beside the forward pass ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadBalance:
    """N Σ_n f_n P_n: share of the choices times mean probability of each expert (arXiv 2101.03961, eq. 4).

    Zero if there is no token, so that a sum of losses stays finite.
    """

    out: Value
    x: Value
    positions: Value


@dataclass(frozen=True, slots=True)
class ZLoss:
    """The mean square of log Σ exp of the logits (arXiv 2202.08906, eq. 5); zero if there is no token."""

    out: Value
    x: Value


@dataclass(frozen=True, slots=True)
class Dropped:
    """How many choices find no place among the slots of the table `rows`."""

    out: Value
    positions: Value
    rows: Value


@dataclass(frozen=True, slots=True)
class Missed:
    """How many places along `index` are at none of the `positions`, e.g. tokens that no expert takes."""

    out: Value
    positions: Value
    index: str


RoutingOp = (
    TopK
    | ProductTopK
    | PairPositions
    | Noise
    | Normalise
    | SortSlots
    | Unsort
    | CapacitySlots
    | Gather
    | ScatterAdd
    | Spread
    | GroupedContract
    | Select
    | LoadBalance
    | ZLoss
    | Dropped
    | Missed
)

WRITTEN: dict[type, tuple[str, ...]] = {
    TopK: ("out", "positions"),
    ProductTopK: ("out", "positions"),
    SortSlots: ("out", "rows", "counts"),
    CapacitySlots: ("out", "rows"),
}
"""Fields that an op writes, where there is more than `out`."""


def fault(op: RoutingOp) -> str | None:
    """What is wrong with the indices of a routing op, if anything."""
    out = op.out.indices
    match op:
        case TopK(_, positions, x, index):
            fits = x.indices[-1:] == (index,) and len(out) == len(x.indices) and out[:-1] == x.indices[:-1]
            return None if fits and positions.indices == out else "the slots do not fit"
        case ProductTopK(_, positions, lhs, rhs):
            fits = lhs.indices[:-1] == rhs.indices[:-1] == out[:-1] and positions.indices == out
            return None if fits else "the slots do not fit"
        case PairPositions(_, lhs, rhs):
            return None if out == lhs.indices + rhs.indices[len(lhs.indices) - 1 :] else "the levels do not fit"
        case Noise(_, x, scale):
            return None if out == x.indices == scale.indices else "the indices differ"
        case Normalise(_, x, positions):
            fits = out == x.indices and (positions is None or positions.indices == out)
            return None if fits else "the indices differ"
        case SortSlots(_, rows, counts, positions):
            lists = [len(v.indices) for v in (op.out, rows, counts)]
            fits = lists == [1, 1, 1] and len(positions.indices) == 2
            return None if fits else "one list of slots, one of rows, and one count for each expert"
        case Unsort(_, x, slots):
            fits = len(slots.indices) == 1 and len(x.indices) == 2 and len(out) == 3
            return None if fits and out[2:] == x.indices[1:] else "the rows do not fit"
        case CapacitySlots(_, rows, shares, positions):
            fits = len(out) == 2 and rows.indices == out and shares.indices == positions.indices
            return None if fits else "the slots do not fit"
        case Gather(_, x, positions, index):
            fits = x.indices[:1] == (index,) and out == positions.indices + x.indices[1:]
            return None if fits else "the result is not the positions and the rest"
        case ScatterAdd(_, x, positions, index):
            fits = out[:1] == (index,) and x.indices == positions.indices + out[1:]
            return None if fits else "the operand is not the positions and the rest"
        case Spread(_, x, positions, index):
            fits = out == (*positions.indices[:-1], index) and (x is None or x.indices == positions.indices)
            return None if fits else "the slots do not fit"
        case GroupedContract(_, lhs, rhs, bias, counts):
            row, i = lhs.indices
            n, *matrix = rhs.indices
            fits = matrix == [i, out[-1]] and out[0] == row and len(counts.indices) == 1
            return None if fits and (bias is None or bias.indices == (n, out[-1])) else "is no product of rows"
        case Select(_, x, index):
            return None if out == tuple(i for i in x.indices if i != index) else "the rest does not fit"
        case LoadBalance() | ZLoss() | Dropped() | Missed():
            return None if not out else "is a scalar"
        case _:
            no_rule(op, "its indices")
