"""Which value needs which, when ops run, and how many elements a value has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


def gate_ops(program: Program) -> tuple[Op, ...]:
    """The ops that the expert coefficients depend on, in order; they run first, in a function of their own.

    None if what runs later reads more of what they make than the coefficients, or coefficients are made beside the
    forward pass: then all ops are in one function.
    """
    gates = needed(program.ops, program.coefficients)
    if any(v.name in program.coefficients for op in program.diagnostics for v in results(op)):
        return ()
    inside = {v.name for op in gates for v in results(op)} - set(program.coefficients)
    later = [op for op in program.ops if op not in gates]
    return () if any(v.name in inside for op in later for v in operands(op)) else gates


def needed(ops: Sequence[Op], names: Iterable[str]) -> tuple[Op, ...]:
    """The ops that the values `names` depend on, in order."""
    wanted = set(names)
    chosen: list[Op] = []
    for op in reversed(ops):
        if any(v.name in wanted for v in results(op)):
            chosen.append(op)
            wanted |= {v.name for v in operands(op)}
    return tuple(reversed(chosen))


def elements(indices: tuple[str, ...], sizes: Mapping[str, Dim]) -> Dim:
    """Number of elements of a value with these indices."""
    return cast(Dim, math.prod([sizes[i] for i in indices]))


def joint_indices(lhs: Value, rhs: Value) -> tuple[str, ...]:
    """Every index of two values once."""
    known = lhs.indices
    return known + tuple([i for i in rhs.indices if i not in known])
