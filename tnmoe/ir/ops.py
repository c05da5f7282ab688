"""The closed set of primitive operations. `tnmoe.backends.numpy.execute` defines what each one computes.

Every op writes one new value, `out`. Index names carry the whole meaning: axes are matched by name, and the
order of a value's indices is its layout in memory. Sizes live in the program, never here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any

from tnmoe.ir.contractions import Add, Contract, ContractAdd, Merge, Multiply, Permute, Reduce, Split
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.routing_ops import WRITTEN, RoutingOp
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


# ---- all of them, with those of `tnmoe.ir.routing_ops` and `tnmoe.ir.fused_ops` --------------------------------------

Op = (
    Contract
    | ContractAdd
    | Multiply
    | Add
    | Reduce
    | Permute
    | Split
    | Merge
    | Softmax
    | Entmax15
    | Sparsemax
    | Sigmoid
    | Gelu
    | GeluBackward
    | LayerNorm
    | BatchNorm
    | RoutingOp
    | FusedOp
)


def results(op: Op) -> tuple[Value, ...]:
    """The values that an op writes."""
    return tuple(getattr(op, name) for name in WRITTEN.get(type(op), ("out",)))


def operands(op: Op) -> tuple[Value, ...]:
    """The values that an op reads, in field order."""
    written = results(op)
    found = (getattr(op, f.name) for f in fields(op))
    return tuple(v for v in found if isinstance(v, Value) and v not in written)


def propagate(ops: Iterable[Op], names: Set[str], *, integers: bool = True) -> frozenset[str]:
    """`names`, and the names of every result that depends on one of them (through `integers` or not)."""
    found = set(names)
    for op in ops:
        if any(v.name in found for v in operands(op)):
            found |= {v.name for v in results(op) if integers or not v.integer}
    return frozenset(found)


def rename(op: Op, change: Mapping[str, Value]) -> Op:
    """The op with every value that `change` has by name replaced."""
    found = {f.name: v for f in fields(op) if isinstance(v := getattr(op, f.name), Value)}
    new: dict[str, Any] = {field: change[v.name] for field, v in found.items() if v.name in change}
    return replace(op, **new)
