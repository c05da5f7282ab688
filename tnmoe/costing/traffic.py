"""Bytes that ops move, in elements: what each reads and writes, forward and for each gradient.

Every operand counts once, as if it were read once from memory: the least that any kernel can do. A routed product
reads the slices that its tokens choose, and never more than there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import sympy

from tnmoe.costing.cost import Sizes
from tnmoe.costing.routing_cost import chosen_slices
from tnmoe.costing.saved import saved_inside, saved_values
from tnmoe.ir.aliases import is_view
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import RoutingOp, ScatterAdd
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim


@dataclass(frozen=True, slots=True)
class Traffic:
    """Elements read and written."""

    read: Dim = 0
    written: Dim = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)


def forward_traffic(op: Op, sizes: Sizes) -> Traffic:
    """What an op reads and writes; an operand that it reads twice counts once, and a view moves nothing."""
    if is_view(op):
        return Traffic()
    read = total(_read(op, v, sizes) for v in _distinct(operands(op)))
    return Traffic(read, total(elements(v.indices, sizes) for v in results(op)))


def gradient_traffic(op: Op, operand: Value, sizes: Sizes) -> Traffic:
    """What the gradient of one operand reads (the result's gradient, and what was saved for it) and writes.

    Raises:
        CostError: if nobody has said what the op saves.
    """
    if is_view(op):
        return Traffic()
    alone = {operand.name}
    kept = _distinct(saved_values(op, sizes, alone))
    read_again = (v for v in kept if not (isinstance(op, ScatterAdd) and v == op.x))  # which is kept for its shape
    saved = total(elements(v.indices, sizes) for v in read_again)
    read = elements(op.out.indices, sizes) + saved + saved_inside(op, sizes, alone).elements
    return Traffic(read, elements(operand.indices, sizes))


def active_parameters(program: Program) -> Dim:
    """Stored weights that one token meets: of routed ones the slices that it chooses, of others all."""
    return _stored(program, tokens=False)


def touched_parameters(program: Program) -> Dim:
    """Stored weights that a whole batch reads at most: its tokens may all choose differently."""
    return _stored(program, tokens=True)


def _stored(program: Program, *, tokens: bool) -> Dim:
    sizes = program.sizes if tokens else _one_token(program)
    stored: list[Dim] = []
    for p in program.parameters:
        routed = (chosen_slices(op, p.name, sizes) for op in program.ops if isinstance(op, RoutingOp))
        chosen = next((slices for slices in routed if slices is not None), None)
        every = elements(p.indices, program.sizes)
        stored.append(every if chosen is None else chosen * elements(p.indices[1:], sizes))
    return total(stored)


def _one_token(program: Program) -> dict[str, Dim]:
    """The sizes of a batch of a single token."""
    inputs = {i for v in program.inputs for i in v.indices}
    tokens = {s: sympy.Integer(1) for i, s in program.lengths.items() if i in inputs and isinstance(s, sympy.Symbol)}
    lengths = {i: sympy.sympify(d).xreplace(tokens) for i, d in program.lengths.items()}
    return {**program.sizes, **{i: int(d) if d.is_Integer else d for i, d in lengths.items()}}


def _read(op: Op, value: Value, sizes: Sizes) -> Dim:
    """Elements that an op reads of an operand: of a routed one as many slices as are chosen, at most all."""
    chosen = chosen_slices(op, value.name, sizes) if isinstance(op, RoutingOp) else None
    return elements(value.indices, sizes) if chosen is None else chosen * elements(value.indices[1:], sizes)


def total(amounts: Iterable[Dim]) -> Dim:
    """The sum of sizes, 0 of none."""
    return sum(amounts, start=cast(Dim, 0))


def _distinct(values: Iterable[Value]) -> list[Value]:
    return list({v.name: v for v in values}.values())
