"""Fuse a contraction and the bias added to its result into one op, which runs as one `addmm`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tnmoe.ir.contractions import Add, Contract, ContractAdd
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.program import Program


def fuse_bias(program: Program) -> Program:
    """The program with every addition that a matrix product can take along fused into it: see `fused`."""
    return replace(program, ops=fused(program.ops, frozenset([program.output.name])))


def fused(ops: tuple[Op, ...], wanted: frozenset[str]) -> tuple[Op, ...]:
    """Replace `v = lhs @ rhs; out = v + bias` by one `ContractAdd` wherever `v` has no other use.

    Only a plain (unbatched) matrix product takes a bias, and the bias must broadcast over whole rows: its
    indices are those of one operand alone, or those of the result.

    Args:
        ops: in order of execution.
        wanted: names of the results that are used afterwards.
    """
    uses = Counter(v.name for op in ops for v in operands(op))
    uses.update(wanted)
    products = {op.out.name: op for op in ops if isinstance(op, Contract)}
    gone: set[str] = set()
    kept: list[Op] = []
    for op in ops:
        if isinstance(op, Add) and (product := products.get(op.lhs.name)) and uses[op.lhs.name] == 1:
            lhs, rhs, bias = set(product.lhs.indices), set(product.rhs.indices), set(op.rhs.indices)
            unbatched = not lhs & rhs & set(product.out.indices)
            if unbatched and bias in (lhs - rhs, rhs - lhs, lhs ^ rhs):
                kept.append(ContractAdd(op.out, product.lhs, product.rhs, op.rhs))
                gone.add(product.out.name)
                continue
        kept.append(op)
    return tuple(op for op in kept if op.out.name not in gone)
