"""Statements of emitted source: one for each op."""

from __future__ import annotations

import keyword
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tnmoe.backends.torch.kernels import FUNCTIONS
from tnmoe.backends.torch.names import LOCALS, attribute, safe
from tnmoe.backends.torch.routing import routing_expression
from tnmoe.errors import EmitError
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    MatmulGroups,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    matmul_groups,
)
from tnmoe.ir.fused_ops import ContractMix, ContractMultiply, FusedOp, unfused
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, GeluBackward, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Value

WIDTH = 100
"""Longest line of an emitted file."""


def axes_comment(indices: Sequence[str]) -> str:
    """The indices of a result, as the comment behind its statement."""
    return f"  # {' '.join(indices)}" if indices else ""


def indented(lines: Sequence[str]) -> list[str]:
    """Lines of a method's body."""
    return [f"        {line}" if line else "" for line in lines]


def nested(lines: Sequence[str]) -> list[str]:
    """Lines of an inner block."""
    return [f"    {line}" if line else "" for line in lines]


def broken(line: str, comment: str = "", margin: int = 8) -> list[str]:
    """A statement that is too long, broken as formatters break it: inside its last brackets, if it ends with them.

    It will be indented by `margin`.
    """
    if len(line) + len(comment) + margin <= WIDTH:
        return [line + comment]
    target, equals, value = line.partition(" = ")
    if equals and not value.endswith(")"):
        return [f"{target} = (", f"    {value}", f"){comment}"]
    if not line.endswith(")"):
        return [line + comment]
    depth, start, commas = 0, len(line), []
    while start == len(line) or depth:
        start -= 1
        depth += {")": 1, "(": -1}.get(line[start], 0)
        if depth == 1 and line[start] == ",":
            commas.append(start)
    inside = line[start + 1 : -1]
    if len(inside) + 4 + margin <= WIDTH:
        return [line[: start + 1], f"    {inside}", f"){comment}"]
    ends = [*reversed(commas), len(line) - 1]
    begins = [start + 1, *(c + 1 for c in reversed(commas))]
    return [line[: start + 1], *(f"    {line[i:j].strip()}," for i, j in zip(begins, ends, strict=True)), f"){comment}"]


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def wrapped(start: str, names: Sequence[str], end: str, *, parenthesised: bool = False, margin: int = 0) -> list[str]:
    """`start`, the names with commas, `end`; in lines of at most the width, inside brackets where it is too long."""
    listed = f"({names[0]},)" if parenthesised and len(names) == 1 else ", ".join(names)
    single = f"{start}{listed}{end}"
    if len(single) + margin <= WIDTH:
        return [single]
    pad = " " * (len(start) - len(start.lstrip()))
    opening, closing = (start + "(", ")" + end) if parenthesised else (start, end)
    inside = f"{pad}    {', '.join(names)}"
    if len(inside) + margin <= WIDTH and not parenthesised:
        return [opening, inside, pad + closing]
    return [opening, *(f"{pad}    {name}," for name in names), pad + closing]


def docstring(lines: Sequence[str], indent: int) -> list[str]:
    """A docstring of these lines, each wrapped to the width."""
    pad = " " * indent
    clean = [
        part.replace("\\", "\\\\").replace('"""', "'''")
        for k, line in enumerate(lines)
        for part in textwrap.wrap(line, WIDTH - indent - (0 if k else 6), subsequent_indent=_margin(line) + "    ")
        or [""]
    ]
    if len(clean) == 1:
        return [f'{pad}"""{clean[0]}"""']
    return [f'{pad}"""{clean[0]}', *((pad + line).rstrip() for line in clean[1:]), f'{pad}"""']


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _product_groups(op: Contract | ContractAdd | FusedOp) -> MatmulGroups:
    """The groups of the matrix product whose shape an op's result has: of a mix the last, else the first."""
    if not isinstance(op, FusedOp):
        return matmul_groups(op)
    parts = unfused(op)
    found = parts[-1] if isinstance(op, ContractMix) else parts[0]
    assert isinstance(found, Contract | ContractAdd)
    return matmul_groups(found)


