"""Write a program as the source of a torch module. Emission decides nothing: one op, one statement."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tnmoe.dims import check_name
from tnmoe.errors import EmitError
from tnmoe.initialise import DiagonalNormal, Init, Normal, Ones, SharedUniform, Uniform, Zeros
from tnmoe.layer import Parameter
from tnmoe.network import Role
from tnmoe.ops import (
    Add,
    BatchNorm,
    Contract,
    ContractAdd,
    Entmax15,
    Gelu,
    LayerNorm,
    Multiply,
    Op,
    Permute,
    Reduce,
    Sigmoid,
    Softmax,
    Sparsemax,
    Value,
    matmul_groups,
    operands,
    results,
)
from tnmoe.program import Program

WIDTH = 100
"""Longest line of an emitted file."""

CLASSES = frozenset(dir(builtins)) | {"_Entmax15Root", "_Sparsemax"}
"""Names that a class of the user's must not hide from the emitted code."""

LOCALS = frozenset(
    {
        "self",
        "torch",
        "nn",
        "F",
        "Tensor",
        "entmax15",
        "sparsemax",
        "lead",
        "training",
        "momentum",
        "update",
        "mean",
        "var",
    }
)
"""Names that the emitted code uses itself; a value called so gets a trailing underscore."""

MODULE_ATTRIBUTES = frozenset(
    [
        "T_destination",
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "compile",
        "cpu",
        "cuda",
        "double",
        "dump_patches",
        "eval",
        "expert_coefficients",
        "extra_repr",
        "float",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "reset_parameters",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "xpu",
        "zero_grad",
    ]
)
"""Public attributes of `torch.nn.Module` and of the emitted class; a weight called so gets an underscore."""


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
    """

    program: Program
    name: str
    title: str
    summary: str
    notes: Sequence[str] = ()
    batched: bool = True


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
    ops = [op for u in units for op in u.program.ops]
    gates = [
        n for n, kind in (("entmax15", Entmax15), ("sparsemax", Sparsemax)) if any(isinstance(o, kind) for o in ops)
    ]
    functional = any(isinstance(op, LayerNorm | BatchNorm | Gelu) for op in ops)
    imports = ["import torch", "from torch import Tensor, nn"]
    if functional:
        imports.append("from torch.nn import functional as F")
    blocks = [f'"""{heading}"""', "\n".join(imports)]
    bodies = [_gate_source(gate) for gate in gates] + [_class(u) for u in units]
    return "\n\n".join(blocks) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


@cache
def _gate_source(name: str) -> str:
    """A gate's function and its autograd function, as they stand in `activations.py`."""
    text = Path(__file__).with_name("activations.py").read_text(encoding="utf-8")
    function = {"entmax15": "_Entmax15Root", "sparsemax": "_Sparsemax"}[name]
    found = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    parts = [ast.get_source_segment(text, found[n]) or "" for n in (function, name)]
    return re.sub(r"  # type: ignore\[.*\]", "", "\n\n\n".join(parts)).replace("ctx: Any", "ctx")


_STARTS = "Draw fresh weights; the layer starts with the variance of nn.Linear."


# ---- one class -----------------------------------------------------------------------------------------------


def _class(unit: Unit) -> str:
    program = unit.program
    lines = [f"class {unit.name}(nn.Module):", *_docstring([unit.title, *unit.notes], 4), ""]
    lines += [*_init(program), "", *_reset(program, _STARTS if unit.batched else "Draw fresh weights.")]
    writer = _Writer(program)
    gate_ops = _needed(program, program.coefficients)
    if unit.batched:
        lines += ["", *_rows(program.inputs[0], program)]
    if gate_ops:
        lines += ["", *_coefficients(unit, writer, gate_ops)]
    lines += ["", *_forward(unit, writer, gate_ops)]
    lines += ["", "    def extra_repr(self) -> str:", *_extra_repr(unit.summary)]
    return "\n".join(lines)


