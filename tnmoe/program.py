"""The program: one flat list of primitive ops, the single source of truth for source, execution and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from rich.text import Text

from tnmoe.dims import Dim, evaluate, symbol, symbol_names
from tnmoe.errors import ProgramError, no_rule
from tnmoe.initialise import bind_init
from tnmoe.layer import Parameter
from tnmoe.ops import (
    Add,
    BatchNorm,
    Contract,
    ContractAdd,
    Entmax15,
    FusedOp,
    Gelu,
    GeluBackward,
    LayerNorm,
    Merge,
    Multiply,
    Op,
    Permute,
    Reduce,
    RoutingOp,
    Sigmoid,
    Softmax,
    Sparsemax,
    Split,
    Value,
    is_matmul,
    is_subsequence,
    operands,
    propagate,
    results,
    split_order,
)
from tnmoe.report import Table
from tnmoe.routing_ops import fault
from tnmoe.unfused import fault as unfusable
from tnmoe.unfused import unfused


@dataclass(frozen=True, slots=True)
class Program:
    """Straight-line code in static single assignment.

    Attributes:
        inputs: data values, in memory order.
        parameters, buffers: stored values; their `indices` are the order in which they are stored.
        ops: in order of execution.
        output: what is returned.
        sizes: each index's size, symbolic or (after `bind`) an integer.
        coefficients: names of the values that are expert coefficients.
        drops: values that are given up before an op runs, by the name of the op's result; by default each value lives
            until the function that computes it returns. See `tnmoe.release`.
        lengths: sizes that only the data knows, as formulas in the inputs' sizes, also in a bound program.
        diagnostics: ops beside the forward pass, no part of any figure: of scalars, e.g. a load-balancing loss, and of
            coefficients that the forward pass has in another form.
        overwrites: results that are written over an operand, and that operand, by name, in a program that nobody
            differentiates. See `tnmoe.passes.overwrite`.
    """

    inputs: tuple[Value, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Parameter, ...]
    ops: tuple[Op, ...]
    output: Value
    sizes: Mapping[str, Dim]
    coefficients: tuple[str, ...] = ()
    drops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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


def gate_ops(program: Program) -> tuple[Op, ...]:
    """The ops that the expert coefficients depend on, in order; they run first, in a function of their own.

    None if what runs later reads more of what they make than the coefficients, or coefficients are made beside the
    forward pass: then all ops are in one function.
    """
    found = needed(program.ops, program.coefficients)
    if any(v.name in program.coefficients for op in program.diagnostics for v in results(op)):
        return ()
    inside = {v.name for op in found for v in results(op)} - set(program.coefficients)
    later = [op for op in program.ops if op not in found]
    return () if any(v.name in inside for op in later for v in operands(op)) else found


def needed(ops: Sequence[Op], names: Iterable[str]) -> tuple[Op, ...]:
    """The ops that the values `names` depend on, in order."""
    wanted = set(names)
    found: list[Op] = []
    for op in reversed(ops):
        if any(v.name in wanted for v in results(op)):
            found.append(op)
            wanted |= {v.name for v in operands(op)}
    return tuple(reversed(found))


def bind(program: Program, values: Mapping[str, int]) -> Program:
    """The program with every size an integer and every initial scale a number, under `values` by symbol name."""
    return replace(
        program,
        sizes={i: evaluate(d, values) for i, d in program.sizes.items()},
        lengths=_bound_lengths(program, values),
        parameters=tuple(replace(p, init=bind_init(p.init, values)) for p in program.parameters),
        buffers=tuple(replace(p, init=bind_init(p.init, values)) for p in program.buffers),
    )


def _bound_lengths(program: Program, values: Mapping[str, int]) -> dict[str, Dim]:
    inputs = {i for v in program.inputs for i in v.indices}
    data = symbol_names(d for i, d in program.lengths.items() if i in inputs)
    known = {symbol(name): sympy.Integer(value) for name, value in values.items() if name not in data}
    return {i: d.xreplace(known) if isinstance(d, sympy.Expr) else d for i, d in program.lengths.items()}


def verify(program: Program, *, laid_out: bool = False) -> Program:
    """Return `program` if it is well formed, else raise `ProgramError`.

    Checks single assignment, use after definition, and each op's indices. With `laid_out`, also that every
    contraction is a matrix product over views and every broadcast needs no transpose.
    """
    known = {v.name: v for v in program.leaves}
    if len(known) != len(program.leaves):
        raise ProgramError("two leaves share a name")

    def same(defined: Value | None, used: Value) -> bool:
        # Before layouts are assigned a value is a set of indices; afterwards their order is its memory order.
        if defined is None or laid_out:
            return defined == used
        return sorted(defined.indices) == sorted(used.indices)

    def require(condition: bool, op: Op, rule: str) -> None:
        if not condition:
            raise ProgramError(f"{type(op).__name__} -> {op.out.name}: {rule}: {op}")

    for op in program.ops + program.diagnostics:
        for value in operands(op):
            require(same(known.get(value.name), value), op, f"operand {value.name!r} is not defined with these indices")
        for value in results(op):
            require(value.name not in known, op, f"{value.name!r} is defined twice")
            require(all(i in program.sizes for i in value.indices), op, "an index has no size")
            known[value.name] = value
        out = op.out.indices
        if isinstance(op, FusedOp):
            given = tuple({v.name: v for v in operands(op)}.values())
            inside = replace(program, inputs=given, parameters=(), buffers=(), ops=unfused(op), diagnostics=())
            verify(replace(inside, output=op.out), laid_out=laid_out)
            wrong = unfusable(op)
            require(wrong is None, op, wrong or "")
            continue
        if isinstance(op, RoutingOp):
            wrong = fault(op) if laid_out else None
            require(wrong is None, op, wrong or "")
            continue
        match op:
            case Contract(_, lhs, rhs) | ContractAdd(_, lhs, rhs):
                shared = set(lhs.indices) & set(rhs.indices)
                joint = set(lhs.indices) | set(rhs.indices)
                require(bool(shared - set(out)), op, "sums no shared index")
                require(joint - shared <= set(out) <= joint, op, "an index of one operand alone is summed")
                if isinstance(op, ContractAdd):
                    require(set(op.bias.indices) <= set(out), op, "the bias has an index that the result lacks")
                    require(not laid_out or is_subsequence(op.bias.indices, out), op, "the bias is transposed")
                require(not laid_out or is_matmul(op), op, "is no matrix product over views")
            case Multiply(_, lhs, rhs) | Add(_, lhs, rhs):
                require(set(out) == set(lhs.indices) | set(rhs.indices), op, "the result's indices are not the union")
                views = is_subsequence(lhs.indices, out) and is_subsequence(rhs.indices, out)
                require(not laid_out or views, op, "an operand is transposed")
            case Reduce(_, x):
                require(set(out) < set(x.indices), op, "nothing is reduced")
                require(not laid_out or is_subsequence(out, x.indices), op, "the result is transposed")
            case Permute(_, x):
                require(sorted(out) == sorted(x.indices), op, "the indices differ")
            case Split(_, x, index, _):
                split = split_order(x.indices, op) if index in x.indices else ()
                require(out == split or (not laid_out and sorted(out) == sorted(split)), op, "the parts do not fit")
            case Merge(_, x, index, _):
                split = split_order(out, op) if index in out else ()
                fits = x.indices == split or (not laid_out and sorted(x.indices) == sorted(split))
                require(fits, op, "the parts do not fit")
            case GeluBackward(_, grad, x):
                require(grad.indices == x.indices == out, op, "a pointwise op must keep its indices")
            case Softmax() | Entmax15() | Sparsemax() | Sigmoid() | Gelu() | LayerNorm() | BatchNorm():
                kept = op.x.indices == out or (not laid_out and sorted(op.x.indices) == sorted(out))
                require(kept, op, "a pointwise op must keep its indices")
            case _:
                no_rule(op, "its indices")
    if not same(known.get(program.output.name), program.output):
        raise ProgramError(f"the output {program.output} is not defined with these indices")
    return program
