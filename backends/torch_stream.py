"""Write the end of a program as a `torch.autograd.Function` that takes its tokens in chunks, forward and backward.

What a chunk needs for a while lies in rooms that all chunks share, and what stays of it (the result, what is kept, the
gradients of the inputs) in arrays over all tokens; gradients of weights are summed up in place, inside the product. So
no chunk allocates anything. glibc maps every large tensor anew and gives it back when it is freed, and the faults of
its pages cost up to a third of the time of the products that write them (measured: 103 against 128 GFLOP/s, 512 tokens
of a GPT-2 CP block, two threads of an AMD EPYC).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tnmoe.adjoint import Adjoint
from tnmoe.backends.torch_statements import (
    WIDTH,
    Writer,
    axes_comment,
    broken,
    conditional,
    docstring,
    indented,
    listed,
    nested,
    wrapped,
)
from tnmoe.cost import is_view
from tnmoe.ops import (
    Add,
    Contract,
    ContractAdd,
    Gelu,
    GeluBackward,
    Multiply,
    Op,
    Reduce,
    Value,
    matmul_groups,
    operands,
)

CHUNKS = '''\
def _chunks(tokens: int, most: int):
    """The tokens of each chunk, and their rows in a room for one chunk."""
    for start in range(0, tokens, most):
        stop = min(start + most, tokens)
        yield slice(start, stop), slice(0, stop - start)'''
"""Helper of every streamed function."""

TRACED = '''\
def _traced() -> bool:
    """Whether torch.compile, torch.export or torch.func follows each op; they take no out=."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()'''
"""Helper of every module that calls one."""

ELEMENTWISE = (Multiply, Add, Gelu, GeluBackward)
"""Ops that may write their result over an operand of the same axes."""


