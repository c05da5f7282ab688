"""What every emitted module promises, for layers, orders and ways to emit that hypothesis combines.

The ways: products of each flavour, what is kept for the backward pass, chunks, and the layout of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import assert_same, draw, gradients, pair
from support.layers_strategy import Spec, any_order, layers
from torch._dynamo.testing import CompileCounterWithBackend

import tnmoe
from tnmoe.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("any_processor")

BATCHES = (7, 12, 9)
"""None of them is the size of another axis, which compilers would take to be the same one."""

Way = Mapping[str, Any]

ways = st.fixed_dictionaries(
    {
        "flavour": st.sampled_from(["portable", "fast", "triton"]),
        "memory": st.sampled_from([None, "save", "recompute", 10**9]),
        "chunk": st.sampled_from([None, 2, 5]),
        "layout": st.sampled_from(["auto", "rows", "columns"]),
    }
)
seeds = st.integers(0, 2**32)


def planned(spec: Spec, seed: int, way: Way) -> Plan:
    return any_order(tnmoe.plan(spec, tokens=8, **way), seed)


def width(plan: Plan) -> int:
    return int(plan.bound.sizes["i"])


@pytest.mark.slow
@settings(max_examples=40)
@given(layers(max_levels=2), seeds, ways, st.sampled_from([(0,), (1,), (5,), (2, 3)]))
def test_values_and_gradients(spec: Spec, seed: int, way: Way, lead: tuple[int, ...]) -> None:
    """Those of autograd on the plain module, which is compared with dense einsum elsewhere, to 1e-10."""
    plan = planned(spec, seed, way)
    plain, module = pair(plan)
    assert_same(plain, module, draw(*lead, width(plan)), 1e-10)


@pytest.mark.slow
@settings(max_examples=8)
@given(layers(max_levels=2), seeds, ways)
def test_compiles_once(spec: Spec, seed: int, way: Way) -> None:
    """One graph and one compilation, forward and backward, for every batch size."""
    torch._dynamo.reset()
    plan = planned(spec, seed, way)
    plain, module = pair(plan)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module.train(), fullgraph=True, dynamic=True, backend=counter)
    for batch in BATCHES:
        x = draw(batch, width(plan), seed=batch)
        torch.testing.assert_close(gradients(compiled, x), gradients(plain.train(), x), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@settings(max_examples=6)
@given(layers(max_levels=2), seeds, ways)
def test_exports(spec: Spec, seed: int, way: Way) -> None:
    """With a dynamic batch."""
    plan = planned(spec, seed, way)
    module = pair(plan)[1].eval()
    dims = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module, (draw(7, width(plan), grad=False),), dynamic_shapes=dims).module()
    for batch in BATCHES:
        x = draw(batch, width(plan), grad=False, seed=batch)
        torch.testing.assert_close(exported(x), module(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=15)
@given(layers(max_levels=2), seeds, ways)
def test_autocast(spec: Spec, seed: int, way: Way) -> None:
    """The plain module's result and gradients, to bfloat16, each gradient in its parameter's own type.

    Behind a norm over few rows, or a sparse gate, rounding can be all that there is of a gradient: these are finite.
    """
    plan = planned(spec, seed, way)
    plain, module = pair(plan, torch.float32)
    x = draw(9, width(plan), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, (x_grad, *got_grads) = gradients(module, x)
        want, (_, *want_grads) = gradients(plain, x)
    # A function is of one type; autograd's product with a float32 weight, entry by entry, is float32.
    assert got.dtype == (want.dtype if plan.function is None else torch.bfloat16)
    torch.testing.assert_close(got.float(), want.float(), rtol=0.1, atol=0.1 * float(want.abs().max()))
    assert bool(x_grad.isfinite().all())
    names = [name for name, _ in module.named_parameters()]
    largest = max(float(g.abs().max()) for g in want_grads)
    for name, a, b in zip(names, got_grads, want_grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert bool(a.isfinite().all()), name
        if not name.startswith(("gate", "norm")):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * largest, msg=name)


@pytest.mark.slow
@settings(max_examples=15)
@given(layers(max_levels=2), seeds, ways)
def test_freezes(spec: Spec, seed: int, way: Way) -> None:
    """The inference form gives what the module gives in evaluation."""
    plan = planned(spec, seed, way)
    module = tnmoe.build(plan, dtype=torch.float64, freeze=True).eval()
    module.load_state_dict(pair(plan)[0].state_dict())
    frozen = module.freeze()
    x = draw(6, width(plan), grad=False)
    torch.testing.assert_close(frozen(x), module(x), rtol=1e-10, atol=1e-10)
