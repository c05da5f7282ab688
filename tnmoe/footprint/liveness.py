"""Decide where emitted code gives values up: as few `del` statements as reach the least peak of a forward pass.

A Python local lives until its function returns, read again or not. Dropping each value after its last use gives the
least peak there is for this order of ops; but most of those statements would change nothing. So values are dropped
only before a step that would exceed that peak, all dead ones at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.errors import CostError
from tnmoe.footprint.forward import inference
from tnmoe.ir.dataflow import execution_order, gate_ops, memory_owners
from tnmoe.ir.ops import operands, results
from tnmoe.ir.program import Program, bind
from tnmoe.lowering.overwrite import overwrite

ITEM = 4
"""Bytes of an element: float32. What is dropped where hardly depends on it, since all values share it."""


def bound(program: Program, values: Mapping[str, int]) -> Program:
    """The program with integer sizes, under `values` by symbol name, as it is emitted: with its drops."""
    return release(bind(program, values))


def release(program: Program, returned: Collection[str] = ()) -> Program:
    """A bound program that drops what is dead where its peak needs it; one that cannot be emitted stays as it is.

    Args:
        program: bound; one with symbolic sizes stays as it is.
        returned: names of the results that it returns besides its output.
    """
    try:
        return _released(program, returned)
    except CostError:
        return program


def released_forward(adjoint: Adjoint) -> Program:
    """The forward program that a backward pass of its own leaves, `Adjoint.executed`, with what is dead released."""
    program = adjoint.executed
    return program if program is adjoint.program else release(program, adjoint.kept)


def released_backward(adjoint: Adjoint) -> Program:
    """The backward pass, `Adjoint.as_program`, that releases what is dead where that lowers its peak.

    What one function computes would else live until it returns, where autograd frees each gradient after its use.
    """
    return release(adjoint.as_program(), {v.name for v in adjoint.wanted.values()})


def released_inference(adjoint: Adjoint) -> Program:
    """The whole forward program as it runs without autograd: nothing is kept, GELU is in place, what is dead goes.

    What stays before the function releases nothing there, so that the function's first op does.
    """
    forward = replace(adjoint, kept=frozenset()).forward
    program = release(overwrite(adjoint.ending_in(forward)))
    first, own = forward[0].out.name, {op.out.name for op in forward}
    gates = {op.out.name for op in gate_ops(program)}
    late = tuple(v for name, dead in program.drops.items() if name not in own | gates for v in dead)
    drops = {name: dead for name, dead in adjoint.program.drops.items() if name in gates}
    drops |= {name: dead for name, dead in program.drops.items() if name in own}
    return replace(program, drops={**drops, first: (*late, *drops.get(first, ()))} if late else drops)


def eager(program: Program, returned: Collection[str] = ()) -> Program:
    """The program with every value dropped right after its last use, which gives the least peak."""
    return replace(program, drops=_dead(program, returned))


def _released(program: Program, returned: Collection[str]) -> Program:
    dead = _dead(program, returned)
    least = max((m.peak for m in inference(eager(program, returned), ITEM)), default=0)
    released = replace(program, drops={})
    pending: list[str] = []
    moments = inference(released, ITEM)
    gates = len(gate_ops(program))
    for k, op in enumerate(execution_order(program)):
        if k == gates:
            pending = []  # the function of the gates has returned
        pending += dead.get(op.out.name, ())
        if pending and moments[k].peak > least:
            released = replace(released, drops={**released.drops, op.out.name: tuple(pending)})
            pending = []
            moments = inference(released, ITEM)
    return released


def _dead(program: Program, returned: Collection[str]) -> dict[str, tuple[str, ...]]:
    """For each op, by the name of its result: the values that the op before it, in the same function, read last."""
    order, gates = execution_order(program), len(gate_ops(program))
    owner = memory_owners(program, evaluation=True)  # where more values share one
    names: dict[str, list[str]] = {}  # that a function may call a memory by
    every = [v.name for op in program.ops for v in results(op)]
    for name in every:
        names.setdefault(owner[name], []).append(name)
    made = set(every) - {owner[name] for name in (program.output.name, *returned)}
    last = {owner[v.name]: k for k, op in enumerate(order) for v in operands(op)}
    local = {v.name for op in order[:gates] for v in results(op)} - set(program.coefficients)
    inside = local - {owner[name] for name in program.coefficients if gates}
    found: dict[str, tuple[str, ...]] = {}
    for k, op in enumerate(order):
        dead = [name for name, end in last.items() if end == k - 1 and name in made]
        if 0 < k < gates or k == gates:
            dead = [name for name in dead if (name in inside) == (k < gates)]
        if dead:
            known = {n for name in dead for n in names[name]} - (local if k >= gates else set())
            found[op.out.name] = tuple(n for name in dead for n in names[name] if n in known)
    return found
