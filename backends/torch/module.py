"""Write a program as the source of a torch module. Emission decides nothing: one op, one statement."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache

from tnmoe.backends.torch.copied import as_emitted, runtime_source
from tnmoe.backends.torch.freeze import freeze_method, frozen_init
from tnmoe.backends.torch.function import FAST_IMPORT, function_source
from tnmoe.backends.torch.kernels import IMPORT, kernel_sources
from tnmoe.backends.torch.lines import WIDTH, axes_comment, broken, docstring, indented
from tnmoe.backends.torch.methods import Unit, coefficients, diagnostics, forward, function_name, rows
from tnmoe.backends.torch.names import CLASSES, LOCALS, attribute
from tnmoe.backends.torch.routing import routing_sources
from tnmoe.backends.torch.statements import Writer
from tnmoe.errors import EmitError
from tnmoe.ir.dataflow import gate_ops
from tnmoe.ir.initialise import DiagonalNormal, Init, Normal, Ones, SharedUniform, Uniform, Zeros
from tnmoe.ir.pointwise_ops import Entmax15, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.value import Parameter, Role
from tnmoe.symbolic.dims import check_name


def emit(units: Sequence[Unit], heading: str) -> str:
    """The source of a file with one class per unit; it imports torch and nothing else.

    Args:
        units: in the order of their classes.
        heading: first line of the file's docstring.

    Raises:
        EmitError: a class name that is taken, or an op that has no torch form.
    """
    units = [made for u in units for made in ((u,) if u.frozen is None else (u, u.frozen.unit))]
    names = [check_name(u.name, "class") for u in units]
    taken = [n for k, n in enumerate(names) if n in LOCALS | CLASSES or n in names[:k]]
    if taken:
        raise EmitError(f"class name {taken[0]!r} is taken; choose another with name=…")
    ops = [op for u in units for op in u.program.ops + u.program.diagnostics]
    ops += [op for u in units if u.frozen is not None for op in u.frozen.folded.once]
    gates = [
        n for n, kind in (("entmax15", Entmax15), ("sparsemax", Sparsemax)) if any(isinstance(o, kind) for o in ops)
    ]
    functions = [u.function for u in units if u.function is not None]
    ops += [op for f in functions for op in f.adjoint.forward]
    kernels = kernel_sources(ops) if any(f.flavour == "triton" for f in functions) else ()
    helpers = dict.fromkeys(helper for f in functions for helper in f.helpers)
    bodies = [
        *(_gate_source(gate, called=not kernels or gate != "entmax15") for gate in gates),
        *kernels,
        *routing_sources(ops),
        *helpers,
        *(_class(u) for u in units if not u.inference),
    ]
    imports = ["import torch", "from torch import Tensor, nn"]
    if functions:
        imports.append("from torch.autograd.function import once_differentiable")
    if any(re.search(r"(?<![\w.])F\.", body) for body in bodies):
        imports.append("from torch.nn import functional as F")
    if any(f.flavour == "fast" for f in functions):
        imports.append(FAST_IMPORT)
    blocks = [f'"""{heading}"""', "\n".join(imports), *([IMPORT] if kernels else [])]
    return "\n\n".join(blocks) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


@cache
def _gate_source(name: str, *, called: bool) -> str:
    """What a gate's function needs, as it stands in `activations.py`, and the function that is called, if wanted."""
    text = runtime_source("activations")
    function = {"entmax15": "_Entmax15Root", "sparsemax": "_Sparsemax"}[name]
    definitions = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    parts = [
        ast.get_source_segment(text, definitions[n]) or ""
        for n in (f"_{name}_threshold", function, *([name] if called else []))
    ]
    return as_emitted("\n\n\n".join(parts))


_STARTS = "Draw fresh weights; the layer starts with the variance of nn.Linear."


# ---- one class -----------------------------------------------------------------------------------------------


