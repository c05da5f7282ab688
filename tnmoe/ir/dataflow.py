"""Which value needs which, when ops run, and whose memory a value is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from tnmoe.ir.contractions import (
    Merge,
    Split,
)
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Noise, Select
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


def gate_ops(program: Program) -> tuple[Op, ...]:
    """The ops that the expert coefficients depend on, in order; they run first, in a function of their own.

    None if what runs later reads more of what they make than the coefficients, or coefficients are made beside the
    forward pass: then all ops are in one function.
    """
    found = needed(program.ops, program.coefficients)
    if any(v.name in program.coefficients for op in program.diagnostics for v in results(op)):
        return ()
    inside = {v.name for op in found for v in results(op)} - set(program.coefficients)
    later = [op for op in program.ops if op not in found]
    return () if any(v.name in inside for op in later for v in operands(op)) else found


def needed(ops: Sequence[Op], names: Iterable[str]) -> tuple[Op, ...]:
    """The ops that the values `names` depend on, in order."""
    wanted = set(names)
    found: list[Op] = []
    for op in reversed(ops):
        if any(v.name in wanted for v in results(op)):
            found.append(op)
            wanted |= {v.name for v in operands(op)}
    return tuple(reversed(found))


def execution_order(program: Program) -> tuple[Op, ...]:
    """The ops as the emitted code runs them: those of the gates first."""
    first = gate_ops(program)
    return first + tuple(op for op in program.ops if op not in first)


def memory_owners(program: Program, *, evaluation: bool = False) -> dict[str, str]:
    """The value whose memory each value is: its own, but for views and what is written over an operand.

    In evaluation noise leaves its operand as it is.
    """
    found = {v.name: v.name for v in program.leaves}
    for op in program.ops:
        view = is_view(op) or op.out.name in program.overwrites or (evaluation and isinstance(op, Noise))
        found |= {v.name: found[operands(op)[0].name] if view else v.name for v in results(op)}
    return found


def elements(indices: tuple[str, ...], sizes: Mapping[str, Dim]) -> Dim:
    """Number of elements of a value with these indices."""
    return cast(Dim, math.prod([sizes[i] for i in indices]))


def is_view(op: Op) -> bool:
    """True if the op writes nothing: its result is its operand's memory."""
    return isinstance(op, Merge | Select) or (isinstance(op, Split) and not op.padded)


def joint_indices(lhs: Value, rhs: Value) -> tuple[str, ...]:
    """Every index of two values once."""
    known = lhs.indices
    return known + tuple([i for i in rhs.indices if i not in known])