def _docstring(lines: Sequence[str], indent: int) -> list[str]:
    pad = " " * indent
    clean = [
        part.replace("\\", "\\\\").replace('"""', "'''")
        for line in lines
        for part in textwrap.wrap(line, WIDTH - indent, subsequent_indent=_margin(line) + "    ") or [""]
    ]
    if len(clean) == 1:
        return [f'{pad}"""{clean[0]}"""']
    return [f'{pad}"""{clean[0]}', *((pad + line).rstrip() for line in clean[1:]), f'{pad}"""']


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


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


def _safe(name: str, taken: frozenset[str]) -> str:
    """`name`, or with one more underscore if it, or it without its last ones, is taken."""
    return name + "_" if name in taken or name.rstrip("_") in taken else name


def attribute(name: str) -> str:
    """The attribute of the emitted module that stores the value `name`."""
    return _safe(name, MODULE_ATTRIBUTES)


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
        lines += _indented(_broken(f"self.{attribute(p.name)} = {value}", _comment(p.indices)))
    for b in program.buffers:
        value = f'self.register_buffer("{attribute(b.name)}", torch.empty({_shape(b, program)}, **factory))'
        lines += _indented(_broken(value, _comment(b.indices)))
    if program.parameters or program.buffers:
        lines.append("        self.reset_parameters()")
    return lines


def _comment(indices: Sequence[str]) -> str:
    return f"  # {' '.join(indices)}" if indices else ""


def _reset(program: Program, purpose: str) -> list[str]:
    lines = ["    @torch.no_grad()", "    def reset_parameters(self) -> None:"]
    lines.append(f'        """{purpose}"""')
    for p in (*program.parameters, *program.buffers):
        lines += _indented(_initialise(f"self.{attribute(p.name)}", p, p.init, program))
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
            return _broken(line, f"  # ± {formula}" if len(line) + len(formula) + 13 <= WIDTH else "")
        case SharedUniform(indices, bound):
            # One draw for all entries along the shared axes, plus one of its own for each entry.
            shape = ", ".join("1" if i in indices else str(program.sizes[i]) for i in p.indices)
            low_high = f"-{_number(bound)}, {_number(bound)}"
            return [
                f"nn.init.uniform_({name}, {low_high})",
                *_broken(f"shared = {name}.new_empty({shape}).uniform_({low_high})"),
                f"{name}.add_(shared)",
            ]
        case DiagonalNormal(rows, cols):
            axes = f"{p.indices.index(rows)}, {p.indices.index(cols)}"
            return [f"nn.init.zeros_({name})", f"nn.init.normal_({name}.diagonal(0, {axes}), 1.0, 1.0)"]
    raise EmitError(f"parameter {p.name!r} starts as {init}, which has no torch form")


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"        {line}" for line in lines]


def _number(value: object) -> str:
    return repr(float(str(value)))


def _needed(program: Program, names: Sequence[str]) -> tuple[Op, ...]:
    """The ops that the values `names` depend on, in order."""
    wanted = set(names)
    found: list[Op] = []
    for op in reversed(program.ops):
        if op.out.name in wanted:
            found.append(op)
            wanted |= {v.name for v in operands(op)}
    return tuple(reversed(found))


def _rows(x: Value, program: Program) -> list[str]:
    width = program.sizes[x.indices[-1]]
    return [
        f"    def _rows(self, {x.name}: Tensor) -> Tensor:",
        '        """All leading axes flattened into one."""',
        f"        if {x.name}.ndim == 0 or {x.name}.shape[-1] != {width}:",
        f'            raise ValueError(f"expected (..., {width}), got {{tuple({x.name}.shape)}}")',
        f"        return {x.name}.reshape(-1, {width}){_comment(x.indices)}",
    ]


