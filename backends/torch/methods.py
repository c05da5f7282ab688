"""The methods of an emitted class that run its program, and what is known of the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tnmoe.backends.torch.function import FunctionUnit, call_statements
from tnmoe.backends.torch.lines import axes_comment, broken, docstring, indented
from tnmoe.backends.torch.statements import Writer
from tnmoe.ir.dataflow import needed
from tnmoe.ir.ops import Op, results
from tnmoe.ir.pointwise_ops import BatchNorm
from tnmoe.ir.program import Folded, Program
from tnmoe.ir.value import Value


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
        inference: the class has no gradients, and norms always use running statistics.
        frozen: the inference form of the class, if it is to have one.
        product: function that multiplies two matrices outside the function; by default the operator.
    """

    program: Program
    name: str
    title: str
    summary: str
    notes: Sequence[str] = ()
    batched: bool = True
    function: FunctionUnit | None = None
    inference: bool = False
    frozen: Frozen | None = None
    product: str = "@"


@dataclass(frozen=True, slots=True)
class Frozen:
    """The inference form of a class: a class of its own, made from an instance of the first.

    Attributes:
        unit: the class; its program stores what `folded` leaves to be read.
        folded: what is made once, from the weights.
        orders: in which the trained class stores each weight.
    """

    unit: Unit
    folded: Folded
    orders: Mapping[str, tuple[str, ...]]


def function_name(unit: Unit) -> str:
    """Name of the function whose backward pass is written out."""
    return f"_{unit.name}Function"


def rows(x: Value, program: Program) -> list[str]:
    """The method that flattens the leading axes of the input."""
    width = program.sizes[x.indices[-1]]
    return [
        f"    def _rows(self, {x.name}: Tensor) -> Tensor:",
        '        """All leading axes flattened into one."""',
        f"        if {x.name}.ndim == 0 or {x.name}.shape[-1] != {width}:",
        f'            raise ValueError(f"expected (..., {width}), got {{tuple({x.name}.shape)}}")',
        f"        return {x.name}.reshape(-1, {width}){axes_comment(x.indices)}",
    ]


def coefficients(unit: Unit, writer: Writer, gates: Sequence[Op]) -> list[str]:
    """The methods that compute the shares of the experts, by the ops of the gates.

    `forward` calls the second one, but where there are no `gates` it makes the coefficients itself, among others.
    """
    program = unit.program
    ops = gates or needed(program.ops + program.diagnostics, program.coefficients)
    (x,) = program.inputs
    width = program.sizes[x.indices[-1]]
    names = [writer.ref(n) for n in program.coefficients]
    several = len(names) > 1
    running = any(isinstance(op, BatchNorm) for op in ops)
    still = ", update=False" if running and not unit.inference else ""
    levels = "one (..., experts) tensor for each level" if several else "a tuple of one (..., experts) tensor"
    written = {v.name: v for op in ops for v in results(op)}
    values = [written[name] for name in program.coefficients]
    if any(v.integer or len(v.indices) != 2 for v in values):
        levels = ", ".join(f"{writer.ref(v.name)} ({_shape(v, program)})" for v in values)
    lines = [
        f"    def expert_coefficients(self, {x.name}: Tensor) -> tuple[Tensor, ...]:",
        *docstring([f"Shares of the experts for (..., {width}): {levels}."], 8),
        f"        lead = {x.name}.shape[:-1]",
        f"        levels = self._coefficients(self._rows({x.name}){still})",
        "        return tuple(a.reshape(*lead, *a.shape[1:]) for a in levels)",
        "",
    ]
    if running and unit.inference:
        lines.append(f"    def _coefficients(self, {x.name}: Tensor) -> tuple[Tensor, ...]:")
        lines.append("        training, momentum = False, 0.0  # running statistics, always")
    elif running:
        # One row has no variance; and looking at the coefficients must not move the running statistics.
        lines.append(f"    def _coefficients(self, {x.name}: Tensor, update: bool = True) -> tuple[Tensor, ...]:")
        condition = f"self.training if {x.name}.shape[0] > 1 else False"
        lines.append(f"        training = {condition}  # one row has no variance")
        lines.append("        momentum = 0.1 if update else 0.0  # of the running statistics")
    else:
        lines.append(f"    def _coefficients(self, {x.name}: Tensor) -> tuple[Tensor, ...]:")
    for op in ops:
        lines += indented([*(writer.releases(op) if gates else []), *writer.statement(op)])
    lines.append(f"        return {_tuple(names)}")
    return lines


def _shape(value: Value, program: Program) -> str:
    """The shape of a value for every token, any leading axes first."""
    return ", ".join(["...", *(str(program.sizes[i]) for i in value.indices[1:])])


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def forward(unit: Unit, writer: Writer, gates: Sequence[Op]) -> list[str]:
    """The method that runs all ops but those of the gates, which it calls."""
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
    if unit.inference and program.inputs:
        given = ", ".join(writer.ref(v.name) for v in program.inputs)
        needed_by = f"any(v.requires_grad for v in ({given}))" if len(program.inputs) > 1 else f"{given}.requires_grad"
        lines += [
            *indented(broken(f"if torch.is_grad_enabled() and {needed_by}:")),
            "            raise RuntimeError(",
            '                "a frozen module has no gradients: detach the input, or use the trained module"',
            "            )",
        ]
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
        lines += indented(writer.releases(op) if unit.function is None else [])
        if op.out.part != part:
            part = op.out.part
            lines.append("")
        lines += indented(writer.statement(op))
    if unit.function is not None:
        lines += ["", *indented(call_statements(unit.function, function_name(unit), writer))]
    result = writer.ref(program.output.name)
    if unit.batched:
        lines.append(f"        return {result}.reshape(*lead, {width_out})")
    else:
        lines.append(f"        return {result}")
    return lines


def diagnostics(unit: Unit, writer: Writer) -> list[str]:
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
