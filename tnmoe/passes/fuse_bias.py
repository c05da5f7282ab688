"""Fuse a contraction and the bias added to its result into one op, which runs as one `addmm`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tnmoe.ops import Add, Contract, ContractAdd, Op, operands
from tnmoe.program import Program


def fuse_bias(program: Program) -> Program:
    """Replace `v = lhs @ rhs; out = v + bias` by one `ContractAdd` wherever `v` has no other use.

    Only a plain (unbatched) matrix product takes a bias, and the bias must broadcast over whole rows: its
    indices are those of one operand alone, or those of the result.
    """
    uses = Counter(v.name for op in program.ops for v in operands(op))
    uses[program.output.name] += 1
    products = {op.out.name: op for op in program.ops if isinstance(op, Contract)}
    fused: set[str] = set()
    ops: list[Op] = []
    for op in program.ops:
        if isinstance(op, Add) and (product := products.get(op.lhs.name)) and uses[op.lhs.name] == 1:
            lhs, rhs, bias = set(product.lhs.indices), set(product.rhs.indices), set(op.rhs.indices)
            unbatched = not lhs & rhs & set(product.out.indices)
            if unbatched and bias in (lhs - rhs, rhs - lhs, lhs ^ rhs):
                ops.append(ContractAdd(op.out, product.lhs, product.rhs, op.rhs))
                fused.add(product.out.name)
                continue
        ops.append(op)
    return replace(program, ops=tuple(op for op in ops if op.out.name not in fused))
