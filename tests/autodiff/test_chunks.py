"""Where the values of a chunk lie: nothing is read after another value took its room."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import any_kept
from support.layers_strategy import any_order, layers

import tnmoe
from tnmoe.autodiff.chunks import Pass, backward_pass, forward_pass
from tnmoe.ir.ops import operands


def check(p: Pass) -> int:
    """Run the ops of a chunk by what each room holds; the number of values that took a room from another."""
    holds: dict[int, str] = {}
    taken = 0
    for op in p.ops:
        for v in operands(op):
            owner = p.program.owner[v.name]
            if owner in p.rooms:
                assert holds[p.rooms[owner]] == owner, f"{op.out.name} reads {v.name}, which is gone"
        if op.out.name in p.rooms:
            room = p.rooms[op.out.name]
            taken += room in holds
            holds[room] = op.out.name
            lengths = [[p.program.sizes[i] for i in order] for order in (p.shapes[room], op.out.indices)]
            assert lengths[0] == lengths[1]
    assert set(holds) == set(range(len(p.shapes))), "a room that nothing lies in"
    return taken


@settings(max_examples=40)
@given(layers(), st.integers(0, 2**32), st.booleans())
def test_rooms_hold_what_is_read(spec: tnmoe.MuMoE, seed: int, placing: bool) -> None:
    """Any layer, any order, whatever is kept."""
    adjoint = any_kept(any_order(tnmoe.plan(spec, tokens=6, chunk=2), seed), seed).adjoint
    check(forward_pass(adjoint, placing=placing))
    check(backward_pass(adjoint, placing=placing))


def test_rooms_are_shared() -> None:
    """Else the test above would say nothing."""
    plan = tnmoe.plan(tnmoe.MuMoEBlock(6, 8, 5, 4, tnmoe.CP(3)), tokens=6, memory="recompute", chunk=2)
    assert check(backward_pass(plan.adjoint, placing=True)) > 2
