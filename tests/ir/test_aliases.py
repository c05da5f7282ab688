"""Whose memory a value is, and which strides allow a view: held against torch's own storages and views."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe
from tnmoe.ir.aliases import lies_alike, memory_owners, merges
from tnmoe.ir.bound import BoundProgram, as_bound
from tnmoe.ir.contractions import Merge, Multiply, Permute, Split
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import Noise, Select
from tnmoe.ir.value import Value

AXES = "abcd"


@given(st.permutations(AXES), st.lists(st.integers(1, 3), min_size=4, max_size=4), st.integers(0, 4), st.integers(0, 4))
def test_axes_merge_where_torch_can_view_them(order: list[str], lengths: list[int], start: int, stop: int) -> None:
    """A tensor whose axes lie in memory as `order` says, seen as (a, b, c, d), some neighbours merged by a view."""
    sizes = dict(zip(AXES, lengths, strict=True))
    tensor = torch.zeros([sizes[i] for i in order]).permute([order.index(i) for i in AXES])
    group = AXES[start:stop]
    shape = [sizes[i] for i in AXES[:start]] + [-1] + [sizes[i] for i in AXES[max(start, stop) :]]
    try:
        tensor.view(shape)
        viewed = True
    except RuntimeError:
        viewed = False
    assert merges(order, [group], sizes) == viewed


@given(st.permutations(AXES), st.permutations(AXES), st.lists(st.integers(1, 2), min_size=4, max_size=4))
def test_orders_alike_are_contiguous_alike(order: list[str], other: list[str], lengths: list[int]) -> None:
    """A tensor laid out in one order is contiguous when it is seen in another, if and only if they lie alike."""
    sizes = dict(zip(AXES, lengths, strict=True))
    tensor = torch.zeros([sizes[i] for i in order]).permute([order.index(i) for i in other])
    assert lies_alike(order, other, sizes) == tensor.is_contiguous()


def test_what_has_gaps_merges_no_two_axes() -> None:
    """An expanded gradient has no order of axes at all."""
    sizes = {"a": 2, "b": 3, "c": 1}
    assert merges(None, ["ac", "b"], sizes)
    assert not merges(None, ["ab"], sizes)


T, Y = Value("x", ("t", "i")), Value("y", ("t", "p", "q"))


def chain(*ops: object, **changes: object) -> Program:
    last = ops[-1].out  # type: ignore[attr-defined]
    sizes = {"t": 3, "i": 6, "p": 2, "q": 3, "k": 1}
    return Program((T, Value("scale", ("t", "i"))), (), (), tuple(ops), last, sizes, **changes)  # type: ignore[arg-type]


def test_views_of_views_are_the_first_memory() -> None:
    program = chain(Split(Y, T, "i", ("p", "q")), Merge(Z := Value("z", ("t", "i")), Y, "i", ("p", "q")))
    assert memory_owners(program) == {"x": "x", "scale": "scale", "y": "x", Z.name: "x"}


def test_padding_is_a_copy() -> None:
    program = chain(Split(Y, T, "i", ("p", "q"), padded=True))
    assert memory_owners(program)["y"] == "y"


def test_a_selection_is_a_view() -> None:
    program = chain(Select(Value("row", ("i",)), T, "t", 0))
    assert memory_owners(program)["row"] == "x"


def test_noise_is_a_view_in_evaluation_alone() -> None:
    program = chain(Noise(Value("noisy", ("t", "i")), T, Value("scale", ("t", "i"))))
    assert memory_owners(program)["noisy"] == "noisy"
    assert memory_owners(program, evaluation=True)["noisy"] == "x"


def test_what_is_overwritten_shares_its_memory() -> None:
    op = Multiply(Value("made", ("t", "i")), T, T)
    over = Permute(Value("over", ("t", "i")), op.out)
    assert memory_owners(chain(op, over))["over"] == "over"
    assert memory_owners(chain(op, over, overwrites={"over": "made"}))["over"] == "made"


# ---- bound programs ------------------------------------------------------------------------------------------


def test_a_bound_program_works_out_once() -> None:
    program = as_bound(chain(Split(Y, T, "i", ("p", "q"))))
    assert isinstance(program, BoundProgram)
    assert program.owner is program.owner
    assert (program.bytes(T, 2), program.entries("pq"), program.bytes(replace(T, integer=True), 2)) == (36, 6, 144)
    assert as_bound(program) is program


def test_another_program_works_it_out_anew() -> None:
    program = as_bound(chain(Split(Y, T, "i", ("p", "q"))))
    assert program.owner["y"] == "x"
    other = replace(program, ops=(Split(Y, T, "i", ("p", "q"), padded=True),))
    assert isinstance(other, BoundProgram)
    assert other.owner["y"] == "y"
    assert program.resized(t=1).bytes(T, 4) == 24


def test_formulas_are_refused() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3)), tokens=8)
    with pytest.raises(tnmoe.CostError, match="memory is counted for given sizes only, not for t = T"):
        as_bound(plan.program)
