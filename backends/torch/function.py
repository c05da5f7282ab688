"""Write the end of a program as a `torch.autograd.Function` that keeps what was planned and repeats the rest.

The forward and the backward pass are the ops of `tnmoe.autodiff.adjoint`, one statement each; emission decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.backends.torch.chunks import CHUNKS, TRACED, stream_source
from tnmoe.backends.torch.copied import as_emitted, runtime_source
from tnmoe.backends.torch.function_parts import dense_seed, described, restored
from tnmoe.backends.torch.lines import axes_comment, indented, nested, wrapped
from tnmoe.backends.torch.statements import Writer, conditional
from tnmoe.footprint.liveness import released_backward, released_forward, released_inference
from tnmoe.ir.bound import BoundProgram
from tnmoe.ir.ops import Op

AUTOCAST = '''\
def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast gives them to a matrix product; a function is of one type."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)'''
"""Helper of emitted functions that run under autocast."""

AUTOCASTS = '''\
def _autocasts(t: Tensor) -> bool:
    """Whether autocast chooses the types of products where the tensor lies."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)'''
"""Helper of those that step aside under autocast."""

GELU = '''\
def _gelu(x: Tensor) -> Tensor:
    """GELU, over its operand where there is no autograd, which would read that."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)'''
"""Helper of plain statements that run with autograd and without."""

_PRODUCT = runtime_source("onednn")
FAST = as_emitted(_PRODUCT.partition("import flop_registry, register_flop_formula\n")[2]).strip()
"""Matrix product of the flavour `fast`, and its FLOPs."""

FAST_IMPORT = "from torch.utils.flop_counter import flop_registry, register_flop_formula"

PRODUCTS = {"portable": "@", "fast": "_mm", "triton": "@"}
"""What multiplies two matrices, by flavour."""


@dataclass(frozen=True)
class FunctionUnit:
    """How the end of a program is emitted.

    Attributes:
        adjoint: its forward and backward pass; bound.
        flavour: of the matrix products, one of `PRODUCTS`.
        chunk: tokens that it takes at once, or None for all; see `tnmoe.backends.torch.chunks`.
        aside: plain statements run in its place under autocast.
    """

    adjoint: Adjoint
    flavour: str = "portable"
    chunk: int | None = None
    aside: bool = False

    @cached_property
    def undifferentiated(self) -> BoundProgram:
        """The whole forward program as it runs without autograd."""
        return released_inference(self.adjoint)

    @property
    def helpers(self) -> tuple[str, ...]:
        """Sources of the functions that the emitted one calls."""
        sources = [AUTOCASTS if self.aside else AUTOCAST]
        sources += [] if self.chunk is None else [TRACED, CHUNKS]
        sources += [GELU] if self.aside and self.undifferentiated.overwrites else []
        sources += [FAST] if self.flavour == "fast" else []
        return tuple(sources)


def function_source(unit: FunctionUnit, name: str) -> str:
    """The class of the function, called `name`."""
    a = unit.adjoint
    if unit.chunk is not None:
        return stream_source(a, name, unit.chunk, PRODUCTS[unit.flavour])
    own = {op.out.name for op in a.forward} - a.kept
    forward = released_forward(a)
    released = {name: tuple(v for v in dead if v in own) for name, dead in forward.released.items()}
    program = replace(forward, released={name: dead for name, dead in released.items() if dead})
    writer = Writer(program, attributes=False, product=PRODUCTS[unit.flavour])
    kept = [op.out for op in a.ops if op.out.name in a.kept and op.out in a.saved]
    lines = [
        f"class {name}(torch.autograd.Function):",
        *described(a, kept, None),
        "",
        "    generate_vmap_rule = True",
        "",
    ]
    names = [writer.ref(v.name) for v in a.inputs]
    results = [writer.ref(v.name) for v in (a.program.output, *kept)]
    lines += ["    @staticmethod", *wrapped("    def forward(", names, ") -> tuple[Tensor, ...]:")]
    lines += indented(_statements(writer, a.forward, {}))
    lines += wrapped("        return ", results, "", parenthesised=True)
    lines += ["", "    @staticmethod", "    def setup_context(ctx, inputs: tuple, output: tuple) -> None:"]
    saved = [writer.ref(v.name) for v in a.saved]
    used = [n if n in saved else "_" for n in names]
    lines += wrapped("        ", used, " = inputs", parenthesised=True)
    if kept:
        lines += wrapped("        ", ["_", *results[1:]], " = output", parenthesised=True)
        lines += wrapped("        ctx.mark_non_differentiable(", results[1:], ")")
        lines.append("        ctx.set_materialize_grads(False)  # no zeros for what is only kept")
    lines += wrapped("        ctx.save_for_backward(", saved, ")")
    lines += ["", "    @staticmethod", "    @once_differentiable", *_backward(unit, saved)]
    return "\n".join(lines)


