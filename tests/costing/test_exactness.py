"""What the report says of an emitted module against what torch counts on that very module: equality, layer by layer.

Matmul FLOPs by `FlopCounterMode`, saved bytes by saved-tensor hooks, peaks by `MemTracker`.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers_strategy import gates
from support.memory import DTYPES, predicted, tracker
from support.training import saved_bytes
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.planning.plan import Plan

LAYERS = 300


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, torch.dtype, list[str]]:
    """A plan of one or two CP or tensor ring layers with 1 to 3 levels of experts; a dtype; names of frozen weights."""
    levels = draw(st.integers(1, 3))
    experts = [draw(st.integers(1, 6)) for _ in range(levels)]
    ranks = st.lists(st.integers(1, 4), min_size=levels + 2, max_size=levels + 2)
    factorization = draw(st.one_of(st.builds(tnmoe.CP, st.integers(1, 7)), st.builds(tnmoe.TensorRing, ranks)))
    kind, count = draw(st.sampled_from([(tnmoe.MuMoE, 2), (tnmoe.MuMoEBlock, 3)]))
    widths = [draw(st.integers(2, 9)) for _ in range(count)]
    spec = kind(
        *widths, experts, factorization, draw(gates()), bias=draw(st.booleans()), input_norm=draw(st.booleans())
    )
    plan = tnmoe.plan(
        spec,
        tokens=draw(st.sampled_from([1, 2, 5, 16])),
        planner="greedy",  # which is a matter of time here: any order has to be right
        input_gradients=draw(st.booleans()),
    )
    frozen = draw(st.lists(st.sampled_from([p.name for p in plan.bound.parameters]), unique=True))
    return plan, draw(st.sampled_from(DTYPES)), frozen


@pytest.mark.slow
def test_reports_are_what_torch_counts() -> None:
    """At least 300 layers; the tally says that frozen subsets, dtypes, levels and both kinds are all among them."""
    tally: Counter[object] = Counter()

    @settings(max_examples=LAYERS)
    @given(cases())
    def check(case: tuple[Plan, torch.dtype, list[str]]) -> None:
        plan, dtype, frozen = case
        name = str(dtype).removeprefix("torch.")
        report = tnmoe.cost(plan, dtype=name, frozen=frozen)
        module = tnmoe.build(plan, dtype=dtype)
        for p_name, p in module.named_parameters():
            p.requires_grad_(p_name not in frozen)
        x = torch.randn(
            plan.values["T"], int(plan.bound.sizes["i"]), dtype=dtype, requires_grad=bool(plan.input_gradients)
        )
        with FlopCounterMode(display=False) as forward:
            y = module(x)
        assert forward.get_total_flops() == report.matmul_flops
        with FlopCounterMode(display=False) as both:
            z = module(x)
            if z.requires_grad:
                z.sum().backward()
        assert both.get_total_flops() == report.training_matmul_flops
        del y, z
        saved, _ = saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])
        memory = tnmoe.memory(plan, dtype=name, frozen=frozen)
        assert saved == memory.saved_bytes == report.saved_bytes
        assert predicted(list(memory.inference)) == tracker(plan, dtype, grad=False)
        assert predicted(list(memory.training)) == tracker(plan, dtype, grad=True, frozen=frozen)
        tally.update(["layers", dtype, len(plan.layer.coefficients), type(plan.layer).__name__, bool(frozen)])
        tally.update([plan.layer.declaration["kind"], plan.layer.declaration["factorization"]["kind"]])

    check()
    assert tally["layers"] >= LAYERS
    wanted = (*DTYPES, 1, 2, 3, True, "mumoe", "mumoe_block", "cp", "tensor_ring")
    assert all(tally[kind] >= LAYERS // 12 for kind in wanted), tally
