"""Expressions of contractions: matrix products over views, broadcasting sums and products, changes of axes."""

from __future__ import annotations

import math

from tnmoe.backends.torch.operands import Operands
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    ContractionOp,
    MatmulGroups,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    matmul_groups,
)


def expression(op: ContractionOp, writer: Operands) -> str:
    """What an op computes; a product still without the view that gives the result its axes."""
    match op:
        case Contract() | ContractAdd():
            return _product(op, writer)
        case Multiply(out, lhs, rhs):
            return f"{writer.spread(lhs, out)} * {writer.spread(rhs, out)}"
        case Add(out, lhs, rhs):
            return f"{writer.spread(lhs, out)} + {writer.spread(rhs, out)}"
        case Reduce(out, value):
            axes = [k for k, i in enumerate(value.indices) if i not in out.indices]
            return f"{writer.ref(value.name)}.sum({axes[0] if len(axes) == 1 else tuple(axes)})"
        case Permute(out, value):
            order = ", ".join(str(value.indices.index(i)) for i in out.indices)
            # Always a copy, even where a size of 1 would let torch keep a view: what runs is what is counted.
            copied = "clone(memory_format=torch.contiguous_format)"
            x = writer.ref(value.name)
            return f"{x}.permute({order}).{copied}" if order else f"{x}.clone()"
        case Split(_, value, index, parts, padded):
            x = writer.ref(value.name)
            axis = value.indices.index(index)
            if padded:
                surplus = math.prod(int(writer.program.sizes[p]) for p in parts) - writer.program.sizes[index]
                before = "0, 0, " * (len(value.indices) - 1 - axis)
                x = f"F.pad({x}, ({before}0, {surplus}))"
            shape = ", ".join(writer.lengths(parts)) + ("," if len(parts) == 1 else "")
            return f"{x}.unflatten({axis - len(value.indices)}, ({shape}))"
        case Merge(_, value, index, parts, padded):
            axis = value.indices.index(parts[0])
            last = axis + len(parts) - 1
            cut = f".narrow({axis}, 0, {writer.program.sizes[index]})" if padded else ""
            return (
                f"{writer.ref(value.name)}.flatten({axis}{'' if last == len(value.indices) - 1 else f', {last}'}){cut}"
            )
        case _:
            no_rule(op, "its torch form")


def _product(op: Contract | ContractAdd, writer: Operands) -> str:
    g = matmul_groups(op)
    lhs, rhs = factors(op, g, writer)
    if g.outer:  # not `@`, which copies the tensor if the matrix needs a gradient
        return f"torch.bmm({lhs}, {rhs})"
    if isinstance(op, ContractAdd):
        groups = (g.cols,) if set(op.bias.indices) == set(g.cols) else (g.rows, g.cols)
        bias = writer.view(op.bias, groups)
        if writer.product != "@" and groups == (g.cols,):
            return f"{writer.product}({lhs}, {rhs}, {bias})"
        return f"torch.addmm({bias}, {lhs}, {rhs})"
    if writer.product != "@" and not g.batch:
        return f"{writer.product}({lhs}, {rhs})"
    return f"{lhs} @ {rhs}"


def factors(op: Contract | ContractAdd, g: MatmulGroups, writer: Operands) -> tuple[str, str]:
    """Both operands of a product as matrices, with axes for its batch; of a broadcast one with a common batch."""
    if not g.outer:
        return writer.matrix(op.lhs, g.batch, g.rows, g.inner), writer.matrix(op.rhs, g.batch, g.inner, g.cols)
    free = [f"{writer.ref(op.rhs.name)}.shape[{k}]" for k, i in enumerate(g.outer) if i in writer.program.dynamic]
    fixed = math.prod(int(writer.program.sizes[i]) for i in g.outer if i not in writer.program.dynamic)
    items = " * ".join([*free, *([str(fixed)] if fixed != 1 or not free else [])])
    lhs = f"{writer.matrix(op.lhs, (), g.rows, g.inner)}.expand({items}, -1, -1)"
    return lhs, writer.view(op.rhs, (g.outer, g.inner, g.cols))


def result_view(g: MatmulGroups, writer: Operands) -> str:
    """The view that gives the result of a product its axes; empty if it has them."""
    text = ""
    groups = [(g.rows, len(g.batch) + bool(g.outer)), (g.cols, -1), *([(g.outer, 0)] if g.outer else [])]
    for group, axis in groups:
        if len(group) > 1:
            text += f".unflatten({axis}, ({', '.join(writer.lengths(group))}))"
        elif not group:
            text += f".squeeze({axis})"
    return text


def merged_axes(g: MatmulGroups) -> str:
    """The axes of a product before its view, e.g. `t (r1 r2)`."""
    return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] if group else "1" for group in g.axes)
