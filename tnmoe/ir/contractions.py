"""Ops of contractions: products, sums and changes of axes, and what matrix product each one is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tnmoe.errors import no_rule
from tnmoe.ir.value import Value

# ---- multilinear ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contract:
    """Product of two values, summed over the shared indices that `out` lacks (at least one)."""

    out: Value
    lhs: Value
    rhs: Value


@dataclass(frozen=True, slots=True)
class ContractAdd:
    """`Contract`, plus a bias that broadcasts over the indices it lacks."""

    out: Value
    lhs: Value
    rhs: Value
    bias: Value


@dataclass(frozen=True, slots=True)
class Multiply:
    """Broadcasting product of two values; nothing is summed (Hadamard and outer products)."""

    out: Value
    lhs: Value
    rhs: Value


@dataclass(frozen=True, slots=True)
class Add:
    """Broadcasting sum of two values."""

    out: Value
    lhs: Value
    rhs: Value


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sum over the indices that `out` lacks."""

    out: Value
    x: Value


@dataclass(frozen=True, slots=True)
class Permute:
    """The same indices in another memory order: a copy."""

    out: Value
    x: Value


# ---- views of axes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """`x` with `index` replaced by `parts`, the first of which varies slowest: a view.

    With `padded` the parts may have more entries than the index; the surplus is zero, which makes it a copy.
    """

    out: Value
    x: Value
    index: str
    parts: tuple[str, ...]
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Merge:
    """`x` with `parts` replaced by the one index that they make up, the inverse of `Split`: a view.

    With `padded` the entries that the parts have beyond the index are cut off.
    """

    out: Value
    x: Value
    index: str
    parts: tuple[str, ...]
    padded: bool = False


def split_order(order: tuple[str, ...], op: Split | Merge) -> tuple[str, ...]:
    """`order`, in which the index stands, with the parts in its place."""
    at = order.index(op.index)
    return (*order[:at], *op.parts, *order[at + 1 :])


def merged_order(order: tuple[str, ...], op: Split | Merge) -> tuple[str, ...]:
    """`order`, in which the parts stand (anywhere), with the index in the place of the first that is met."""
    at = min(order.index(p) for p in op.parts)
    rest = [i for i in order[at:] if i not in op.parts]
    return (*order[:at], op.index, *rest)


# ---- how a contraction maps onto a matrix product -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MatmulGroups:
    """Index groups of a contraction: `out[batch, rows, cols] = lhs[batch, rows, inner] @ rhs[batch, inner, cols]`.

    With `outer`, and then without `batch`, `lhs` is broadcast: `out[outer, rows, cols] = lhs[rows, inner] @
    rhs[outer, inner, cols]`, one product for each item of the axes in front. So a mode in the middle of a tensor is
    multiplied by a matrix where it lies.
    """

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    inner: tuple[str, ...]
    cols: tuple[str, ...]
    outer: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The groups of indices that are one axis each in the product."""
        return (*((i,) for i in self.batch), *((self.outer,) if self.outer else ()), self.rows, self.cols)


def matmul_groups(op: Contract | ContractAdd) -> MatmulGroups:
    """The groups of a contraction, each in the order of `lhs` (columns: of `rhs`); `outer` if it is laid out so."""
    g = index_groups(op)
    if isinstance(op, ContractAdd) or g.batch or not g.rows or not g.inner:
        return g
    start = min(map(op.rhs.indices.index, g.inner))
    outer, cols = g.cols[:start], g.cols[start:]
    broadcast = (
        bool(outer and cols)
        and op.lhs.indices in (g.rows + g.inner, g.inner + g.rows)
        and op.rhs.indices == outer + g.inner + cols
        and op.out.indices == outer + g.rows + cols
    )
    return replace(g, outer=outer, cols=cols) if broadcast else g


def index_groups(op: Contract | ContractAdd) -> MatmulGroups:
    """The groups of a contraction, laid out or not; `outer` is empty."""
    lhs, rhs, out = op.lhs.indices, op.rhs.indices, op.out.indices
    return MatmulGroups(
        batch=tuple(i for i in lhs if i in rhs and i in out),
        rows=tuple(i for i in lhs if i not in rhs),
        inner=tuple(i for i in lhs if i in rhs and i not in out),
        cols=tuple(i for i in rhs if i not in lhs),
    )


def is_matmul(op: Contract | ContractAdd) -> bool:
    """True if the layouts allow one matrix product over views: nothing has to be copied."""
    g = matmul_groups(op)
    return bool(g.outer) or (
        op.lhs.indices in (g.batch + g.rows + g.inner, g.batch + g.inner + g.rows)
        and op.rhs.indices in (g.batch + g.inner + g.cols, g.batch + g.cols + g.inner)
        and op.out.indices == g.batch + g.rows + g.cols
    )


def is_subsequence(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    """True if `part` is `whole` with some entries left out."""
    remaining = iter(whole)
    return all(i in remaining for i in part)


# ---- what is well formed -------------------------------------------------------------------------------------

ContractionOp = Contract | ContractAdd | Multiply | Add | Reduce | Permute | Split | Merge


def fault(op: ContractionOp, *, laid_out: bool) -> str | None:
    """The rule that an op breaks; None if it breaks none.

    With `laid_out`, also that every contraction is a matrix product over views, and that no broadcast transposes.
    """
    out = op.out.indices
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
            return _contraction_fault(op, lhs, rhs, laid_out=laid_out)
        case Multiply(_, lhs, rhs) | Add(_, lhs, rhs):
            if set(out) != set(lhs.indices) | set(rhs.indices):
                return "the result's indices are not the union"
            views = is_subsequence(lhs.indices, out) and is_subsequence(rhs.indices, out)
            return None if views or not laid_out else "an operand is transposed"
        case Reduce(_, x):
            if not set(out) < set(x.indices):
                return "nothing is reduced"
            return None if is_subsequence(out, x.indices) or not laid_out else "the result is transposed"
        case Permute(_, x):
            return None if sorted(out) == sorted(x.indices) else "the indices differ"
        case Split(_, x, index, _):
            split = split_order(x.indices, op) if index in x.indices else ()
            return None if _fits(out, split, laid_out=laid_out) else "the parts do not fit"
        case Merge(_, x, index, _):
            split = split_order(out, op) if index in out else ()
            return None if _fits(x.indices, split, laid_out=laid_out) else "the parts do not fit"
        case _:
            no_rule(op, "its indices")


def _contraction_fault(op: Contract | ContractAdd, lhs: Value, rhs: Value, *, laid_out: bool) -> str | None:
    out, shared = op.out.indices, set(lhs.indices) & set(rhs.indices)
    joint = set(lhs.indices) | set(rhs.indices)
    if not shared - set(out):
        return "sums no shared index"
    if not joint - shared <= set(out) <= joint:
        return "an index of one operand alone is summed"
    if isinstance(op, ContractAdd):
        if not set(op.bias.indices) <= set(out):
            return "the bias has an index that the result lacks"
        if laid_out and not is_subsequence(op.bias.indices, out):
            return "the bias is transposed"
    return "is no matrix product over views" if laid_out and not is_matmul(op) else None


def _fits(order: tuple[str, ...], wanted: tuple[str, ...], *, laid_out: bool) -> bool:
    return order == wanted or (not laid_out and sorted(order) == sorted(wanted))
