"""The closed set of primitive operations. `tnmoe.backends.numpy.execute` defines what each one computes.

Every op writes one new value, `out`. Index names carry the whole meaning: axes are matched by name, and the
order of a value's indices is its layout in memory. Sizes live in the program, never here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, replace
from typing import Any

from tnmoe.ir.contractions import ContractionOp
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.pointwise_ops import PointwiseOp
from tnmoe.ir.routing_ops import WRITTEN, RoutingOp
from tnmoe.ir.value import Value

Op = ContractionOp | PointwiseOp | RoutingOp | FusedOp


def results(op: Op) -> tuple[Value, ...]:
    """The values that an op writes."""
    return tuple(getattr(op, name) for name in WRITTEN.get(type(op), ("out",)))


def operands(op: Op) -> tuple[Value, ...]:
    """The values that an op reads, in field order."""
    written = results(op)
    values = (getattr(op, f.name) for f in fields(op))
    return tuple(v for v in values if isinstance(v, Value) and v not in written)


def propagate(ops: Iterable[Op], names: Set[str], *, integers: bool = True) -> frozenset[str]:
    """`names`, and the names of every result that depends on one of them (through `integers` or not)."""
    reached = set(names)
    for op in ops:
        if any(v.name in reached for v in operands(op)):
            reached |= {v.name for v in results(op) if integers or not v.integer}
    return frozenset(reached)


def rename(op: Op, change: Mapping[str, Value]) -> Op:
    """The op with every value that `change` has by name replaced."""
    values = {f.name: v for f in fields(op) if isinstance(v := getattr(op, f.name), Value)}
    new: dict[str, Any] = {field: change[v.name] for field, v in values.items() if v.name in change}
    return replace(op, **new)
