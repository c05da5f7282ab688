"""Write a program as the source of a torch module. Emission decides nothing: one op, one statement."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tnmoe.backends.torch_function import FunctionUnit, call_statements, function_source
from tnmoe.backends.torch_names import CLASSES, LOCALS, attribute
from tnmoe.backends.torch_routing import routing_sources
from tnmoe.backends.torch_statements import (
    WIDTH,
    Writer,
    axes_comment,
    broken,
    docstring,
    indented,
)
from tnmoe.dims import check_name
from tnmoe.errors import EmitError
from tnmoe.initialise import DiagonalNormal, Init, Normal, Ones, SharedUniform, Uniform, Zeros
from tnmoe.layer import Parameter
from tnmoe.network import Role
from tnmoe.ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    LayerNorm,
    Op,
    Sparsemax,
    Split,
    Value,
    results,
)
from tnmoe.program import Program, gate_ops, needed
from tnmoe.routing_ops import Gather, Noise


@dataclass(frozen=True, slots=True)
class Unit:
    """One class to emit.

    Attributes:
        program: bound and laid out.
        name: of the class.
        title: first line of the class's docstring.
        summary: what `extra_repr` returns.
        notes: further lines of the docstring, e.g. the declaration and the plan.
        batched: the single input takes any leading axes.
        function: the end of the program as a function with a backward pass of its own, if it is to have one.
    """

    program: Program
    name: str
    title: str
    summary: str
    notes: Sequence[str] = ()
    batched: bool = True
    function: FunctionUnit | None = None


def emit(units: Sequence[Unit], heading: str) -> str:
    """The source of a file with one class per unit; it imports torch and nothing else.

    Args:
        units: in the order of their classes.
        heading: first line of the file's docstring.

    Raises:
        EmitError: a class name that is taken, or an op that has no torch form.
    """
    names = [check_name(u.name, "class") for u in units]
    taken = [n for k, n in enumerate(names) if n in LOCALS | CLASSES or n in names[:k]]
    if taken:
        raise EmitError(f"class name {taken[0]!r} is taken; choose another with name=…")
    ops = [op for u in units for op in u.program.ops + u.program.diagnostics]
    gates = [
        n for n, kind in (("entmax15", Entmax15), ("sparsemax", Sparsemax)) if any(isinstance(o, kind) for o in ops)
    ]
    functional = any(
        isinstance(op, LayerNorm | BatchNorm | Gelu | Noise | Gather) or (isinstance(op, Split) and op.padded)
        for op in ops
    )
    imports = ["import torch", "from torch import Tensor, nn"]
    if functional:
        imports.append("from torch.nn import functional as F")
    functions = [u.function for u in units if u.function is not None]
    if functions:
        imports.insert(2, "from torch.autograd.function import once_differentiable")
    helpers = dict.fromkeys(helper for f in functions for helper in f.helpers)
    bodies = [*(_gate_source(gate) for gate in gates), *routing_sources(ops), *helpers, *(_class(u) for u in units)]
    blocks = [f'"""{heading}"""', "\n".join(imports)]
    return "\n\n".join(blocks) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


@cache
def _gate_source(name: str) -> str:
    """A gate's function and what it needs, as they stand in `activations.py`."""
    text = Path(__file__).with_name("activations.py").read_text(encoding="utf-8")
    function = {"entmax15": "_Entmax15Root", "sparsemax": "_Sparsemax"}[name]
    found = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    parts = [ast.get_source_segment(text, found[n]) or "" for n in (f"_{name}_threshold", function, name)]
    return re.sub(r"  # type: ignore\[.*\]", "", "\n\n\n".join(parts)).replace("ctx: Any", "ctx")


_STARTS = "Draw fresh weights; the layer starts with the variance of nn.Linear."


# ---- one class -----------------------------------------------------------------------------------------------


def _class(unit: Unit) -> str:
    program = unit.program
    lines = [f"class {unit.name}(nn.Module):", *docstring([unit.title, *unit.notes], 4), ""]
    lines += [*_init(program), "", *_reset(program, _STARTS if unit.batched else "Draw fresh weights.")]
    writer = Writer(program)
    gates = gate_ops(program)
    if unit.batched:
        lines += ["", *_rows(program.inputs[0], program)]
    if gates:
        lines += ["", *_coefficients(unit, writer, gates)]
    lines += ["", *_forward(unit, writer, gates)]
    if program.diagnostics:
        lines += ["", *_diagnostics(unit, writer)]
    lines += ["", "    def extra_repr(self) -> str:", *_extra_repr(unit.summary)]
    if unit.function is not None:
        return function_source(unit.function, _function_name(unit)) + "\n\n\n" + "\n".join(lines)
    return "\n".join(lines)


def _function_name(unit: Unit) -> str:
    return f"_{unit.name}Function"


