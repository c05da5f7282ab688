"""Separate what depends on weights alone, which can be made once, from what every call has to do."""

from __future__ import annotations

from dataclasses import replace

from tnmoe.ir.dataflow import needed
from tnmoe.ir.initialise import Zeros
from tnmoe.ir.ops import operands, results
from tnmoe.ir.program import Folded, Program
from tnmoe.ir.value import Parameter, Role


def fold_weights(program: Program) -> Folded:
    """Split a program that is laid out; running `once` and then `each` gives what it gives."""
    alone = program.weight_only
    once = tuple(op for op in program.ops if op.out.name in alone)
    rest = tuple(op for op in program.ops if op.out.name not in alone)
    beside = needed(program.diagnostics, program.coefficients)
    read = {v.name for op in rest + beside for v in operands(op)} | {program.output.name}
    made = [v for op in once for v in results(op) if v.name in read]
    parameters = [replace(p, role=Role.FROZEN) for p in program.parameters if p.name in read]
    # What is made is stored, never drawn: how it starts has no meaning.
    parameters += [Parameter(v.name, v.indices, Zeros(), v.part, Role.FROZEN) for v in made]
    buffers = tuple(b for b in program.buffers if b.name in read)
    each = replace(program, parameters=tuple(parameters), buffers=buffers, ops=rest, released={}, diagnostics=beside)
    return Folded(once, each)