def _coefficients(unit: Unit, writer: _Writer, ops: Sequence[Op]) -> list[str]:
    program = unit.program
    (x,) = program.inputs
    width = program.sizes[x.indices[-1]]
    names = [writer.ref(n) for n in program.coefficients]
    several = len(names) > 1
    running = any(isinstance(op, BatchNorm) for op in ops)
    levels = "one (..., experts) tensor for each level" if several else "a tuple of one (..., experts) tensor"
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
        lines += _indented(writer.statement(op))
    lines.append(f"        return {_tuple(names)}")
    return lines


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _forward(unit: Unit, writer: _Writer, gate_ops: Sequence[Op]) -> list[str]:
    program = unit.program
    arguments = ", ".join(f"{writer.ref(v.name)}: Tensor" for v in program.inputs)
    lines = [f"    def forward(self, {arguments}) -> Tensor:" if arguments else "    def forward(self) -> Tensor:"]
    if unit.batched:
        (x,) = program.inputs
        width_in, width_out = program.sizes[x.indices[-1]], program.sizes[program.output.indices[-1]]
        lines.append(f'        """Map (..., {width_in}) to (..., {width_out})."""')
        lines.append(f"        lead = {x.name}.shape[:-1]")
        lines.append(f"        {x.name} = self._rows({x.name}){_comment(x.indices)}")
    else:
        shapes = ", ".join(f"{writer.ref(v.name)} ({' '.join(v.indices)})" for v in program.inputs)
        lines += _docstring([f"Contract {shapes or 'the weights'} to ({' '.join(program.output.indices)})."], 8)
    if gate_ops:
        names = [writer.ref(n) for n in program.coefficients]
        comment = ", ".join(" ".join(op.out.indices) for op in gate_ops if op.out.name in program.coefficients)
        lines.append(f"        {_tuple(names)} = self._coefficients({x.name})  # {comment}")
    for name, where in writer.runtime_sizes(program.ops).items():
        lines.append(f"        {name} = {where}")
    done = set(gate_ops)
    part = "gate" if gate_ops else program.ops[0].out.part if program.ops else ""
    for op in program.ops:
        if op in done:
            continue
        if op.out.part != part:
            part = op.out.part
            lines.append("")
        lines += _indented(writer.statement(op))
    result = writer.ref(program.output.name)
    if unit.batched:
        lines.append(f"        return {result}.reshape(*lead, {width_out})")
    else:
        lines.append(f"        return {result}")
    return lines


def _broken(line: str, comment: str = "") -> list[str]:
    """A statement that is too long, broken as formatters break it: inside its last brackets, if it ends with them."""
    if len(line) + len(comment) + 8 <= WIDTH or not line.endswith(")"):
        return [line + comment]
    depth, start, commas = 0, len(line), []
    while start == len(line) or depth:
        start -= 1
        depth += {")": 1, "(": -1}.get(line[start], 0)
        if depth == 1 and line[start] == ",":
            commas.append(start)
    inside = line[start + 1 : -1]
    if len(inside) + 12 <= WIDTH:
        return [line[: start + 1], f"    {inside}", f"){comment}"]
    ends = [*reversed(commas), len(line) - 1]
    begins = [start + 1, *(c + 1 for c in reversed(commas))]
    return [line[: start + 1], *(f"    {line[i:j].strip()}," for i, j in zip(begins, ends, strict=True)), f"){comment}"]