@dataclass
class StreamWriter(Writer):
    """Writes the ops that one chunk runs.

    Attributes:
        token: the index along which tokens are chunked.
        arrays: results that get an array over all tokens.
        given: values that exist beforehand.
        rooms: the room of each result that has one.
        shapes: the axes of each room, but for the first.
    """

    token: str = ""
    arrays: frozenset[str] = frozenset()
    given: tuple[Value, ...] = ()
    rooms: dict[str, int] = field(default_factory=dict)
    shapes: list[tuple[str, ...]] = field(default_factory=list)

    def whole(self, name: str) -> str:
        """How the array of a value over all tokens is written."""
        return f"{self.ref(name)}_all"

    def placed(self, op: Op) -> bool:
        """Whether the op writes its result where it is told to."""
        out = op.out
        if out.indices[:1] != (self.token,) or (self.product != "@" and isinstance(op, Contract | ContractAdd)):
            return False
        if isinstance(op, Contract):
            return len(matmul_groups(op).batch) < 2
        return isinstance(op, (ContractAdd, Reduce, *ELEMENTWISE))

    def furnish(self, ops: Sequence[Op], owner: Mapping[str, str]) -> None:
        """Give every placed result without an array a room; values that never live together share it."""
        last = {owner[v.name]: k for k, op in enumerate(ops) for v in (op.out, *operands(op))}
        free: list[int] = []
        held: dict[str, int] = {}

        def leave(before: int) -> None:
            for name in [n for n in held if last[n] < before]:
                free.append(held.pop(name))

        for k, op in enumerate(ops):
            name, shape = op.out.name, op.out.indices[1:]
            if name in self.arrays or not self.placed(op):
                continue
            leave(k)
            if isinstance(op, ELEMENTWISE):  # over an operand that dies here, if it has the same axes
                dying = [v.name for v in operands(op) if v.name in held and last[v.name] == k]
                over = next((n for n in dying if self._like(self.shapes[held[n]], shape)), None)
                if over is not None and all(v.indices == op.out.indices for v in operands(op) if v.name == over):
                    free.append(held.pop(over))
            number = next((r for r in reversed(free) if self._like(self.shapes[r], shape)), None)
            if number is None:
                number = len(self.shapes)
                self.shapes.append(shape)
            else:
                free.remove(number)
            self.rooms[name] = held[name] = number

    def _like(self, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        return self._lengths(one) == self._lengths(other)

    def _lengths(self, indices: Iterable[str]) -> list[str]:
        return [self.length(i) for i in indices]

    def length(self, index: str) -> str:
        """The size of an axis, as it is written."""
        if index not in self.program.dynamic:
            return str(self.program.sizes[index])
        holder = next(v for v in self.given if index in v.indices)
        name = self.whole(holder.name) if self.token in holder.indices else self.ref(holder.name)
        return f"{name}.shape[{holder.indices.index(index)}]"

    def allocation(
        self, target: str, like: str, first: str, axes: Sequence[str], *, fill: str = "empty", condition: str = ""
    ) -> list[str]:
        """`target = like.new_empty(…)`, axes of tokens `first` long; None unless `condition`."""
        shape = ", ".join(first if i == self.token else self.length(i) for i in axes) or "()"
        made = f"{target} = {like}.new_{fill}({shape})"
        return broken(f"{made} if {condition} else None" if condition else made, axes_comment(axes))

    def at(self, value: Value, part: str) -> str:
        """The rows `part` of a value's array."""
        axis = value.indices.index(self.token)
        return f"{self.whole(value.name)}[{':, ' * axis}{part}]"

    def streamed(self, op: Op, part: str) -> list[str]:
        """The statements of an op of one chunk; if its result has an array over all tokens, `part` of that takes it."""
        out = op.out
        if self.token not in out.indices:
            return self._summed(op)
        if self.placed(op):
            bound = broken(f"{self.ref(out.name)} = {self.at(out, part)}") if part else []
            return [*bound, *broken(self._out(op, self.ref(out.name)), axes_comment(out.indices), self.margin)]
        lines = self.statement(op)
        return [*lines, f"{self.at(out, part)} = {self.ref(out.name)}"] if part else lines

    def _out(self, op: Op, target: str) -> str:
        """The call that writes the op's result into `target`."""
        match op:
            case Contract() | ContractAdd():
                g = matmul_groups(op)
                single = tuple((i,) for i in g.batch)
                lhs = self._matrix(op.lhs, g.batch, g.rows, g.inner)
                rhs = self._matrix(op.rhs, g.batch, g.inner, g.cols)
                into = self._view(op.out, (*single, g.rows, g.cols))
                if isinstance(op, ContractAdd):
                    groups = (g.cols,) if set(op.bias.indices) == set(g.cols) else (g.rows, g.cols)
                    return f"torch.addmm({self._view(op.bias, groups)}, {lhs}, {rhs}, out={into})"
                return f"torch.{'bmm' if g.batch else 'mm'}({lhs}, {rhs}, out={into})"
            case Multiply(out, lhs, rhs) | Add(out, lhs, rhs):
                call = "mul" if isinstance(op, Multiply) else "add"
                return f"torch.{call}({self._spread(lhs, out)}, {self._spread(rhs, out)}, out={target})"
            case Reduce(out, x):
                axes = [k for k, i in enumerate(x.indices) if i not in out.indices]
                return f"torch.sum({self.ref(x.name)}, {axes[0] if len(axes) == 1 else tuple(axes)}, out={target})"
            case Gelu(_, x):
                return f"F.gelu({self.ref(x.name)}, out={target})"
            case GeluBackward(_, grad, x):
                call = "torch.ops.aten.gelu_backward.grad_input"
                return f"{call}({self.ref(grad.name)}, {self.ref(x.name)}, grad_input={target})"
            case _:
                raise AssertionError(op)  # `placed` says no

    def _summed(self, op: Op) -> list[str]:
        """What a chunk adds to a result that has no tokens."""
        target = self.ref(op.out.name)
        if isinstance(op, Contract) and not matmul_groups(op).batch and self.product == "@":
            g = matmul_groups(op)
            lhs = self._matrix(op.lhs, g.batch, g.rows, g.inner)
            rhs = self._matrix(op.rhs, g.batch, g.inner, g.cols)
            into = self._view(op.out, (g.rows, g.cols))
            return broken(f"torch.addmm({into}, {lhs}, {rhs}, out={into})", axes_comment(op.out.indices), self.margin)
        return broken(f"{target} += {self.viewed(op)}", axes_comment(op.out.indices), self.margin)


def stream_source(a: Adjoint, name: str, chunk: int, product: str) -> str:
    """The class of the function, called `name`.

    Args:
        a: its forward and backward pass.
        name: of the class.
        chunk: tokens that it takes at once.
        product: what multiplies two matrices.
    """
    lines = [f"class {name}(torch.autograd.Function):", *_docstring(a, chunk), ""]
    lines += ["    @staticmethod", *_forward(a, chunk, product)]
    lines += ["", "    @staticmethod", "    @once_differentiable", *_backward(a, chunk, product)]
    return "\n".join(lines)


def _docstring(a: Adjoint, chunk: int) -> list[str]:
    stored = {p.name for p in (*a.program.parameters, *a.program.buffers)}
    kept = listed([v.name for v in _kept(a)])
    text = f"From {listed([v.name for v in a.inputs if v.name not in stored])} to the output, {chunk} tokens at a time."
    text += f" Keeps {kept}" if kept else " Keeps nothing but its inputs"
    again = listed([op.out.name for op in a.repeated])
    text += f"; the backward pass computes {again} again." if again else "."
    return docstring(textwrap.wrap(text, WIDTH - 10), 4)


def _kept(a: Adjoint) -> list[Value]:
    return [op.out for op in a.ops if op.out.name in a.kept and op.out in a.saved]


def _owners(ops: Sequence[Op], given: Iterable[Value]) -> dict[str, str]:
    """The value whose memory each value is."""
    found = {v.name: v.name for v in given}
    for op in ops:
        found[op.out.name] = found[operands(op)[0].name] if is_view(op) else op.out.name
    return found


def _forward(a: Adjoint, chunk: int, product: str) -> list[str]:
    program, forward, token = a.executed, a.forward, a.token
    kept = [v for v in _kept(a) if token in v.indices]
    arrays = frozenset(v.name for v in (program.output, *kept))
    writer = StreamWriter(program, attributes=False, product=product, token=token, arrays=arrays, given=a.inputs)
    ops = [op for op in forward if token in op.out.indices]
    writer.furnish(ops, _owners(forward, a.inputs))
    first = writer.whole(a.inputs[0].name)
    lines = wrapped("    def forward(", ["ctx", "keep: bool", *(_saved(writer, v) for v in a.inputs)], ") -> Tensor:")
    body = ["keep = keep and any(ctx.needs_input_grad)"] if kept else []
    body += [f"tokens = {first}.shape[0]", f"most = min(tokens, {chunk})"]
    for op in forward:
        if token not in op.out.indices:
            body += writer.statement(op)
    body += writer.allocation(writer.whole(program.output.name), first, "tokens", program.output.indices)
    if kept:
        body.append("extent = tokens if keep else most")
    for v in kept:
        body += writer.allocation(writer.whole(v.name), first, "extent", v.indices)
    body += _rooms(writer, first)
    body.append(f"for at, room in _chunks(tokens, {chunk}):")
    inner = ["held = at if keep else room"] if kept else []
    inner += _bound(writer, [v for v in a.inputs if token in v.indices], "at")
    inner += _bound_rooms(writer)
    parts = {program.output.name: "at", **{v.name: "held" for v in kept}}
    inner += _chunk_statements(writer, ops, parts, {})
    body += nested(inner)
    saved = [_saved(writer, v) for v in a.saved]
    if kept:
        body += ["if keep:", *nested(wrapped("ctx.save_for_backward(", saved, ")", margin=12))]
    else:
        body += wrapped("ctx.save_for_backward(", saved, ")", margin=8)
    body.append(f"return {writer.whole(program.output.name)}")
    return [*lines, *indented(body)]


def _backward(a: Adjoint, chunk: int, product: str) -> list[str]:
    program, token = a.as_program(), a.token
    wanted = [a.wanted[v.name] for v in a.inputs if v.name in a.wanted]
    arrays = frozenset(v.name for v in wanted if token in v.indices and v != a.seed)
    writer = StreamWriter(
        program, attributes=False, product=product, token=token, arrays=arrays, given=(*a.saved, a.seed)
    )
    backward = program.ops
    ops = [op for op in backward if any(token in v.indices for v in (op.out, *operands(op)))]
    sums = [op.out for op in ops if token not in op.out.indices]
    summed = {v.name for v in sums}
    once: list[Op] = []
    after: list[Op] = []
    for op in backward:
        if op not in ops:
            late = any(v.name in summed for v in operands(op))
            (after if late else once).append(op)
            summed |= {op.out.name} if late else set()
    writer.furnish(ops, _owners(backward, (*a.saved, a.seed, *program.leaves)))
    seed = writer.whole(a.seed.name)
    position = {v.name: k + 1 for k, v in enumerate(a.inputs)}
    needs = {op: f"needs[{position[name]}]" for op, name in a.only_for.items()}
    asked = {op.out.name: condition for op, condition in needs.items()}
    lines = [f"    def backward(ctx, {seed}: Tensor):"]
    body = wrapped("", [_saved(writer, v) for v in a.saved], " = ctx.saved_tensors", parenthesised=True, margin=8)
    body.append("needs = ctx.needs_input_grad")
    for name in (v.name for v in a.inputs if v.name not in a.wanted):
        body.append(f"if needs[{position[name]}]:")
        body += broken(f'    raise RuntimeError("this module was planned without a gradient of {name}")')
    body += [f"tokens = {seed}.shape[0]", f"most = min(tokens, {chunk})"]
    for op in once:
        body += writer.statement(op)
    for v in {v.name: v for v in wanted if v.name in arrays}.values():
        condition = asked.get(v.name, "")
        body += writer.allocation(writer.whole(v.name), seed, "tokens", v.indices, condition=condition)
    for v in sums:
        condition = asked.get(v.name, "")
        body += writer.allocation(writer.ref(v.name), seed, "", v.indices, fill="zeros", condition=condition)
    body += _rooms(writer, seed)
    body.append(f"for at, room in _chunks(tokens, {chunk}):")
    inner = _bound(writer, [v for v in (*a.saved, a.seed) if token in v.indices], "at")
    inner += _bound_rooms(writer)
    inner += _chunk_statements(writer, ops, dict.fromkeys(arrays, "at"), needs)
    body += nested(inner)
    for op in after:
        body += conditional(writer, op, needs[op]) if op in needs else writer.statement(op)
    results = ["None"]
    for v in a.inputs:
        gradient = a.wanted.get(v.name)
        ref = "None" if gradient is None else _saved(writer, gradient)
        results.append(ref)
    body += wrapped("return ", results, "", parenthesised=True, margin=8)
    return [*lines, *indented(body)]


def _saved(writer: StreamWriter, value: Value) -> str:
    """How a value is written outside the chunks."""
    return writer.whole(value.name) if writer.token in value.indices else writer.ref(value.name)


def _rooms(writer: StreamWriter, like: str) -> list[str]:
    lines: list[str] = []
    for k, shape in enumerate(writer.shapes, start=1):
        lines += writer.allocation(f"room_{k}", like, "most", (writer.token, *shape))
    return lines


def _bound(writer: StreamWriter, values: Sequence[Value], part: str) -> list[str]:
    """One chunk of each array, under the value's own name."""
    lines: list[str] = []
    for v in values:
        lines += broken(f"{writer.ref(v.name)} = {writer.at(v, part)}")
    return lines


def _bound_rooms(writer: StreamWriter) -> list[str]:
    """The names of what a room holds, one after the other."""
    lines: list[str] = []
    for k in range(len(writer.shapes)):
        room = f"room_{k + 1}[room]"
        names: list[str] = []
        for name in [writer.ref(name) for name, number in writer.rooms.items() if number == k]:
            if names and len(" = ".join([*names, name, room])) + 12 > WIDTH:
                lines.append(" = ".join([*names, room]))
                names = []
            names.append(name)
        lines.append(" = ".join([*names, room]))
    return lines


def _chunk_statements(
    writer: StreamWriter, ops: Sequence[Op], parts: Mapping[str, str], needs: Mapping[Op, str]
) -> list[str]:
    """The statements of one chunk, those of one condition together under one `if`.

    Args:
        writer: with its rooms.
        ops: in order.
        parts: which rows of the arrays over all tokens a chunk has, by the name of the result.
        needs: the condition under which an op runs.
    """
    lines: list[str] = [""]
    section, condition = ops[0].out.part, ""
    for op in ops:
        if op.out.part != section:
            section, condition = op.out.part, ""
            lines.append("")
        asked = needs.get(op, "")
        if asked and asked != condition:
            lines.append(f"if {asked}:")
        condition = asked
        writer.margin = 16 if asked else 12
        found = writer.streamed(op, parts.get(op.out.name, ""))
        lines += nested(found) if asked else found
    return lines
