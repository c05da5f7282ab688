"""Reverse mode: the ops that make the gradients of a program's values, in the closed set of ops.

Layouts are settled: where the forward product is a matrix product over views, so are those of both gradients, and each
gradient has the layout of its value. So nothing is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import takewhile

from tnmoe.errors import ProgramError
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
    matmul_groups,
)
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import Gelu, GeluBackward
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value

DIFFERENTIABLE = (Contract, ContractAdd, Multiply, Add, Permute, Split, Merge, Gelu)
"""Ops whose gradients are ops of the set."""


def gradients(
    program: Program, ops: Sequence[Op], seed: Value, requires_grad: Set[str]
) -> tuple[tuple[Op, ...], Mapping[str, Value]]:
    """The ops of reverse mode, and the gradient of each value; those of several uses of a value are added up.

    The gradients of an op's weights come first: what they read of the forward pass is then dead before the gradients
    of the data take memory.
    """
    uses = Counter(v.name for op in ops for v in operands(op) if v.name in requires_grad)
    if uses[program.output.name]:
        raise ProgramError(f"the output {program.output.name!r} is read by another op")
    backward: list[Op] = []
    known = {program.output.name: seed}
    seen: Counter[str] = Counter()
    weights = {p.name for p in program.parameters}
    for op in reversed(ops):
        if op.out.name not in requires_grad:
            continue
        for value, make in sorted(_contributions(op, known[op.out.name]), key=lambda c: c[0].name not in weights):
            if value.name not in requires_grad:
                continue
            whole = replace(value, name=fresh(program, f"{value.name}_grad"), part=op.out.part)
            count, several = seen[value.name], uses[value.name] > 1
            part = replace(whole, name=fresh(program, f"{whole.name}_{count + 1}")) if several else whole
            made, result = make(part)
            backward += made
            if count:
                last = count + 1 == uses[value.name]
                total = whole if last else replace(whole, name=fresh(program, f"{whole.name}_to_{count + 1}"))
                backward.append(Add(total, known[value.name], result))
                result = total
            known[value.name] = result
            seen[value.name] += 1
    return tuple(backward), known


Make = Callable[[Value], tuple[tuple[Op, ...], Value]]
"""From what a gradient is to be called to the ops that make it, and the value that holds it."""


def _contributions(op: Op, grad: Value) -> Iterator[tuple[Value, Make]]:
    """Each operand, and how its gradient is made from that of the result."""
    match op:
        case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
            yield lhs, partial(_item_by_item if matmul_groups(op).outer else _product, grad, rhs)
            yield rhs, partial(_product, lhs, grad)
            if isinstance(op, ContractAdd):
                yield op.bias, partial(_summed, grad)
        case Multiply(_, lhs, rhs):
            yield lhs, partial(_hadamard, grad, rhs)
            yield rhs, partial(_hadamard, grad, lhs)
        case Add(_, lhs, rhs):
            yield lhs, partial(_summed, grad)
            yield rhs, partial(_summed, grad)
        case Permute(_, x):
            yield x, lambda out: ((Permute(out, grad),), out)
        case Split(_, x, index, parts, padded):
            yield x, lambda out: ((Merge(out, grad, index, parts, padded),), out)
        case Merge(_, x, index, parts, padded):
            yield x, lambda out: ((Split(out, grad, index, parts, padded),), out)
        case Gelu(_, x):
            yield x, lambda out: ((GeluBackward(out, grad, x),), out)
        case _:
            raise ProgramError(f"op {type(op).__name__} has no gradient; add one to tnmoe/autodiff/reverse_mode.py")


def _product(lhs: Value, rhs: Value, out: Value) -> tuple[tuple[Op, ...], Value]:
    """The gradient of one factor of a contraction: the product of the other one and of the result's gradient.

    Either order of the two gives a matrix product over views; `out` decides which.
    """
    if set(out.indices) == set(lhs.indices) | set(rhs.indices):
        return (Multiply(out, lhs, rhs),), out
    op = Contract(out, lhs, rhs)
    return (op if is_matmul(op) else Contract(out, rhs, lhs),), out


def _item_by_item(grad: Value, tensor: Value, out: Value) -> tuple[tuple[Op, ...], Value]:
    """The gradient of a matrix that was broadcast: that of each item of the tensor, then their sum."""
    outer = takewhile(grad.indices.__contains__, tensor.indices)
    items = Value(f"{out.name}_items", (*outer, *out.indices), out.part)
    op = Contract(items, grad, tensor)
    return (op if is_matmul(op) else Contract(items, tensor, grad), Reduce(out, items)), out


def _hadamard(grad: Value, other: Value, out: Value) -> tuple[tuple[Op, ...], Value]:
    """The gradient of one factor of a broadcasting product."""
    if out.indices == grad.indices:
        return (Multiply(out, grad, other),), out
    spread = replace(grad, name=f"{out.name}_spread")
    return (Multiply(spread, grad, other), Reduce(out, spread)), out


def _summed(grad: Value, out: Value) -> tuple[tuple[Op, ...], Value]:
    """The gradient of a term of a broadcasting sum."""
    return ((Reduce(out, grad),), out) if out.indices != grad.indices else ((), grad)


def fresh(program: Program, name: str) -> str:
    """`name`, lengthened until no value of the program has it."""
    taken = {v.name for v in program.leaves} | {op.out.name for op in program.ops}
    while name in taken:
        name += "_"
    return name
