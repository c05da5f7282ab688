"""Decide the memory order of every value, so that contractions are matrix products over views.

Weights are free: each is stored the way its matrix product wants it, so that none is transposed or copied at run
time (but for one that two products want in different orders). Data comes as it comes; where two demands on an
intermediate conflict, an explicit `Permute` (a copy, which the cost model sees) is inserted. A program that would be
left with copies is laid out a second time, with small matrices broadcast to a mode in the middle of a tensor (see
`tnmoe.lowering.broadcast`), and stays so if that copies less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from tnmoe.errors import no_rule
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    index_groups,
    is_matmul,
    is_subsequence,
    merged_order,
    split_order,
)
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands, rename, results
from tnmoe.ir.pointwise_ops import ElementwiseOp, RowwiseOp
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Value
from tnmoe.lowering.broadcast import broadcast, broadcast_demand

Order = tuple[str, ...]

LONGEST = 20
"""Characters of a name that says a copy's order; a longer one says only that it is a copy."""


def assign_layouts(program: Program, sizes: Mapping[str, int]) -> Program:
    """Store weights and order intermediates by what their consumers want, from the output backwards.

    Args:
        program: not laid out.
        sizes: an integer for every index, by which it is decided what is broadcast; without them nothing is.
    """
    plain = _laid_out(program, {})
    if not _copied(plain, sizes):
        return plain
    other = _laid_out(program, sizes)
    return other if _copied(other, sizes) < _copied(plain, sizes) else plain


def _copied(program: Program, sizes: Mapping[str, int]) -> int:
    """Elements that the program copies, as far as the sizes are known."""
    copies = [op.out for op in program.ops if isinstance(op, Permute)]
    return sum(math.prod(sizes.get(i, 1) for i in v.indices) for v in copies)


def _laid_out(program: Program, sizes: Mapping[str, int]) -> Program:
    demands = _demands(program, sizes)
    parameters = tuple(replace(p, indices=demands.get(p.name, p.indices)) for p in program.parameters)
    known = {v.name: v for v in replace(program, parameters=parameters).leaves}
    ops: list[Op] = []
    copies: dict[tuple[str, Order], Value] = {}

    def permuted(value: Value, order: Order) -> Value:
        if value.indices == order:
            return value
        if (value.name, order) not in copies:
            name = f"{value.name}_as_{'_'.join(order)}"
            if len(name) > LONGEST:
                name = f"{value.name}_copy" + "_again" * sum(v == value.name for v, _ in copies)
            copy = Value(name, order, value.part)
            ops.append(Permute(copy, value))
            copies[value.name, order] = copy
        return copies[value.name, order]

    for op in program.ops:
        declared = operands(op)
        op = rename(op, {v.name: known[v.name] for v in declared})
        want = demands.get(op.out.name, op.out.indices)
        match op:
            case Contract() | ContractAdd():
                op = _as_matmul(op, want, permuted, sizes)
            case Multiply(out, lhs, rhs) | Add(out, lhs, rhs):
                order = (
                    want
                    if is_subsequence(lhs.indices, want) or is_subsequence(rhs.indices, want)
                    else lhs.indices + tuple(i for i in rhs.indices if i not in lhs.indices)
                )
                op = replace(
                    op,
                    out=replace(out, indices=order),
                    lhs=permuted(lhs, _in_order(lhs.indices, order)),
                    rhs=permuted(rhs, _in_order(rhs.indices, order)),
                )
            case Reduce(out, x):
                op = replace(op, out=replace(out, indices=_in_order(out.indices, x.indices)))
            case Permute(out, x):
                op = replace(op, out=replace(out, indices=want))
            case Split(out, x):
                op = replace(op, out=replace(out, indices=split_order(x.indices, op)))
            case Merge(out, x):
                order = merged_order(x.indices, op)
                if split_order(order, op) != x.indices:  # the parts are apart
                    order = want
                    op = replace(op, x=permuted(x, split_order(order, op)))
                op = replace(op, out=replace(out, indices=order))
            case _ if isinstance(op, RowwiseOp):  # its index has to be the last
                x = permuted(op.x, _last(op.x.indices, op.index))
                op = replace(op, x=x, out=replace(op.out, indices=x.indices))
            case _ if isinstance(op, ElementwiseOp):
                op = replace(op, out=replace(op.out, indices=op.x.indices))
            case _ if isinstance(op, RoutingOp | FusedOp):  # takes and gives its operands as they are declared
                op = rename(op, {v.name: permuted(known[v.name], v.indices) for v in declared})
            case _:
                no_rule(op, "its layout")
        if op.out.name == program.output.name and op.out.indices != program.output.indices:
            raw = replace(op.out, name=f"{op.out.name}_raw")
            ops += [replace(op, out=raw), Permute(program.output, raw)]
            known[program.output.name] = program.output
            continue
        ops.append(op)
        known |= {v.name: v for v in results(op)}
    return _restored(replace(program, parameters=parameters, ops=tuple(ops), output=known[program.output.name]))


def _restored(program: Program) -> Program:
    """Store a weight in the order of its copy, if the copy is all that it is used for."""
    uses = Counter(v.name for op in program.ops for v in operands(op))
    stored = {p.name for p in program.parameters}
    copies = {
        op.out.name: replace(op.out, name=op.x.name)
        for op in program.ops
        if isinstance(op, Permute) and op.x.name in stored and uses[op.x.name] == 1 and op.out != program.output
    }
    orders = {v.name: v.indices for v in copies.values()}
    return replace(
        program,
        parameters=tuple(replace(p, indices=orders.get(p.name, p.indices)) for p in program.parameters),
        ops=tuple(rename(op, copies) for op in program.ops if op.out.name not in copies),
    )