def _extra_repr(summary: str) -> list[str]:
    """A return statement of the text, broken after commas where it is too long."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    if len(summary) + 17 <= WIDTH:
        return [f"        return {quoted(summary)}"]
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


def _rows(x: Value, program: Program) -> list[str]:
    width = program.sizes[x.indices[-1]]
    return [
        f"    def _rows(self, {x.name}: Tensor) -> Tensor:",
        '        """All leading axes flattened into one."""',
        f"        if {x.name}.ndim == 0 or {x.name}.shape[-1] != {width}:",
        f'            raise ValueError(f"expected (..., {width}), got {{tuple({x.name}.shape)}}")',
        f"        return {x.name}.reshape(-1, {width}){axes_comment(x.indices)}",
    ]


def _coefficients(unit: Unit, writer: Writer, ops: Sequence[Op]) -> list[str]:
    program = unit.program
    (x,) = program.inputs
    width = program.sizes[x.indices[-1]]
    names = [writer.ref(n) for n in program.coefficients]
    several = len(names) > 1
    running = any(isinstance(op, BatchNorm) for op in ops)
    levels = "one (..., experts) tensor for each level" if several else "a tuple of one (..., experts) tensor"
    written = {v.name: v for op in ops for v in results(op)}
    if any(written[name].integer for name in program.coefficients):
        levels = "those of the chosen ones, and which they are, (..., choices) each"
    lines = [
        f"    def expert_coefficients(self, {x.name}: Tensor) -> tuple[Tensor, ...]:",
        f'        """Shares of the experts for (..., {width}): {levels}."""',
        f"        lead = {x.name}.shape[:-1]",
        f"        levels = self._coefficients(self._rows({x.name}){', update=False' if running else ''})",
        "        return tuple(a.reshape(*lead, a.shape[-1]) for a in levels)",
        "",
    ]
    if running:
        # One row has no variance; and looking at the coefficients must not move the running statistics.
        lines.append(f"    def _coefficients(self, {x.name}: Tensor, update: bool = True) -> tuple[Tensor, ...]:")
        condition = f"self.training if {x.name}.shape[0] > 1 else False"
        lines.append(f"        training = {condition}  # one row has no variance")
        lines.append("        momentum = 0.1 if update else 0.0  # of the running statistics")
    else:
        lines.append(f"    def _coefficients(self, {x.name}: Tensor) -> tuple[Tensor, ...]:")
    for op in ops:
        lines += indented([*writer.drops(op), *writer.statement(op)])
    lines.append(f"        return {_tuple(names)}")
    return lines


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _forward(unit: Unit, writer: Writer, gates: Sequence[Op]) -> list[str]:
    program = unit.program
    arguments = ", ".join(f"{writer.ref(v.name)}: Tensor" for v in program.inputs)
    lines = [f"    def forward(self, {arguments}) -> Tensor:" if arguments else "    def forward(self) -> Tensor:"]
    if unit.batched:
        (x,) = program.inputs
        width_in, width_out = program.sizes[x.indices[-1]], program.sizes[program.output.indices[-1]]
        lines.append(f'        """Map (..., {width_in}) to (..., {width_out})."""')
        lines.append(f"        lead = {x.name}.shape[:-1]")
        lines.append(f"        {x.name} = self._rows({x.name}){axes_comment(x.indices)}")
    else:
        shapes = ", ".join(f"{writer.ref(v.name)} ({' '.join(v.indices)})" for v in program.inputs)
        lines += docstring([f"Contract {shapes or 'the weights'} to ({' '.join(program.output.indices)})."], 8)
    if gates:
        names = [writer.ref(n) for n in program.coefficients]
        axes = {v.name: " ".join(v.indices) for op in gates for v in results(op)}
        comment = ", ".join(axes[name] for name in program.coefficients)
        lines.append(f"        {_tuple(names)} = self._coefficients({x.name})  # {comment}")
    ops = program.ops if unit.function is None else unit.function.adjoint.before
    for name, where in writer.runtime_sizes(ops).items():
        lines.append(f"        {name} = {where}")
    done = set(gates)
    part = "gate" if gates else ops[0].out.part if ops else ""
    for op in ops:
        if op in done:
            continue
        lines += indented(writer.drops(op) if unit.function is None else [])
        if op.out.part != part:
            part = op.out.part
            lines.append("")
        lines += indented(writer.statement(op))
    if unit.function is not None:
        lines += ["", *indented(call_statements(unit.function, _function_name(unit), writer))]
    result = writer.ref(program.output.name)
    if unit.batched:
        lines.append(f"        return {result}.reshape(*lead, {width_out})")
    else:
        lines.append(f"        return {result}")
    return lines


def _diagnostics(unit: Unit, writer: Writer) -> list[str]:
    """A method of its own: what the scalars need is computed again, so nothing of a forward pass is kept."""
    program = unit.program
    (x,) = program.inputs
    scalars = [op.out.name for op in program.diagnostics if not op.out.indices]
    lines = [
        f"    def diagnostics(self, {x.name}: Tensor) -> dict[str, Tensor]:",
        *docstring([f"Scalars of the router for (..., {program.sizes[x.indices[-1]]}): {', '.join(scalars)}."], 8),
        f"        {x.name} = self._rows({x.name}){axes_comment(x.indices)}",
    ]
    for op in needed(program.ops + program.diagnostics, scalars):
        lines += indented(writer.statement(op))
    pairs = ", ".join(f'"{name}": {writer.ref(name)}' for name in scalars)
    return [*lines, *indented([f"return {{{pairs}}}"])]