def _class(unit: Unit, made_from: Unit | None = None) -> str:
    """The source of a class; of an inference form, if it is `made_from` another."""
    program = unit.program
    lines = [f"class {unit.name}(nn.Module):", *docstring([unit.title, *unit.notes], 4), ""]
    if made_from is None:
        lines += [*_init(program), "", *_reset(program, _STARTS if unit.batched else "Draw fresh weights.")]
    else:
        lines += frozen_init(made_from)
    writer = Writer(program, product=unit.product)
    gates = gate_ops(program)
    if unit.batched:
        lines += ["", *rows(program.inputs[0], program)]
    if program.coefficients:
        lines += ["", *coefficients(unit, writer, gates)]
    lines += ["", *forward(unit, writer, gates)]
    if any(not op.out.indices for op in program.diagnostics):
        lines += ["", *diagnostics(unit, writer)]
    if unit.frozen is not None:
        lines += ["", *freeze_method(unit.frozen)]
    lines += ["", "    def extra_repr(self) -> str:", *_extra_repr(unit.summary)]
    before = "" if unit.function is None else function_source(unit.function, function_name(unit)) + "\n\n\n"
    after = "" if unit.frozen is None else "\n\n\n" + _class(unit.frozen.unit, unit)
    return before + "\n".join(lines) + after


def _extra_repr(summary: str) -> list[str]:
    """A return statement of the text, broken after commas where it is too long."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    if len(summary) + 17 <= WIDTH:
        return [f"        return {quoted(summary)}"]
    if len(summary) + 14 <= WIDTH:
        return ["        return (", f"            {quoted(summary)}", "        )"]
    pieces = [""]
    for word in summary.split(", "):
        if len(pieces[-1]) + len(word) + 18 > WIDTH:
            pieces.append("")
        pieces[-1] += word + ", "
    pieces[-1] = pieces[-1].removesuffix(", ")
    return ["        return (", *(f"            {quoted(piece)}" for piece in pieces), "        )"]


def _shape(parameter: Parameter, program: Program) -> str:
    return ", ".join(str(program.sizes[i]) for i in parameter.indices)


def _init(program: Program) -> list[str]:
    lines = ["    def __init__(self, *, device=None, dtype=None) -> None:", "        super().__init__()"]
    if program.parameters or program.buffers:
        lines.append('        factory = {"device": device, "dtype": dtype}')
    for p in program.parameters:
        shape = f"({_shape(p, program)})" if not p.indices else _shape(p, program)
        frozen = ", requires_grad=False" if p.role is Role.FROZEN else ""
        value = f"nn.Parameter(torch.empty({shape}, **factory){frozen})"
        lines += indented(broken(f"self.{attribute(p.name)} = {value}", axes_comment(p.indices)))
    for b in program.buffers:
        value = f'self.register_buffer("{attribute(b.name)}", torch.empty({_shape(b, program)}, **factory))'
        lines += indented(broken(value, axes_comment(b.indices)))
    if program.parameters or program.buffers:
        lines.append("        self.reset_parameters()")
    return lines


def _reset(program: Program, purpose: str) -> list[str]:
    lines = ["    @torch.no_grad()", "    def reset_parameters(self) -> None:"]
    lines.append(f'        """{purpose}"""')
    for p in (*program.parameters, *program.buffers):
        lines += indented(_initialise(f"self.{attribute(p.name)}", p, p.init, program))
    if len(lines) == 3:
        return ["    def reset_parameters(self) -> None:", '        """There are no weights to draw."""']
    return lines


def _initialise(name: str, p: Parameter, init: Init, program: Program) -> list[str]:
    match init:
        case Zeros():
            return [f"nn.init.zeros_({name})"]
        case Ones():
            return [f"nn.init.ones_({name})"]
        case Normal(mean, std):
            return [f"nn.init.normal_({name}, {_number(mean)}, {_number(std)})"]
        case Uniform(bound, formula):
            line = f"nn.init.uniform_({name}, -{_number(bound)}, {_number(bound)})"
            return broken(line, f"  # ± {formula}" if len(line) + len(formula) + 13 <= WIDTH else "")
        case SharedUniform(indices, bound):
            # One draw for all entries along the shared axes, plus one of its own for each entry.
            shape = ", ".join("1" if i in indices else str(program.sizes[i]) for i in p.indices)
            low_high = f"-{_number(bound)}, {_number(bound)}"
            return [
                f"nn.init.uniform_({name}, {low_high})",
                *broken(f"shared = {name}.new_empty({shape}).uniform_({low_high})"),
                f"{name}.add_(shared)",
            ]
        case DiagonalNormal(rows, cols):
            axes = f"{p.indices.index(rows)}, {p.indices.index(cols)}"
            return [f"nn.init.zeros_({name})", f"nn.init.normal_({name}.diagonal(0, {axes}), 1.0, 1.0)"]
    raise EmitError(f"parameter {p.name!r} starts as {init}, which has no torch form")


def _number(value: object) -> str:
    return repr(float(str(value)))