def _demands(program: Program, sizes: Mapping[str, int]) -> dict[str, Order]:
    """The memory order that the consumer of each value would like best, by name."""
    fixed = {v.name: v.indices for v in program.inputs}
    demands: dict[str, Order] = {program.output.name: program.output.indices}
    demands |= {v.name: v.indices for op in program.ops for v in results(op) if v.name in program.coefficients}
    for op in reversed(program.ops):
        want = demands.setdefault(op.out.name, op.out.indices)
        match op:
            case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
                if wanted := broadcast_demand(op, want, sizes, {**demands, **fixed}):
                    for value, order in wanted:
                        demands.setdefault(value.name, order)
                    continue
                first, second = _sides(op, want)
                batch = _in_order([i for i in first.indices if i in second.indices and i in want], want)
                inner: Collection[str] = [i for i in first.indices if i in second.indices and i not in want]
                for value in (first, second):  # data and values already spoken for decide the summed order
                    if (known := fixed.get(value.name) or demands.get(value.name)) and len(inner) > 1:
                        inner = _in_order(inner, known)
                        break
                rows = _in_order([i for i in first.indices if i not in second.indices], want)
                cols = _in_order([i for i in second.indices if i not in first.indices], want)
                demands.setdefault(first.name, (*batch, *rows, *inner))
                demands.setdefault(second.name, (*batch, *inner, *cols))
                if isinstance(op, ContractAdd):
                    demands.setdefault(op.bias.name, _in_order(op.bias.indices, (*rows, *cols)))
            case Multiply(_, lhs, rhs) | Add(_, lhs, rhs):
                demands.setdefault(lhs.name, _in_order(lhs.indices, want))
                demands.setdefault(rhs.name, _in_order(rhs.indices, want))
            case Reduce(_, x):
                demands.setdefault(x.name, want + tuple(i for i in x.indices if i not in want))
            case Split(_, x):
                demands.setdefault(x.name, merged_order(want, op))
            case Merge(_, x):
                demands.setdefault(x.name, split_order(want, op))
            case _ if isinstance(op, RowwiseOp):
                demands.setdefault(op.x.name, _last(want, op.index))
            case Permute(_, x):
                demands.setdefault(x.name, want)
            case _ if isinstance(op, ElementwiseOp):
                demands.setdefault(op.x.name, want)
            case _ if isinstance(op, RoutingOp | FusedOp):
                for value in operands(op):
                    demands.setdefault(value.name, value.indices)
            case _:
                no_rule(op, "the layout that it wants")
    return demands


def _sides(op: Contract | ContractAdd, want: Order) -> tuple[Value, Value]:
    """The operands as (left, right): the right one's own indices come last in `want`, and carry the bias."""
    own = {
        v: [i for i in v.indices if i in want and i not in o.indices] for v, o in ((op.lhs, op.rhs), (op.rhs, op.lhs))
    }
    if isinstance(op, ContractAdd) and set(op.bias.indices) in (set(own[op.lhs]), set(own[op.rhs])):
        swap = set(op.bias.indices) == set(own[op.lhs])
    else:
        left = min((want.index(i) for i in own[op.lhs]), default=-1)
        right = min((want.index(i) for i in own[op.rhs]), default=len(want))
        swap = left > right
    return (op.rhs, op.lhs) if swap else (op.lhs, op.rhs)


def _as_matmul(
    op: Contract | ContractAdd, want: Order, permuted: Callable[[Value, Order], Value], sizes: Mapping[str, int]
) -> Contract | ContractAdd:
    """The contraction with operands placed, and copied where unavoidable, so that it is a matrix product."""
    if product := broadcast(op, sizes):
        small, tensor, groups = product
        if not _fits(small, (), groups.rows, groups.inner):
            small = permuted(small, (*groups.rows, *groups.inner))
        return Contract(replace(op.out, indices=(*groups.outer, *groups.rows, *groups.cols)), small, tensor)
    lhs, rhs = _sides(op, want)
    op = replace(op, lhs=lhs, rhs=rhs)
    g = index_groups(op)
    if not _fits(lhs, g.batch, g.rows, g.inner) or not _fits(rhs, g.batch, g.cols, g.inner):
        mirrored = index_groups(replace(op, lhs=rhs, rhs=lhs))
        if not _fits(lhs, g.batch, g.rows, g.inner) and _fits(rhs, mirrored.batch, mirrored.rows, mirrored.inner):
            lhs = permuted(lhs, (*mirrored.batch, *g.rows, *mirrored.inner))
        else:
            batch = _in_order(g.batch, want)
            if not _fits(lhs, g.batch, g.rows, g.inner):
                lhs = permuted(lhs, (*batch, *g.rows, *g.inner))
            else:
                batch = g.batch
            rhs = permuted(rhs, (*batch, *g.inner, *g.cols))
        op = replace(op, lhs=lhs, rhs=rhs)
        g = index_groups(op)
    op = replace(op, out=replace(op.out, indices=(*g.batch, *g.rows, *g.cols)))
    if isinstance(op, ContractAdd):
        op = replace(op, bias=permuted(op.bias, _in_order(op.bias.indices, op.out.indices)))
    assert is_matmul(op), op
    return op


def _fits(value: Value, batch: Order, own: Order, inner: Order) -> bool:
    return value.indices in ((*batch, *own, *inner), (*batch, *inner, *own))


def _in_order(indices: Collection[str], order: Order) -> Order:
    """`indices` sorted as they stand in `order`; those it lacks come last, as they were."""
    rank: Mapping[str, int] = {i: k for k, i in enumerate(order)}
    return tuple(sorted(indices, key=lambda i: rank.get(i, len(order))))


def _last(order: Order, index: str) -> Order:
    return (*(i for i in order if i != index), index)
