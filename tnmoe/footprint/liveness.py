"""Decide where emitted code releases values: as few `del` statements as reach the least peak of a forward pass.

A Python local lives until its function returns, read again or not. Releasing each value after its last use gives the
least peak there is for this order of ops; but most of those statements would change nothing. So values are
released only before a step that would exceed that peak, all dead ones at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.footprint.forward import inference
from tnmoe.ir.bound import BoundProgram, as_bound, bind
from tnmoe.ir.ops import operands, results
from tnmoe.ir.program import Program
from tnmoe.lowering.overwrite import overwrite

ITEMSIZE = 4
"""Bytes of an element: float32. What is released where hardly depends on it, since all values share it."""


def bound(program: Program, values: Mapping[str, int]) -> BoundProgram:
    """The program with integer sizes, under `values` by symbol name, as it is emitted: with what it releases."""
    return release(bind(program, values))


def release(program: BoundProgram, returned: Collection[str] = ()) -> BoundProgram:
    """A program that releases what is dead where its peak needs it.

    Args:
        program: what is run.
        returned: names of the results that it returns besides its output.
    """
    dead = _dead(program, returned)
    least = max((s.peak for s in inference(replace(program, released=dead), ITEMSIZE)), default=0)
    held = _bytes_held(program)
    released: dict[str, tuple[str, ...]] = {}
    pending: list[str] = []
    freed = 0  # of what is alive when nothing is released: it lives until the function returns
    for k, (op, step) in enumerate(zip(program.order, inference(replace(program, released={}), ITEMSIZE), strict=True)):
        if k == len(program.gates):
            pending, freed = [], 0  # the function of the gates has returned
        pending += dead.get(op.out.name, ())
        if pending and step.peak - freed > least:
            released[op.out.name] = tuple(pending)
            freed += sum(map(held.__getitem__, {program.evaluation_owner[name] for name in pending}))
            pending = []
    return replace(program, released=released)


def released_forward(adjoint: Adjoint) -> BoundProgram:
    """The forward program that a backward pass of its own leaves, `Adjoint.executed`, with what is dead released."""
    program = as_bound(adjoint.executed)
    return program if adjoint.executed is adjoint.program else release(program, adjoint.kept)


def released_backward(adjoint: Adjoint) -> BoundProgram:
    """The backward pass, `Adjoint.backward_program`, that releases what is dead where that lowers its peak.

    What one function computes would else live until it returns, where autograd frees each gradient after its use.
    """
    return release(as_bound(adjoint.backward_program), {v.name for v in adjoint.wanted.values()})


def released_inference(adjoint: Adjoint) -> BoundProgram:
    """The whole forward program as it runs without autograd: nothing is kept, GELU is in place, what is dead goes.

    What stays before the function releases nothing there, so that the function's first op does.
    """
    forward = replace(adjoint, kept=frozenset()).forward
    program = release(as_bound(overwrite(adjoint.ending_in(forward))))
    first, own = forward[0].out.name, {op.out.name for op in forward}
    gates = {op.out.name for op in program.gates}
    late = tuple(v for name, dead in program.released.items() if name not in own | gates for v in dead)
    released = {name: dead for name, dead in adjoint.program.released.items() if name in gates}
    released |= {name: dead for name, dead in program.released.items() if name in own}
    return replace(program, released={**released, first: (*late, *released.get(first, ()))} if late else released)


def eager(program: BoundProgram, returned: Collection[str] = ()) -> BoundProgram:
    """The program with every value released right after its last use, which gives the least peak."""
    return replace(program, released=_dead(program, returned))


def _bytes_held(program: BoundProgram) -> dict[str, int]:
    """Bytes of every result that has a memory of its own."""
    values = {v.name: v for op in program.ops for v in results(op)} | dict(program.storages)
    return {name: program.bytes(value, ITEMSIZE) for name, value in values.items()}


def _dead(program: BoundProgram, returned: Collection[str]) -> dict[str, tuple[str, ...]]:
    """For each op, by the name of its result: the values that the op before it, in the same function, read last."""
    order, gates = program.order, len(program.gates)
    owner = program.evaluation_owner  # where more values share one
    names: dict[str, list[str]] = {}  # that a function may call a memory by
    every = [v.name for op in program.ops for v in results(op)]
    for name in every:
        names.setdefault(owner[name], []).append(name)
    made = set(every) - {owner[name] for name in (program.output.name, *returned)}
    last = {owner[v.name]: k for k, op in enumerate(order) for v in operands(op)}
    local = {v.name for op in order[:gates] for v in results(op)} - set(program.coefficients)
    inside = local - {owner[name] for name in program.coefficients if gates}
    released: dict[str, tuple[str, ...]] = {}
    for k, op in enumerate(order):
        dead = [name for name, end in last.items() if end == k - 1 and name in made]
        if 0 < k < gates or k == gates:
            dead = [name for name in dead if (name in inside) == (k < gates)]
        if dead:
            known = {n for name in dead for n in names[name]} - (local if k >= gates else set())
            released[op.out.name] = tuple(n for name in dead for n in names[name] if n in known)
    return released
