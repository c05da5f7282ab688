"""What a well-formed program is: single assignment, use after definition, and each op's indices."""

from __future__ import annotations

from dataclasses import replace

from tnmoe.errors import ProgramError, no_rule
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    is_matmul,
    is_subsequence,
    split_order,
)
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    GeluBackward,
    LayerNorm,
    Op,
    Sigmoid,
    Softmax,
    Sparsemax,
    operands,
    results,
)
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp, fault
from tnmoe.ir.unfused import fault as unfusable
from tnmoe.ir.unfused import unfused
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
        out = op.out.indices
        if isinstance(op, FusedOp):
            given = tuple({v.name: v for v in operands(op)}.values())
            inside = replace(program, inputs=given, parameters=(), buffers=(), ops=unfused(op), diagnostics=())
            verify(replace(inside, output=op.out), laid_out=laid_out)
            wrong = unfusable(op)
            require(wrong is None, op, wrong or "")
            continue
        if isinstance(op, RoutingOp):
            wrong = fault(op) if laid_out else None
            require(wrong is None, op, wrong or "")
            continue
        match op:
            case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
                shared = set(lhs.indices) & set(rhs.indices)
                joint = set(lhs.indices) | set(rhs.indices)
                require(bool(shared - set(out)), op, "sums no shared index")
                require(joint - shared <= set(out) <= joint, op, "an index of one operand alone is summed")
                if isinstance(op, ContractAdd):
                    require(set(op.bias.indices) <= set(out), op, "the bias has an index that the result lacks")
                    require(not laid_out or is_subsequence(op.bias.indices, out), op, "the bias is transposed")
                require(not laid_out or is_matmul(op), op, "is no matrix product over views")
            case Multiply(_, lhs, rhs) | Add(_, lhs, rhs):
                require(set(out) == set(lhs.indices) | set(rhs.indices), op, "the result's indices are not the union")
                views = is_subsequence(lhs.indices, out) and is_subsequence(rhs.indices, out)
                require(not laid_out or views, op, "an operand is transposed")
            case Reduce(_, x):
                require(set(out) < set(x.indices), op, "nothing is reduced")
                require(not laid_out or is_subsequence(out, x.indices), op, "the result is transposed")
            case Permute(_, x):
                require(sorted(out) == sorted(x.indices), op, "the indices differ")
            case Split(_, x, index, _):
                split = split_order(x.indices, op) if index in x.indices else ()
                require(out == split or (not laid_out and sorted(out) == sorted(split)), op, "the parts do not fit")
            case Merge(_, x, index, _):
                split = split_order(out, op) if index in out else ()
                fits = x.indices == split or (not laid_out and sorted(x.indices) == sorted(split))
                require(fits, op, "the parts do not fit")
            case GeluBackward(_, grad, x):
                require(grad.indices == x.indices == out, op, "a pointwise op must keep its indices")
            case Softmax() | Entmax15() | Sparsemax() | Sigmoid() | Gelu() | LayerNorm() | BatchNorm():
                kept = op.x.indices == out or (not laid_out and sorted(op.x.indices) == sorted(out))
                require(kept, op, "a pointwise op must keep its indices")
            case _:
                no_rule(op, "its indices")
    if not same(known.get(program.output.name), program.output):
        raise ProgramError(f"the output {program.output} is not defined with these indices")
    return program
