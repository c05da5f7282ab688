"""Remove what nobody needs: ops that change nothing, and ops whose results are never read."""

from __future__ import annotations

from dataclasses import replace

from tnmoe.ir.contractions import Merge, Permute, Split
from tnmoe.ir.dataflow import needed
from tnmoe.ir.ops import Op, operands, rename
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value


def prune(program: Program) -> Program:
    """The program without identities (see `bypass`) and without what its results do not depend on.

    Its results are the output, the expert coefficients and what the diagnostics read.
    """
    program = bypass(program)
    read = {v.name for op in program.diagnostics for v in operands(op)}
    return replace(program, ops=needed(program.ops, {program.output.name, *program.coefficients, *read}))


def bypass(program: Program) -> Program:
    """The program whose readers of an identity read its operand instead; before layouts are assigned.

    Identities are a change of the order of axes, which has no meaning yet, and axes split and merged again (or merged
    and split again) without padding. One that makes the output or expert coefficients stays: it is their name.
    """
    known = {program.output.name, *program.coefficients}
    made: dict[str, Op] = {}
    same: dict[str, Value] = {}

    def visit(op: Op) -> Op:
        op = rename(op, same)
        source = _source(op, made)
        if source is not None and op.out.name not in known:
            same[op.out.name] = replace(source, indices=op.out.indices)  # the order that readers ask for
        made[op.out.name] = op
        return op

    ops = tuple(map(visit, program.ops))
    return replace(program, ops=ops, diagnostics=tuple(map(visit, program.diagnostics)))


def _source(op: Op, made: dict[str, Op]) -> Value | None:
    """The value that the op's result is equal to; None if it computes something."""
    if isinstance(op, Permute):
        return op.x
    if isinstance(op, Split | Merge):
        before = made.get(op.x.name)
        undone = Merge if isinstance(op, Split) else Split
        if isinstance(before, undone) and (before.index, before.parts) == (op.index, op.parts):
            return None if before.padded or op.padded else before.x
    return None
