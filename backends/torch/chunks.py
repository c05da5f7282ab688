"""Write the end of a program as a `torch.autograd.Function` that takes its tokens in chunks, forward and backward.

`tnmoe.autodiff.chunks` says where each value lies. Gradients of weights are summed up in place, inside the product, and
no chunk allocates anything: the page faults of fresh memory cost what chunks gain, see
docs/decisions/chunks-and-page-faults.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.chunks import Pass, backward_pass, forward_pass, kept_values, listed_values
from tnmoe.backends.torch.contractions import factors
from tnmoe.backends.torch.function_parts import dense_seed, described, restored
from tnmoe.backends.torch.lines import WIDTH, axes_comment, broken, indented, nested, wrapped
from tnmoe.backends.torch.statements import Writer, conditional
from tnmoe.ir.contractions import Add, Contract, ContractAdd, Multiply, Reduce, matmul_groups
from tnmoe.ir.ops import Op
from tnmoe.ir.pointwise_ops import Gelu, GeluBackward
from tnmoe.ir.value import Value

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


@dataclass
class StreamWriter(Writer):
    """Writes the ops that one chunk runs.

    Attributes:
        place: where each value lies.
        given: values that exist beforehand.
    """

    place: Pass | None = None
    given: tuple[Value, ...] = ()

    @property
    def token(self) -> str:
        """The index along which tokens are chunked."""
        return self.at_work.token

    @property
    def at_work(self) -> Pass:
        """The pass that is written."""
        assert self.place is not None
        return self.place

    def whole(self, name: str) -> str:
        """How the array of a value over all tokens is written."""
        return f"{self.ref(name)}_all"

    def length(self, index: str) -> str:
        """The size of an axis, as it is written."""
        if index not in self.program.dynamic:
            return str(self.program.sizes[index])
        holder = next(v for v in self.given if index in v.indices)
        name = self.whole(holder.name) if self.token in holder.indices else self.ref(holder.name)
        return f"{name}.shape[{holder.indices.index(index)}]"

    def lengths(self, group: tuple[str, ...]) -> list[str]:
        """As of every writer; a size that only the data knows is read where it is needed."""
        first = next((i for i in group if i in self.program.dynamic), "")
        return ["-1" if i == first else self.length(i) for i in group]

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
        if self.at_work.placed(op):
            bound = broken(f"{self.ref(out.name)} = {self.at(out, part)}") if part else []
            return [*bound, *broken(self._out(op, self.ref(out.name)), axes_comment(out.indices), self.margin)]
        lines = self.statement(op)
        return [*lines, f"{self.at(out, part)} = {self.ref(out.name)}"] if part else lines

    def _out(self, op: Op, target: str) -> str:
        """The call that writes the op's result into `target`."""
        match op:
            case Contract() | ContractAdd():
                g = matmul_groups(op)
                lhs, rhs = factors(op, g, self)
                into = self.view(op.out, g.axes)
                if isinstance(op, ContractAdd):
                    groups = (g.cols,) if set(op.bias.indices) == set(g.cols) else (g.rows, g.cols)
                    return f"torch.addmm({self.view(op.bias, groups)}, {lhs}, {rhs}, out={into})"
                return f"torch.{'bmm' if g.batch or g.outer else 'mm'}({lhs}, {rhs}, out={into})"
            case Multiply(out, lhs, rhs) | Add(out, lhs, rhs):
                call = "mul" if isinstance(op, Multiply) else "add"
                return f"torch.{call}({self.spread(lhs, out)}, {self.spread(rhs, out)}, out={target})"
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
        if isinstance(op, Contract) and self.at_work.added_in_place(op):
            g = matmul_groups(op)
            lhs, rhs = factors(op, g, self)
            into = self.view(op.out, g.axes)
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
    lines = [f"class {name}(torch.autograd.Function):", *described(a, kept_values(a), chunk), ""]
    lines += ["    @staticmethod", *_forward(a, chunk, product)]
    lines += ["", "    @staticmethod", "    @once_differentiable", *_backward(a, chunk, product)]
    return "\n".join(lines)


