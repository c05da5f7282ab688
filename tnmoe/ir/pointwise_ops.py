"""Ops on one value, entry by entry or row by row: gates, GELU, norms. Each keeps the indices of its operand."""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.ir.value import Value

# ---- gates (over one index) ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Softmax:
    """exp(x) over its sum along `index`."""

    out: Value
    x: Value
    index: str


@dataclass(frozen=True, slots=True)
class Entmax15:
    """α-entmax with α = 1.5 (Peters et al., 2019, arXiv 1905.05702)."""

    out: Value
    x: Value
    index: str


@dataclass(frozen=True, slots=True)
class Sparsemax:
    """Euclidean projection onto the simplex (Martins & Astudillo, 2016, arXiv 1602.02068)."""

    out: Value
    x: Value
    index: str


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """1 / (1 + exp(-x)), entry by entry."""

    out: Value
    x: Value


# ---- pointwise and norms -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gelu:
    """x · Φ(x), the exact (erf) form."""

    out: Value
    x: Value


@dataclass(frozen=True, slots=True)
class GeluBackward:
    """`grad` times the derivative of `Gelu` at `x`: Φ(x) + x φ(x)."""

    out: Value
    grad: Value
    x: Value


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Zero mean and unit variance over `index`; then, if given, times `weight` plus `bias`."""

    out: Value
    x: Value
    index: str
    weight: Value | None = None
    bias: Value | None = None


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Zero mean and unit variance over all indices but `index`, without affine parameters.

    Training uses the batch's statistics and updates the running `mean` and `var`; evaluation, and a batch of
    fewer than two entries (whose variance says nothing), uses the running ones.
    """

    out: Value
    x: Value
    index: str
    mean: Value
    var: Value


ElementwiseOp = Sigmoid | Gelu | GeluBackward
"""Ops on each entry by itself, in whatever order the entries lie."""

RowwiseOp = Softmax | Entmax15 | Sparsemax | LayerNorm | BatchNorm
"""Ops over one index, which has to be the last in memory."""

PointwiseOp = ElementwiseOp | RowwiseOp


def fault(op: PointwiseOp, *, laid_out: bool) -> str | None:
    """The rule that an op breaks; None if it breaks none. With `laid_out`, the order of indices is that in memory."""
    same = op.x.indices == op.out.indices or (not laid_out and sorted(op.x.indices) == sorted(op.out.indices))
    if isinstance(op, GeluBackward):
        same = op.grad.indices == op.x.indices == op.out.indices
    return None if same else "a pointwise op must keep its indices"
