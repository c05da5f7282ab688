"""Emitted statements of the routing primitives."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache

import sympy

from tnmoe.backends.torch.copied import as_emitted, runtime_source
from tnmoe.errors import EmitError, no_rule
from tnmoe.ir.ops import Op
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import (
    CapacitySlots,
    Dropped,
    Gather,
    GroupedContract,
    LoadBalance,
    Missed,
    Noise,
    Normalise,
    PairPositions,
    ProductTopK,
    RoutingOp,
    ScatterAdd,
    Select,
    SortSlots,
    Spread,
    TopK,
    Unsort,
    ZLoss,
)
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim

FUNCTIONS = {
    TopK: "top_k",
    ProductTopK: "product_top_k",
    SortSlots: "sort_slots",
    CapacitySlots: "capacity_slots",
    Normalise: "normalise",
    Unsort: "unsort",
    LoadBalance: "load_balance",
    ZLoss: "router_z_loss",
    Dropped: "dropped_choices",
    Missed: "missed",
}
"""The function of `routing_functions.py` that an op calls."""


def routing_sources(ops: Iterable[Op]) -> list[str]:
    """Source of every function that `ops` call, as it stands in `routing_functions.py` and `grouped_matmul.py`."""
    every = list(ops)
    used = {FUNCTIONS[type(op)] for op in every if type(op) in FUNCTIONS}
    if any(isinstance(op, SortSlots) and op.block > 1 for op in every):
        used.add("sort_slots_in_blocks")
    sources = [source for name, source in _sources().items() if name in used]
    return sources + (_grouped_sources() if any(isinstance(op, GroupedContract) for op in every) else [])


@cache
def _grouped_sources() -> list[str]:
    """Everything below the imports of `grouped_matmul.py`."""
    text = runtime_source("grouped_matmul")
    body = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.Expr)][1:]
    return [as_emitted(ast.get_source_segment(text, n) or "") for n in body]


@cache
def _sources() -> dict[str, str]:
    text = runtime_source("routing_functions")
    return {
        n.name: as_emitted(ast.get_source_segment(text, n) or "")
        for n in ast.parse(text).body
        if isinstance(n, ast.FunctionDef)
    }


def length(index: str, program: Program, ref: dict[str, str]) -> str:
    """The size of an index: a number, or read off the input named in `ref`."""
    if index not in program.lengths:
        return str(program.sizes[index])
    for value in program.inputs:
        if index in value.indices:
            return f"{ref[value.name]}.shape[{value.indices.index(index)}]"
    formula = program.lengths[index]
    assert isinstance(formula, sympy.Expr)
    rows = {
        program.lengths[known]: f"{ref[value.name]}.shape[{axis}]"
        for value in program.inputs
        for axis, known in enumerate(value.indices)
        if known in program.lengths
    }
    return _python(formula, rows)


def _python(formula: sympy.Expr, rows: dict[Dim, str]) -> str:
    """A formula as Python on integers, its symbols written as `rows` says."""
    match formula:
        case sympy.Symbol():
            return rows[formula]
        case sympy.Integer():
            return str(formula)
        case sympy.Mul():
            return " * ".join(_python(factor, rows) for factor in formula.args)
        case sympy.Add():
            return " + ".join(_python(term, rows) for term in formula.as_ordered_terms())
        case sympy.floor() | sympy.ceiling():
            above, below = formula.args[0].as_numer_denom()
            if isinstance(formula, sympy.ceiling):
                above += below - 1
            text = _python(above, rows)
            return f"({text}) // {below}" if isinstance(above, sympy.Add) else f"{text} // {below}"
    raise EmitError(f"a size of {formula} has no form in Python")


def routing_expression(op: RoutingOp, program: Program, ref: dict[str, str]) -> str:
    """What the op computes, as one expression; `ref` says how each value is written."""

    def name(value: Value) -> str:
        return ref[value.name]

    def size(index: str) -> str:
        return length(index, program, ref)

    match op:
        case TopK(out, _, x):
            return f"top_k({name(x)}, {size(out.indices[-1])})"
        case ProductTopK(out, _, lhs, rhs):
            return f"product_top_k({name(lhs)}, {name(rhs)}, {size(out.indices[-1])})"
        case PairPositions(_, lhs, rhs, index):
            return f"{name(lhs)}.unsqueeze(-1) * {size(index)} + {name(rhs)}.unsqueeze(-2)"
        case Noise(_, x, scale):
            drawn = f"F.softplus({name(scale)}) * torch.randn_like({name(x)})"
            return f"{name(x)} + {drawn} if self.training else {name(x)}"
        case Normalise(_, x, positions, index):
            counted = f"{name(x)} * ({name(positions)} < {size(index)})" if positions else name(x)
            return f"normalise({counted})"
        case SortSlots(counts=counts, positions=positions, block=block):
            if block > 1:
                return f"sort_slots_in_blocks({name(positions)}, {size(counts.indices[0])}, {block})"
            return f"sort_slots({name(positions)}, {size(counts.indices[0])})"
        case Unsort(out, x, slots):
            return f"unsort({name(x)}, {name(slots)}, {size(out.indices[1])})"
        case CapacitySlots(out, _, shares, positions):
            experts, places = (size(i) for i in out.indices)
            return f"capacity_slots({name(shares)}, {name(positions)}, {experts}, {places})"
        case Gather(_, x, positions, _, sparse):
            stored = len(x.indices) == 2 and (sparse or name(x).startswith("self."))
            if stored:
                return f"F.embedding({name(positions)}, {name(x)}{', sparse=True' if sparse else ''})"
            if len(positions.indices) == 1:
                return f"{name(x)}.index_select(0, {name(positions)})"
            return f"{name(x)}[{name(positions)}]"
        case ScatterAdd(out, x, positions, index):
            lead = len(positions.indices)
            flat = "" if lead == 1 else f".flatten(0, {lead - 1})"
            where = name(positions) if lead == 1 else f"{name(positions)}.flatten()"
            shape = ", ".join(size(i) for i in out.indices)
            return f"{name(x)}.new_zeros({shape}).index_add(0, {where}, {name(x)}{flat})"
        case Spread(out, x, positions, index):
            shape = ", ".join(size(i) for i in out.indices)
            like, entries = (name(program.inputs[0]), "1") if x is None else (name(x), name(x))
            return f"{like}.new_zeros({shape}).scatter(-1, {name(positions)}, {entries})"
        case GroupedContract(_, lhs, rhs, bias, counts):
            offset = f", {name(bias)}" if bias else ""
            return f"grouped_matmul({name(lhs)}, {name(rhs)}, {name(counts)}{offset})"
        case Select(_, x, index, position):
            return f"{name(x)}.select({x.indices.index(index) - len(x.indices)}, {position})"
        case LoadBalance(_, x, positions):
            return f"load_balance({name(x)}, {name(positions)})"
        case ZLoss(_, x):
            return f"router_z_loss({name(x)})"
        case Dropped(_, positions, rows):
            experts, places = (size(i) for i in rows.indices)
            return f"dropped_choices({name(positions)}, {experts}, {places})"
        case Missed(_, positions, index):
            return f"missed({name(positions)}, {size(index)})"
        case _:
            no_rule(op, "its torch form")
