"""The program: one flat list of primitive ops, the single source of truth for source, execution and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
from rich.text import Text

from tnmoe.ir.ops import Op, operands, propagate, results
from tnmoe.ir.value import Parameter, Value
from tnmoe.render.table import Table
from tnmoe.symbolic.dims import Dim, symbol_names


@dataclass(frozen=True, slots=True)
class Program:
    """Straight-line code in static single assignment.

    Attributes:
        inputs: data values, in memory order.
        parameters, buffers: stored values; their `indices` are the order in which they are stored.
        ops: in order of execution.
        output: what is returned.
        sizes: each index's size, symbolic, or an integer in a `BoundProgram`.
        coefficients: names of the values that are expert coefficients.
        released: values that are freed before an op runs, by the name of the op's result; by default each value lives
            until the function that computes it returns. See `tnmoe.footprint.liveness`.
        lengths: sizes that only the data knows, as formulas in the inputs' sizes, also in a bound program.
        diagnostics: ops beside the forward pass, no part of any figure: of scalars, e.g. a load-balancing loss, and of
            coefficients that the forward pass has in another form.
        overwrites: results that are written over an operand, and that operand, by name, in a program that nobody
            differentiates. See `tnmoe.lowering.overwrite`.
    """

    inputs: tuple[Value, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Parameter, ...]
    ops: tuple[Op, ...]
    output: Value
    sizes: Mapping[str, Dim]
    coefficients: tuple[str, ...] = ()
    released: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lengths: Mapping[str, Dim] = field(default_factory=dict)
    diagnostics: tuple[Op, ...] = ()
    overwrites: Mapping[str, str] = field(default_factory=dict)

    @property
    def leaves(self) -> tuple[Value, ...]:
        """Everything that exists before the first op."""
        return self.inputs + tuple(Value(p.name, p.indices, p.part) for p in self.parameters + self.buffers)

    @property
    def dynamic(self) -> frozenset[str]:
        """Indices whose size only the data knows: no stored value decides it."""
        return frozenset(self.lengths)

    @property
    def weight_only(self) -> frozenset[str]:
        """Names of the results that no input reaches: while the weights stay the same, they can be made once."""
        varying = propagate(self.ops, {v.name for v in self.inputs})
        return frozenset(v.name for op in self.ops for v in results(op) if v.name not in varying)

    def table(self) -> Table:
        """One row for each op: operands and result with their indices, in the order in which they run."""
        rows = tuple(
            (k, type(op).__name__, ", ".join(v.label for v in operands(op)), op.out.label)
            for k, op in enumerate(self.ops, start=1)
        )
        columns = (("step", "step"), ("op", "op"), ("operands", "operands"), ("result", "result"))
        return Table(f"Program of {self.output.name}", columns, rows)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Text:
        return Text(str(self))

    def _repr_html_(self) -> str:
        return self.table().render("html")


def data_lengths(program: Program) -> dict[str, Dim]:
    """Formulas of the sizes that only the data knows: of inputs' indices that no stored value has, and what follows."""
    stored = {i for p in program.parameters + program.buffers for i in p.indices}
    free = {i: program.sizes[i] for v in program.inputs for i in v.indices if i not in stored}
    symbols = symbol_names([d for d in free.values() if isinstance(d, sympy.Symbol)])
    known = symbol_names(program.sizes[i] for i in stored)
    return free | {i: d for i, d in program.sizes.items() if i not in stored and symbol_names([d]) & (symbols - known)}


@dataclass(frozen=True, slots=True)
class Folded:
    """A program in two parts.

    Attributes:
        once: ops that read weights and each other's results alone.
        each: the rest. Its parameters are what it reads of the weights and of what `once` makes; none is trained.
    """

    once: tuple[Op, ...]
    each: Program

    @property
    def read(self) -> tuple[Value, ...]:
        """The values that exist before `once` and that it, or the module of `each`, takes over."""
        made = {v.name for op in self.once for v in results(op)}
        kept = [Value(p.name, p.indices, p.part) for p in (*self.each.parameters, *self.each.buffers)]
        read = [v for op in self.once for v in operands(op)] + kept
        return tuple({v.name: v for v in read if v.name not in made}.values())
