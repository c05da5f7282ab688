"""What a well-formed program is: single assignment, use after definition, and each op's indices."""

from __future__ import annotations

from dataclasses import replace

from tnmoe.errors import ProgramError, no_rule
from tnmoe.ir import contractions, fused_ops, pointwise_ops, routing_ops
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value


def verify(program: Program, *, laid_out: bool = False) -> Program:
    """Return `program` if it is well formed, else raise `ProgramError`.

    Checks single assignment, use after definition, and each op's indices. With `laid_out`, also that every
    contraction is a matrix product over views and every broadcast needs no transpose.
    """
    known = {v.name: v for v in program.leaves}
    if len(known) != len(program.leaves):
        raise ProgramError("two leaves share a name")

    def same(defined: Value | None, used: Value) -> bool:
        # Before layouts are assigned a value is a set of indices; afterwards their order is its memory order.
        if defined is None or laid_out:
            return defined == used
        return sorted(defined.indices) == sorted(used.indices)

    def require(condition: bool, op: Op, rule: str) -> None:
        if not condition:
            raise ProgramError(f"{type(op).__name__} -> {op.out.name}: {rule}: {op}")

    for op in program.ops + program.diagnostics:
        for value in operands(op):
            require(same(known.get(value.name), value), op, f"operand {value.name!r} is not defined with these indices")
        for value in results(op):
            require(value.name not in known, op, f"{value.name!r} is defined twice")
            require(all(i in program.sizes for i in value.indices), op, "an index has no size")
            known[value.name] = value
        wrong = _fault(op, program, laid_out=laid_out)
        require(wrong is None, op, wrong or "")
    if not same(known.get(program.output.name), program.output):
        raise ProgramError(f"the output {program.output} is not defined with these indices")
    return program


def _fault(op: Op, program: Program, *, laid_out: bool) -> str | None:
    """The rule of its family that an op breaks; None if it breaks none."""
    if isinstance(op, contractions.ContractionOp):
        return contractions.fault(op, laid_out=laid_out)
    if isinstance(op, pointwise_ops.PointwiseOp):
        return pointwise_ops.fault(op, laid_out=laid_out)
    if isinstance(op, routing_ops.RoutingOp):  # their layout is that of the declaration
        return routing_ops.fault(op) if laid_out else None
    if isinstance(op, fused_ops.FusedOp):
        given = tuple({v.name: v for v in operands(op)}.values())
        inside = replace(program, inputs=given, parameters=(), buffers=(), ops=fused_ops.unfused(op), diagnostics=())
        verify(replace(inside, output=op.out), laid_out=laid_out)
        return fused_ops.fault(op)
    no_rule(op, "its indices")
