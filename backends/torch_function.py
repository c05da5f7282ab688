"""Write the end of a program as a `torch.autograd.Function` that keeps what was planned and repeats the rest.

The forward and the backward pass are the ops of `tnmoe.adjoint`, one statement each; emission decides nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tnmoe.adjoint import Adjoint
from tnmoe.backends.torch_statements import (
    WIDTH,
    Writer,
    axes_comment,
    broken,
    docstring,
    indented,
)
from tnmoe.ops import Op

AUTOCAST = '''\
def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast gives them to a matrix product; a function is of one type."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)'''
"""Helper of every emitted function."""

FAST = '''\
def _find_onednn():
    """oneDNN's x @ W.T + b, private in torch, if this torch has it and it multiplies; else None."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
        found = product(torch.eye(2), torch.ones(2, 2), None, "none", [], "")
        return product if torch.equal(found, torch.ones(2, 2)) else None
    except (AttributeError, RuntimeError):
        return None


_onednn = _find_onednn()


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b, plus a bias if given: by oneDNN for float32 on a CPU, else by public products."""
    eager = not torch.compiler.is_compiling() and torch.backends.mkldnn.enabled
    float32 = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if _onednn is not None and eager and float32 and 0 not in a.shape:
        return _onednn(a, b.mT, bias, "none", [], "")  # without autograd: for functions only
    return a @ b if bias is None else torch.addmm(bias, a, b)'''
"""Matrix product of the flavour `fast`."""

PRODUCTS = {"portable": "@", "fast": "_mm"}
"""What multiplies two matrices, by flavour."""


@dataclass(frozen=True, slots=True)
class FunctionUnit:
    """How the end of a program is emitted.

    Attributes:
        adjoint: its forward and backward pass; bound.
        flavour: of the matrix products, one of `PRODUCTS`.
        chunk: tokens that it takes at once, or None.
    """

    adjoint: Adjoint
    flavour: str = "portable"
    chunk: int | None = None

    @property
    def helpers(self) -> tuple[str, ...]:
        """Sources of the functions that the emitted one calls."""
        return (AUTOCAST, FAST) if self.flavour == "fast" else (AUTOCAST,)


def function_source(unit: FunctionUnit, name: str) -> str:
    """The class of the function, called `name`."""
    a = unit.adjoint
    own = {op.out.name for op in a.ops} - a.kept
    drops = {name: tuple(v for v in dead if v in own) for name, dead in a.program.drops.items()}
    program = replace(a.program, drops={name: dead for name, dead in drops.items() if dead})
    writer = Writer(program, attributes=False, product=PRODUCTS[unit.flavour])
    kept = [op.out for op in a.ops if op.out.name in a.kept and op.out in a.saved]
    lines = [f"class {name}(torch.autograd.Function):", *_docstring(unit), "", "    generate_vmap_rule = True", ""]
    names = [writer.ref(v.name) for v in a.inputs]
    results = [writer.ref(v.name) for v in (a.program.output, *kept)]
    lines += ["    @staticmethod", *_wrapped("    def forward(", names, ") -> tuple[Tensor, ...]:")]
    lines += indented(_statements(writer, a.ops, {}))
    lines += _wrapped("        return ", results, "", parenthesised=True)
    lines += ["", "    @staticmethod", "    def setup_context(ctx, inputs: tuple, output: tuple) -> None:"]
    saved = [writer.ref(v.name) for v in a.saved]
    used = [n if n in saved else "_" for n in names]
    lines += _wrapped("        ", used, " = inputs", parenthesised=True)
    if kept:
        lines += _wrapped("        ", ["_", *results[1:]], " = output", parenthesised=True)
        lines += _wrapped("        ctx.mark_non_differentiable(", results[1:], ")")
        lines.append("        ctx.set_materialize_grads(False)  # no zeros for what is only kept")
    lines += _wrapped("        ctx.save_for_backward(", saved, ")")
    lines += ["", "    @staticmethod", "    @once_differentiable", *_backward(unit, saved)]
    return "\n".join(lines)


def call_statements(unit: FunctionUnit, name: str, writer: Writer) -> list[str]:
    """The statements of the module's `forward` that call the function.

    Chunks bound the temporaries. What they gain in time is no matter of caches but of the allocator: glibc maps each
    tensor above its threshold (at most 32 MiB) anew, and trims the heap, so that every pass faults its pages in again.
    In a GPT-2 CP block of 4096 tokens (two threads, AMD EPYC) that was 32,000 faults and 28 of 246 ms forward; with
    buffers allocated beforehand, or the thresholds raised, the whole batch was at least as fast as chunks of 512.
    """
    a = unit.adjoint
    target, comment = writer.ref(a.program.output.name), axes_comment(a.program.output.indices)
    arguments = [writer.ref(v.name) for v in a.inputs]
    lines = _wrapped("operands = _autocast(", arguments, ")", margin=8)
    whole = f"{target} = {name}.apply(*operands)[0]{comment}"
    if unit.chunk is None:
        return [*lines, whole]
    data = sum(v.indices[:1] == a.seed.indices[:1] for v in a.inputs)
    parts = f"[{name}.apply(*row, *operands[{data}:])[0] for row in rows]"
    joined = f"    {target} = torch.cat({parts}){comment}"
    return [
        *lines,
        f"if torch.compiler.is_compiling() or operands[0].shape[0] <= {unit.chunk}:",
        f"    {whole}",
        "else:  # chunks of tokens, so that temporaries stay small",
        f"    rows = zip(*(a.split({unit.chunk}) for a in operands[:{data}]))",
        *(
            [joined]
            if len(joined) + 8 <= WIDTH
            else [f"    {target} = torch.cat(", f"        {parts}", f"    ){comment}"]
        ),
    ]


def _backward(unit: FunctionUnit, saved: Sequence[str]) -> list[str]:
    a = unit.adjoint
    program = a.as_program()
    writer = Writer(program, attributes=False, product=PRODUCTS[unit.flavour])
    seed = writer.ref(a.seed.name)
    lines = [f"    def backward(ctx, {seed}: Tensor, *_: None):"]
    body = _wrapped("", saved, " = ctx.saved_tensors", parenthesised=True, margin=8)
    if a.kept:
        body = [f"if {seed} is None:", f"    return (None,) * {len(a.inputs)}", *body]
    body.append("needs = ctx.needs_input_grad")
    position = {v.name: k for k, v in enumerate(a.inputs)}
    unplanned = [v.name for v in a.inputs if v.name not in a.wanted]
    for name in unplanned:
        body.append(f"if needs[{position[name]}]:")
        body += broken(f'    raise RuntimeError("this module was planned without a gradient of {name}")')
    conditions = {op: f"needs[{position[name]}]" for op, name in a.only_for.items()}
    body += _statements(writer, program.ops, conditions)
    results = [writer.ref(a.wanted[v.name].name) if v.name in a.wanted else "None" for v in a.inputs]
    body += _wrapped("return ", results, "", parenthesised=True, margin=8)
    return lines + indented(body)


def _statements(writer: Writer, ops: Sequence[Op], conditions: Mapping[Op, str]) -> list[str]:
    """One statement for each op, with a blank line between the parts of the layer."""
    lines = [f"{name} = {where}" for name, where in writer.runtime_sizes(ops).items()]
    part = ops[0].out.part
    for op in ops:
        lines += writer.drops(op)
        if op.out.part != part:
            part = op.out.part
            lines.append("")
        lines += _conditional(writer, op, conditions[op]) if op in conditions else writer.statement(op)
    return lines


def _conditional(writer: Writer, op: Op, condition: str) -> list[str]:
    """`out = expression if condition else None  # indices`."""
    value = writer.viewed(op)
    target, comment = writer.ref(op.out.name), axes_comment(op.out.indices)
    whole = f"{target} = {value} if {condition} else None{comment}"
    if len(whole) + 8 <= WIDTH:
        return [whole]
    inside = f"{value} if {condition} else None"
    if len(inside) + 12 <= WIDTH:
        return [f"{target} = (", f"    {inside}", f"){comment}"]
    return [f"{target} = (", f"    {value}", f"    if {condition}", "    else None", f"){comment}"]


def _docstring(unit: FunctionUnit) -> list[str]:
    a = unit.adjoint
    kept = [op.out.name for op in a.ops if op.out.name in a.kept and op.out in a.saved]
    repeated = [op.out.name for op in a.repeated]
    stored = {p.name for p in (*a.program.parameters, *a.program.buffers)}
    text = f"From {_listed([v.name for v in a.inputs if v.name not in stored]) or 'the weights'} to the output."
    text += f" Keeps {_listed(kept)}" if kept else " Keeps nothing but its inputs"
    text += f"; the backward pass computes {_listed(repeated)} again." if repeated else "."
    return docstring(textwrap.wrap(text, WIDTH - 10), 4)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _wrapped(start: str, names: Sequence[str], end: str, *, parenthesised: bool = False, margin: int = 0) -> list[str]:
    """`start`, the names with commas, `end`; in lines of at most the width, inside brackets where it is too long."""
    single = f"{start}{', '.join(names)}{',' if parenthesised and len(names) == 1 else ''}{end}"
    if len(single) + margin <= WIDTH:
        return [single]
    pad = " " * (len(start) - len(start.lstrip()))
    opening, closing = (start + "(", ")" + end) if parenthesised else (start, end)
    inside = f"{pad}    {', '.join(names)}"
    if len(inside) + margin <= WIDTH and not parenthesised:
        return [opening, inside, pad + closing]
    return [opening, *(f"{pad}    {name}," for name in names), pad + closing]
