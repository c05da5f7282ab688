"""Compute once what is written twice: common subexpressions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from tnmoe.ir.contractions import Add, Contract, Multiply, Reduce
from tnmoe.ir.ops import Op, rename, results
from tnmoe.ir.pointwise_ops import BatchNorm
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Noise
from tnmoe.ir.value import Value

COMMUTATIVE = (Contract, Multiply, Add)

APART = (Noise, BatchNorm, Reduce)
"""Ops that draw numbers or move running statistics, which run twice are not what they are once; and sums, of which a
folded bias repeats some that planners price as they are lowered: an order's price has to be its program's."""


def share(program: Program) -> Program:
    """The program without the ops that compute what an earlier op has computed; their results are read there.

    The output and the expert coefficients keep ops of their own, since callers know them by name. Before layouts are
    assigned: values are told apart by their sets of indices, and each reader goes on naming the order that it wants.
    """
    known = {program.output.name, *program.coefficients}
    first: dict[tuple[object, ...], Op] = {}
    same: dict[str, Value] = {}

    def shared(ops: Iterable[Op]) -> tuple[Op, ...]:
        kept: list[Op] = []
        for op in (rename(op, same) for op in ops):
            earlier = first.setdefault(_meaning(op), op)
            if earlier is op or isinstance(op, APART) or known & {v.name for v in results(op)}:
                kept.append(op)
            else:
                pairs = zip(results(op), results(earlier), strict=True)
                same.update({v.name: replace(w, indices=v.indices) for v, w in pairs})
        return tuple(kept)

    return replace(program, ops=shared(program.ops), diagnostics=shared(program.diagnostics))


def _meaning(op: Op) -> tuple[object, ...]:
    """Equal for two ops that compute the same: kind, operands, axes of the results, and everything else they hold."""
    written = results(op)
    read: list[object] = []
    for f in fields(op):
        held = getattr(op, f.name)
        if held not in written:
            read.append(held.name if isinstance(held, Value) else held)
    if isinstance(op, COMMUTATIVE):
        read.sort(key=str)
    return type(op), *read, *(frozenset(v.indices) for v in written)