def _forward(a: Adjoint, chunk: int, product: str) -> list[str]:
    place, kept = forward_pass(a, placing=product == "@"), kept_values(a)
    program, token, ops, listed = place.program, place.token, place.ops, place.listed
    extended = [v for v in kept if v not in listed]
    writer = StreamWriter(program, attributes=False, product=product, place=place, given=a.inputs)
    first = writer.whole(a.inputs[0].name)
    lines = wrapped("    def forward(", ["ctx", "keep: bool", *(_saved(writer, v) for v in a.inputs)], ") -> Tensor:")
    body = ["keep = keep and any(ctx.needs_input_grad)"] if kept else []
    body += [f"tokens = {first}.shape[0]", f"most = min(tokens, {chunk})"]
    for op in place.once:
        body += writer.statement(op)
    body += writer.allocation(writer.whole(program.output.name), first, "tokens", program.output.indices)
    if extended:
        body.append("extent = tokens if keep else most")
    for v in extended:
        body += writer.allocation(writer.whole(v.name), first, "extent", v.indices)
    if listed:
        body.append("kept = []  # of every chunk")
    body += _rooms(writer, first)
    body.append(f"for at, room in _chunks(tokens, {chunk}):")
    inner = ["held = at if keep else room"] if extended else []
    inner += _bound(writer, [v for v in a.inputs if token in v.indices], "at")
    inner += _bound_rooms(writer)
    parts = {program.output.name: "at", **{v.name: "held" for v in extended}}
    inner += _chunk_statements(writer, ops, parts, {})
    if listed:
        names = [writer.ref(v.name) for v in listed]
        inner += ["if keep:", *nested(wrapped("kept += ", names, "", parenthesised=True, margin=16))]
        inner += writer.deleted(place.ends)
    body += nested(inner)
    saved = _saved_names(writer, a, listed)
    if kept:
        body += ["if keep:", *nested(wrapped("ctx.save_for_backward(", saved, ")", margin=12))]
    else:
        body += wrapped("ctx.save_for_backward(", saved, ")", margin=8)
    body.append(f"return {writer.whole(program.output.name)}")
    return [*lines, *indented(body)]


def _backward(a: Adjoint, chunk: int, product: str) -> list[str]:
    place = backward_pass(a, placing=product == "@")
    program, token, ops = place.program, place.token, place.ops
    writer = StreamWriter(program, attributes=False, product=product, place=place, given=(*a.saved, a.seed))
    seed = writer.whole(a.seed.name)
    position = {v.name: k + 1 for k, v in enumerate(a.inputs)}
    needs = {op: f"needs[{position[name]}]" for op, name in a.only_for.items()}
    asked = {op.out.name: condition for op, condition in needs.items()}
    lines = [f"    def backward(ctx, {seed}: Tensor):"]
    listed = listed_values(a, placing=place.placing)
    saved = _saved_names(writer, a, listed)
    body = restored(a, saved, 1)
    body += [f"tokens = {seed}.shape[0]", f"most = min(tokens, {chunk})"]
    for op in place.once:
        body += writer.statement(op)
    for v in place.arrays:
        condition = asked.get(v.name, "")
        body += writer.allocation(writer.whole(v.name), seed, "tokens", v.indices, condition=condition)
    for v in place.sums:
        condition = asked.get(v.name, "")
        body += writer.allocation(writer.ref(v.name), seed, "", v.indices, fill="zeros", condition=condition)
    body += _rooms(writer, seed)
    if listed:
        body.append(f"for number, (at, room) in enumerate(_chunks(tokens, {chunk})):")
    else:
        body.append(f"for at, room in _chunks(tokens, {chunk}):")
    inner = _bound(writer, [v for v in a.saved if token in v.indices and v not in listed], "at")
    inner += dense_seed(writer.ref(a.seed.name), writer.at(a.seed, "at"))
    if listed:
        names, n = [writer.ref(v.name) for v in listed], len(listed)
        part = "[number : number + 1]" if n == 1 else f"[{n} * number : {n} * (number + 1)]"
        inner += wrapped("", names, f" = kept{part}", parenthesised=True, margin=12)
    inner += _bound_rooms(writer)
    inner += _chunk_statements(writer, ops, {v.name: "at" for v in place.arrays}, needs)
    body += nested(inner)
    for op in place.after:
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


def _saved_names(writer: StreamWriter, a: Adjoint, listed: Sequence[Value]) -> list[str]:
    """What the backward pass reads, as it is written; last the tensors of every chunk."""
    return [*(_saved(writer, v) for v in a.saved if v not in listed), *(["*kept"] if listed else [])]


def _rooms(writer: StreamWriter, like: str) -> list[str]:
    lines: list[str] = []
    for k, shape in enumerate(writer.at_work.shapes, start=1):
        lines += writer.allocation(f"room_{k}", like, "most", shape)
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
    for k in range(len(writer.at_work.shapes)):
        room = f"room_{k + 1}[room]"
        names: list[str] = []
        for name in [writer.ref(name) for name, number in writer.at_work.rooms.items() if number == k]:
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
        statements = writer.streamed(op, parts.get(op.out.name, ""))
        statements += writer.deleted(writer.at_work.released.get(op.out.name, ()))
        lines += nested(statements) if asked else statements
    return lines