def call_statements(unit: FunctionUnit, name: str, writer: Writer) -> list[str]:
    """The statements of the module's `forward` that call the function."""
    a = unit.adjoint
    target, comment = writer.ref(a.program.output.name), axes_comment(a.program.output.indices)
    arguments = [writer.ref(v.name) for v in a.inputs]
    writer.margin = 12
    sizes = [f"{name} = {where}" for name, where in writer.runtime_sizes(a.ops).items()]
    operands = nested(wrapped("operands = _autocast(", arguments, ")", margin=12))
    if unit.chunk is None:
        plain = replace(writer, program=unit.undifferentiated, gelu="_gelu" if unit.aside else writer.gelu)
        ops = [op for op in plain.program.ops if op not in a.before]
        statements = [line for op in ops for line in (*plain.releases(op), *plain.statement(op))]
        if unit.aside:
            condition = f"if torch.is_grad_enabled() and not _autocasts({arguments[0]}):"
            call = nested(wrapped(f"{target} = {name}.apply(", arguments, f")[0]{comment}", margin=12))
        else:
            condition = "if torch.is_grad_enabled():"
            call = [*operands, f"    {target} = {name}.apply(*operands)[0]{comment}"]
        return [condition, *call, "else:", *nested([*sizes, *statements])]
    return [
        "if _traced():",
        *nested(sizes),
        *nested([line for op in a.ops for line in writer.statement(op)]),
        f"else:  # {unit.chunk} tokens at a time",
        *operands,
        f"    {target} = {name}.apply(torch.is_grad_enabled(), *operands){comment}",
    ]


def _backward(unit: FunctionUnit, saved: Sequence[str]) -> list[str]:
    a = unit.adjoint
    program = released_backward(a)
    writer = Writer(program, attributes=False, product=PRODUCTS[unit.flavour])
    seed = writer.ref(a.seed.name)
    lines = [f"    def backward(ctx, {seed}: Tensor, *_: None):"]
    body = restored(a, saved, 0)
    body += dense_seed(seed, seed)
    if a.kept:
        body = [f"if {seed} is None:", f"    return (None,) * {len(a.inputs)}", *body]
    position = {v.name: k for k, v in enumerate(a.inputs)}
    conditions = {op: f"needs[{position[name]}]" for op, name in a.only_for.items()}
    body += _statements(writer, program.ops, conditions)
    results = [writer.ref(a.wanted[v.name].name) if v.name in a.wanted else "None" for v in a.inputs]
    body += wrapped("return ", results, "", parenthesised=True, margin=8)
    return lines + indented(body)


def _statements(writer: Writer, ops: Sequence[Op], conditions: Mapping[Op, str]) -> list[str]:
    """One statement for each op, with a blank line between the parts of the layer."""
    lines = [f"{name} = {where}" for name, where in writer.runtime_sizes(ops).items()]
    part = ops[0].out.part
    for op in ops:
        lines += writer.releases(op)
        if op.out.part != part:
            part = op.out.part
            lines.append("")
        lines += conditional(writer, op, conditions[op]) if op in conditions else writer.statement(op)
    return lines
