"""Fuse matrix products into the one op that reads them, so that they are never written.

Two steps: `fusible` decides which results may stay unwritten, `fuse_products` leaves given ones unwritten. An
element-wise product takes one or both of its factors along (CP: the expert and the input factor); a batched product
takes along its right operand, the larger one (tensor rings: the projected input, mixed by a small matrix a token).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from tnmoe.ir.contractions import Contract, ContractAdd, Multiply, matmul_groups
from tnmoe.ir.fused_ops import ContractMix, ContractMultiply, DualContract, FusedOp, fault
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value

WIDEST = 16
"""Largest extent of the sum of a mix: a kernel holds that many columns of the product for each one of the result."""


def fuse_program(program: Program, sizes: Mapping[str, int]) -> Program:
    """A program that nobody differentiates, with every product that can be fused.

    Args:
        program: laid out.
        sizes: an integer for every index.
    """
    wanted = {program.output.name, *program.coefficients}
    wanted |= {v.name for op in program.diagnostics for v in operands(op)}
    return replace(program, ops=fuse_products(program.ops, fusible(program.ops, wanted, sizes)), released={})


def fusible(ops: Sequence[Op], wanted: Set[str], sizes: Mapping[str, int]) -> frozenset[str]:
    """Names of the results that `fuse_products` can leave unwritten, and should.

    Args:
        ops: laid out, in order of execution.
        wanted: names of the results that are used afterwards.
        sizes: an integer for every index.
    """
    made = {op.out.name: op for op in ops}
    absorbed: set[str] = set()
    for fused in fuse_products(ops, made.keys() - wanted):
        if isinstance(fused, FusedOp) and not (isinstance(fused, ContractMix) and _summed(fused, sizes) > WIDEST):
            absorbed |= _absorbed(made[fused.out.name], fused)
    return frozenset(absorbed)


def fuse_products(ops: Sequence[Op], unwritten: Set[str]) -> tuple[Op, ...]:
    """The ops, with those results in `unwritten` that are matrix products with a single use fused into it."""
    uses = Counter(v.name for op in ops for v in operands(op))
    products = {
        op.out.name: op
        for op in ops
        if isinstance(op, Contract | ContractAdd)
        and op.out.name in unwritten
        and uses[op.out.name] == 1
        and not matmul_groups(op).outer
    }
    gone: set[str] = set()
    kept: list[Op] = []
    for op in ops:
        fused = _fused(op, products)
        if fused is not None:
            gone |= _absorbed(op, fused)
        kept.append(fused or op)
    return tuple(op for op in kept if op.out.name not in gone)


def _fused(op: Op, products: Mapping[str, Contract | ContractAdd]) -> FusedOp | None:
    """The op with what it reads of `products` computed inside, if there is such an op."""
    candidates: list[FusedOp] = []
    match op:
        case Multiply(out, lhs, rhs):
            first, second = products.get(lhs.name), products.get(rhs.name)
            if first and second:
                candidates.append(DualContract(out, *_parts(first), *_parts(second)))
            candidates += [
                ContractMultiply(out, *_parts(made), factor) for made, factor in ((second, lhs), (first, rhs)) if made
            ]
        case Contract(out, mixer, rhs):
            if made := products.get(rhs.name):
                candidates.append(ContractMix(out, mixer, *_parts(made)))
    return next((c for c in candidates if fault(c) is None), None)


def _parts(made: Contract | ContractAdd) -> tuple[Value, Value, Value | None]:
    return made.lhs, made.rhs, made.bias if isinstance(made, ContractAdd) else None


def _absorbed(op: Op, fused: FusedOp) -> set[str]:
    """The operands of an op that the fused one computes itself."""
    return {v.name for v in operands(op)} - {v.name for v in operands(fused)}


def _summed(op: ContractMix, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[i] for i in op.mixer.indices if i not in op.out.indices)