# ---- one op --------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Statements of a program's ops."""

    program: Program
    stored: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.stored = frozenset(p.name for p in (*self.program.parameters, *self.program.buffers))
        names = [v.name for v in self.program.leaves] + [v.name for op in self.program.ops for v in results(op)]
        written = Counter(self.ref(name) for name in names)
        clash = [name for name in names if written[self.ref(name)] > 1]
        if clash:
            raise EmitError(f"{clash[0]!r} and {clash[1]!r} would both be written {self.ref(clash[0])!r}; rename one")

    def ref(self, name: str) -> str:
        """How the value `name` is written."""
        if name in self.stored:
            return f"self.{attribute(name)}"
        if name.startswith("size_"):
            return name + "_"  # as `runtime_sizes` calls its variables
        return _safe(name, LOCALS | frozenset(keyword.softkwlist))

    def runtime_sizes(self, ops: Sequence[Op]) -> dict[str, str]:
        """Sizes that only the data knows and that some view has to name: variable to expression."""
        needed: set[str] = set()
        for op in ops:
            if isinstance(op, Contract | ContractAdd):
                g = matmul_groups(op)
                for group in (g.rows, g.cols):
                    free = [i for i in group if i in self.program.dynamic]
                    if len(group) > 1 and len(free) > 1:
                        needed.update(free[1:])
        found: dict[str, str] = {}
        for index in sorted(needed):
            holder = next(v for v in self.program.inputs if index in v.indices)
            found[f"size_{index}"] = f"{self.ref(holder.name)}.shape[{holder.indices.index(index)}]"
        return found

    def statement(self, op: Op) -> list[str]:
        """`out = expression  # indices`; a view of the result goes on a line of its own if both are too long."""
        target, comment = self.ref(op.out.name), _comment(op.out.indices)
        if isinstance(op, BatchNorm):
            statistics = f"mean, var = {self.ref(op.mean.name)}, {self.ref(op.var.name)}"
            return [statistics, f"{target} = {self._elementwise(op)}{comment}"]
        expression, views = self.expression(op)
        if views and isinstance(op, Contract):
            whole = f"{target} = ({expression}){views}{comment}"
        else:
            whole = f"{target} = {expression}{views}{comment}"
        if len(whole) + 8 <= WIDTH:
            return [whole]
        if views and isinstance(op, Contract | ContractAdd):
            product = _broken(f"{target} = {expression}", f"  # {self._merged(op)}")
            return [*product, *_broken(f"{target} = {target}{views}", comment)]
        return _broken(f"{target} = {expression}", comment)

    def expression(self, op: Op) -> tuple[str, str]:
        """What the op computes, and the view (if any) that gives the result its axes."""
        if isinstance(op, Contract | ContractAdd):
            return self._product(op), self._result_view(op)
        return self._elementwise(op), ""

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
            case Softmax(_, value, index):
                return f"torch.softmax({x}, {value.indices.index(index) - len(value.indices)})"
            case Entmax15() | Sparsemax():
                if op.x.indices[-1] != op.index:
                    raise EmitError(f"{type(op).__name__} runs over the last axis, but {op.index!r} is not last")
                return f"{'entmax15' if isinstance(op, Entmax15) else 'sparsemax'}({x})"
            case Sigmoid():
                return f"torch.sigmoid({x})"
            case Gelu():
                return f"F.gelu({x})"
            case LayerNorm(_, _, index, weight, bias):
                affine = "".join(f", {self.ref(v.name)}" for v in (weight, bias) if v)
                return f"F.layer_norm({x}, ({self.program.sizes[index]},){affine})"
            case BatchNorm():
                return f"F.batch_norm({x}, mean, var, None, None, training, momentum)"
            case _:
                raise EmitError(
                    f"op {type(op).__name__} has no torch form yet: routed layers can be costed, not emitted"
                )

    def _product(self, op: Contract | ContractAdd) -> str:
        g = matmul_groups(op)
        lhs = self._matrix(op.lhs, g.batch, g.rows, g.inner)
        rhs = self._matrix(op.rhs, g.batch, g.inner, g.cols)
        if isinstance(op, ContractAdd):
            groups = (g.cols,) if set(op.bias.indices) == set(g.cols) else (g.rows, g.cols)
            return f"torch.addmm({self._view(op.bias, groups)}, {lhs}, {rhs})"
        return f"{lhs} @ {rhs}"

    def _result_view(self, op: Contract | ContractAdd) -> str:
        g = matmul_groups(op)
        text = ""
        for group, axis in ((g.rows, len(g.batch)), (g.cols, -1)):
            if len(group) > 1:
                text += f".unflatten({axis}, ({', '.join(self._sizes(group))}))"
            elif not group:
                text += f".squeeze({axis})"
        return text

    def _merged(self, op: Contract | ContractAdd) -> str:
        """The axes of the product before its view, e.g. `t (r1 r2)`."""
        g = matmul_groups(op)
        groups = [(i,) for i in g.batch] + [g.rows, g.cols]
        return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] if group else "1" for group in groups)

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
