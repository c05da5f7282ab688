"""Separate what depends on weights alone, which can be made once, from what every call has to do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tnmoe.initialise import Zeros
from tnmoe.layer import Parameter
from tnmoe.network import Role
from tnmoe.ops import Op, Value, operands, results
from tnmoe.program import Program, needed


@dataclass(frozen=True, slots=True)
class Folded:
    """A program in two parts.

    Attributes:
        once: ops that read weights and each other's results alone.
        each: the rest. Its parameters are what it reads of the weights and of what `once` makes; none is trained.
    """

    once: tuple[Op, ...]
    each: Program

    @property
    def read(self) -> tuple[Value, ...]:
        """The values that exist before `once` and that it, or the module of `each`, takes over."""
        made = {v.name for op in self.once for v in results(op)}
        kept = [Value(p.name, p.indices, p.part) for p in (*self.each.parameters, *self.each.buffers)]
        found = [v for op in self.once for v in operands(op)] + kept
        return tuple({v.name: v for v in found if v.name not in made}.values())


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
    each = replace(program, parameters=tuple(parameters), buffers=buffers, ops=rest, drops={}, diagnostics=beside)
    return Folded(once, each)