@dataclass
class Writer:
    """Writes the ops of a program.

    Attributes:
        program: laid out.
        attributes: stored values are attributes of a module; else they are arguments of a function.
        product: function that multiplies two matrices; by default the operator.
        margin: columns by which statements will be indented.
        gelu: function that writes GELU over its operand.

    Raises:
        EmitError: two values that would be written alike, or an op without a torch form.
    """

    program: Program
    attributes: bool = True
    product: str = "@"
    margin: int = 8
    gelu: str = "torch.ops.aten.gelu_"
    stored: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        stored = (*self.program.parameters, *self.program.buffers)
        self.stored = frozenset(p.name for p in stored if self.attributes)
        names = [v.name for v in self.program.leaves] + [
            v.name for op in self.program.ops + self.program.diagnostics for v in results(op)
        ]
        written = Counter(self.ref(name) for name in names)
        clash = [name for name in names if written[self.ref(name)] > 1]
        if clash:
            raise EmitError(f"{clash[0]!r} and {clash[1]!r} would both be written {self.ref(clash[0])!r}; rename one")

    def ref(self, name: str) -> str:
        """How the value `name` is written."""
        if name in self.stored:
            return f"self.{attribute(name)}"
        if name.startswith(("size_", "room_")) or name.endswith("_all"):
            return name + "_"  # as `runtime_sizes` and streamed functions call their variables
        return safe(name, LOCALS | frozenset(keyword.softkwlist))

    def runtime_sizes(self, ops: Sequence[Op]) -> dict[str, str]:
        """Sizes that only the data knows and that some view has to name: variable to expression."""
        needed: set[str] = set()
        for op in ops:
            if isinstance(op, Contract | ContractAdd | FusedOp):
                g = _product_groups(op)
                for group in (g.outer, g.rows, g.cols):
                    free = [i for i in group if i in self.program.dynamic]
                    if len(group) > 1 and len(free) > 1:
                        needed.update(free[1:])
        found: dict[str, str] = {}
        for index in sorted(needed):
            holder = next(v for v in self.program.inputs if index in v.indices)
            found[f"size_{index}"] = f"{self.ref(holder.name)}.shape[{holder.indices.index(index)}]"
        return found

    def releases(self, op: Op) -> list[str]:
        """`del` of the values that are given up before the op runs, so that they do not add to its memory."""
        return self.given_up(self.program.released.get(op.out.name, ()))

    def given_up(self, names: Sequence[str]) -> list[str]:
        """`del` of some values, in as few lines as have room for them."""
        lines: list[str] = []
        for name in map(self.ref, names):
            if lines and len(lines[-1]) + len(name) + 2 + self.margin <= WIDTH:
                lines[-1] += f", {name}"
            else:
                lines.append(f"del {name}")
        return lines

    def statement(self, op: Op) -> list[str]:
        """`out = expression  # indices`; a view of the result goes on a line of its own if both are too long."""
        target, comment = self.ref(op.out.name), axes_comment(op.out.indices)
        if isinstance(op, BatchNorm):
            statistics = f"mean, var = {self.ref(op.mean.name)}, {self.ref(op.var.name)}"
            return [statistics, f"{target} = {self._elementwise(op)}{comment}"]
        if isinstance(op, RoutingOp):
            target = ", ".join(self.ref(v.name) for v in results(op))
            comment = "  # " + ", ".join(" ".join(v.indices) or "scalar" for v in results(op))
            names = {v.name: self.ref(v.name) for v in (*self.program.inputs, *operands(op))}
            return broken(f"{target} = {routing_expression(op, self.program, names)}", comment, self.margin)
        expression, views = self.expression(op)
        whole = f"{target} = {self.viewed(op)}{comment}"
        if len(whole) + self.margin <= WIDTH:
            return [whole]
        if views:
            product = broken(f"{target} = {expression}", f"  # {self._merged(op)}", self.margin)
            return [*product, *broken(f"{target} = {target}{views}", comment, self.margin)]
        return broken(f"{target} = {expression}", comment, self.margin)

    def expression(self, op: Op) -> tuple[str, str]:
        """What the op computes, and the view (if any) that gives the result its axes."""
        if isinstance(op, Contract | ContractAdd):
            return self._product(op), self._result_view(op)
        if isinstance(op, FusedOp):
            return self._call(op), self._result_view(op)
        return self._elementwise(op), ""

    def viewed(self, op: Op) -> str:
        """What the op computes, with the axes of its result."""
        expression, views = self.expression(op)
        operator = isinstance(op, Contract) and not expression.startswith((f"{self.product}(", "torch."))
        return f"({expression}){views}" if views and operator else f"{expression}{views}"

    def _elementwise(self, op: Op) -> str:
        x = self.ref(operands(op)[0].name)
        match op:
            case Multiply(out, lhs, rhs):
                return f"{self._spread(lhs, out)} * {self._spread(rhs, out)}"
            case Add(out, lhs, rhs):
                return f"{self._spread(lhs, out)} + {self._spread(rhs, out)}"
            case Reduce(out, value):
                axes = [k for k, i in enumerate(value.indices) if i not in out.indices]
                return f"{x}.sum({axes[0] if len(axes) == 1 else tuple(axes)})"
            case Permute(out, value):
                order = ", ".join(str(value.indices.index(i)) for i in out.indices)
                # Always a copy, even where a size of 1 would let torch keep a view: what runs is what is counted.
                copied = "clone(memory_format=torch.contiguous_format)"
                return f"{x}.permute({order}).{copied}" if order else f"{x}.clone()"
            case Split(_, value, index, parts, padded):
                axis = value.indices.index(index)
                if padded:
                    surplus = math.prod(int(self.program.sizes[p]) for p in parts) - self.program.sizes[index]
                    before = "0, 0, " * (len(value.indices) - 1 - axis)
                    x = f"F.pad({x}, ({before}0, {surplus}))"
                shape = ", ".join(self._sizes(parts)) + ("," if len(parts) == 1 else "")
                return f"{x}.unflatten({axis - len(value.indices)}, ({shape}))"
            case Merge(_, value, index, parts, padded):
                axis = value.indices.index(parts[0])
                last = axis + len(parts) - 1
                cut = f".narrow({axis}, 0, {self.program.sizes[index]})" if padded else ""
                return f"{x}.flatten({axis}{'' if last == len(value.indices) - 1 else f', {last}'}){cut}"
            case Softmax(_, value, index):
                return f"torch.softmax({x}, {value.indices.index(index) - len(value.indices)})"
            case Entmax15() | Sparsemax():
                if op.x.indices[-1] != op.index:
                    raise EmitError(f"{type(op).__name__} runs over the last axis, but {op.index!r} is not last")
                return f"{'entmax15' if isinstance(op, Entmax15) else 'sparsemax'}({x})"
            case Sigmoid():
                return f"torch.sigmoid({x})"
            case Gelu(out):
                return f"{self.gelu}({x})" if out.name in self.program.overwrites else f"F.gelu({x})"
            case GeluBackward(_, grad, value):
                return f"torch.ops.aten.gelu_backward({self.ref(grad.name)}, {self.ref(value.name)})"
            case LayerNorm(_, _, index, weight, bias):
                affine = "".join(f", {self.ref(v.name)}" for v in (weight, bias) if v)
                return f"F.layer_norm({x}, ({self.program.sizes[index]},){affine})"
            case BatchNorm():
                return f"F.batch_norm({x}, mean, var, None, None, training, momentum)"
            case _:
                raise EmitError(f"op {type(op).__name__} has no torch form")

    def _product(self, op: Contract | ContractAdd) -> str:
        g = matmul_groups(op)
        lhs, rhs = self.factors(op, g)
        if g.outer:  # not `@`, which copies the tensor if the matrix needs a gradient
            return f"torch.bmm({lhs}, {rhs})"
        if isinstance(op, ContractAdd):
            groups = (g.cols,) if set(op.bias.indices) == set(g.cols) else (g.rows, g.cols)
            bias = self._view(op.bias, groups)
            if self.product != "@" and groups == (g.cols,):
                return f"{self.product}({lhs}, {rhs}, {bias})"
            return f"torch.addmm({bias}, {lhs}, {rhs})"
        if self.product != "@" and not g.batch:
            return f"{self.product}({lhs}, {rhs})"
        return f"{lhs} @ {rhs}"

    def factors(self, op: Contract | ContractAdd, g: MatmulGroups) -> tuple[str, str]:
        """Both operands of a product as matrices, with axes for its batch; of a broadcast one with a common batch."""
        if not g.outer:
            return self._matrix(op.lhs, g.batch, g.rows, g.inner), self._matrix(op.rhs, g.batch, g.inner, g.cols)
        free = [f"{self.ref(op.rhs.name)}.shape[{k}]" for k, i in enumerate(g.outer) if i in self.program.dynamic]
        fixed = math.prod(int(self.program.sizes[i]) for i in g.outer if i not in self.program.dynamic)
        items = " * ".join([*free, *([str(fixed)] if fixed != 1 or not free else [])])
        lhs = f"{self._matrix(op.lhs, (), g.rows, g.inner)}.expand({items}, -1, -1)"
        return lhs, self._view(op.rhs, (g.outer, g.inner, g.cols))

    def _call(self, op: FusedOp) -> str:
        """The function of a fused op, with its operands as matrices and each bias as a row."""
        g = _product_groups(op)
        arguments = [text for part in unfused(op)[:-1] for text in self._factors(part)]
        if isinstance(op, ContractMix):
            arguments.insert(0, self._matrix(op.mixer, g.batch, g.rows, g.inner))
        if isinstance(op, ContractMultiply):
            arguments.append(self._matrix(op.factor, g.batch, g.rows, g.cols))
        while arguments[-1] == "None":
            arguments.pop()
        return f"{FUNCTIONS[type(op)]}({', '.join(arguments)})"

    def _factors(self, product: Op) -> tuple[str, str, str]:
        """Both matrices of a product, and its bias or `None`."""
        assert isinstance(product, Contract | ContractAdd)
        g = matmul_groups(product)
        bias = self._view(product.bias, (g.cols,)) if isinstance(product, ContractAdd) else "None"
        return *self.factors(product, g), bias

    def _result_view(self, op: Contract | ContractAdd | FusedOp) -> str:
        g = _product_groups(op)
        text = ""
        groups = [(g.rows, len(g.batch) + bool(g.outer)), (g.cols, -1), *([(g.outer, 0)] if g.outer else [])]
        for group, axis in groups:
            if len(group) > 1:
                text += f".unflatten({axis}, ({', '.join(self._sizes(group))}))"
            elif not group:
                text += f".squeeze({axis})"
        return text

    def _merged(self, op: Op) -> str:
        """The axes of the product before its view, e.g. `t (r1 r2)`."""
        assert isinstance(op, Contract | ContractAdd | FusedOp)
        g = _product_groups(op)
        return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] if group else "1" for group in g.axes)

    def _matrix(self, value: Value, batch: tuple[str, ...], rows: tuple[str, ...], cols: tuple[str, ...]) -> str:
        """`value` viewed as (batch…, rows, cols)."""
        single = tuple((i,) for i in batch)
        if value.indices == (*batch, *rows, *cols):
            return self._view(value, (*single, rows, cols))
        return self._view(value, (*single, cols, rows)) + ".mT"

    def _view(self, value: Value, groups: tuple[tuple[str, ...], ...]) -> str:
        """`value` with each group of neighbouring axes merged, and an axis of size 1 for an empty group."""
        text = self.ref(value.name)
        axis = len(value.indices)
        for k in range(len(groups) - 1, -1, -1):
            size = len(groups[k])
            axis -= size
            if size > 1:
                last = "" if axis + size == len(value.indices) else str(axis + size - 1)
                text += f".flatten({', '.join(filter(None, (str(axis or '') or ('0' if last else ''), last)))})"
        for k, group in enumerate(groups):
            if not group:
                text += f".unsqueeze({k})"
        return text

    def _sizes(self, group: tuple[str, ...]) -> list[str]:
        free = [i for i in group if i in self.program.dynamic]
        return [str(self.program.sizes[i]) if i not in free else "-1" if i == free[0] else f"size_{i}" for i in group]

    def _spread(self, value: Value, out: Value) -> str:
        """`value` with axes of size 1 so that it broadcasts against `out`."""
        text = self.ref(value.name)
        first = next((k for k, i in enumerate(out.indices) if i in value.indices), len(out.indices))
        for k, index in enumerate(out.indices[first:]):
            if index not in value.indices:
                text += f".unsqueeze({k})"
        return text


def conditional(writer: Writer, op: Op, condition: str) -> list[str]:
    """`out = expression if condition else None  # indices`."""
    value = writer.viewed(op)
    target, comment = writer.ref(op.out.name), axes_comment(op.out.indices)
    whole = f"{target} = {value} if {condition} else None{comment}"
    if len(whole) + 8 <= WIDTH:
        return [whole]
    inside = f"{value} if {condition} else None"
    if len(inside) + 12 <= WIDTH:
        return [f"{target} = (", f"    {inside}", f"){comment}"]
    ending = [f"    if {condition}", "    else None"]
    if len(value) + 12 <= WIDTH:
        return [f"{target} = (", f"    {value}", *ending, f"){comment}"]
    expression, views = writer.expression(op)
    if not views:
        return [f"{target} = (", *nested(broken(value, margin=12)), *ending, f"){comment}"]
    lines = [f"{target} = (", *nested(broken(expression, margin=12)), *ending, ")"]
    return [*lines, *broken(f"{target} = {target}{views} if {condition} else None", comment)]
