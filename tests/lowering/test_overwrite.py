"""GELU in place in the inference form: where it may be, that nothing else changes, and the memory that it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers_strategy import layers
from support.tracked import track

import tnmoe
from tnmoe.ir.contractions import Add
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.value import Value
from tnmoe.lowering.overwrite import overwrite
from tnmoe.presets.registry import PRESETS

BLOCK = tnmoe.MuMoEBlock(6, 9, 5, 4, tnmoe.CP(3), tnmoe.Gate("entmax15", "layer"), bias=True, input_norm=True)


def drawn(plan: tnmoe.Plan, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    module = tnmoe.build(plan, freeze=True, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module.eval()


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["portable", "fast"])
@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr", "mixer-token-cp"])
def test_inference_forms_take_the_memory_predicted(name: str, flavour: str) -> None:
    spec = PRESETS[name].spec
    plan = tnmoe.plan(spec, tokens=257, flavour=flavour)
    report = tnmoe.memory(plan, inference=True)
    ((peak, _),) = track(tnmoe.build(plan, freeze=True).freeze(), [torch.randn(257, spec.inputs)], grad=False)
    assert report.inference_peak == peak < tnmoe.memory(tnmoe.plan(spec, tokens=257)).inference_peak
    assert report.saved_bytes == report.training_peak == 0
    assert "backward" not in str(report)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(1, 5))
def test_random_inference_forms_take_the_memory_predicted(spec: tnmoe.MuMoE | tnmoe.MuMoEBlock, tokens: int) -> None:
    plan = tnmoe.plan(spec, tokens=tokens)
    frozen = tnmoe.build(plan, freeze=True, dtype=torch.float64).freeze()
    ((peak, _),) = track(frozen, [torch.randn(tokens, spec.inputs, dtype=torch.float64)], grad=False)
    assert tnmoe.memory(plan, dtype="float64", inference=True).inference_peak == peak


def test_functions_without_autograd_are_as_lean() -> None:
    spec = PRESETS["gpt2-cp"].spec
    plan = tnmoe.plan(spec, tokens=257, memory="save")
    module = tnmoe.build(plan).eval()
    ((peak, _),) = track(module, [torch.randn(257, spec.inputs)], grad=False)
    assert tnmoe.memory(plan).inference_peak == peak < tnmoe.memory(tnmoe.plan(spec, tokens=257)).inference_peak
    x = torch.randn(9, spec.inputs)
    with torch.no_grad():
        before, y = x.clone(), module(x)
        assert torch.equal(x, before)
        assert torch.equal(y, module(x))
    torch.testing.assert_close(module(x).detach(), y)


def test_nothing_that_is_the_callers_is_written() -> None:
    module = drawn(tnmoe.plan(BLOCK, tokens=4))
    frozen, x = module.freeze(), torch.randn(4, 6, dtype=torch.float64)
    before = [t.clone() for t in (x, *frozen.buffers())]
    first, second = frozen(x), frozen(x)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip((x, *frozen.buffers()), before, strict=True))
    torch.testing.assert_close(first, module(x).detach(), rtol=0, atol=1e-12)


def test_many_batches_at_once_and_autocast() -> None:
    module = drawn(tnmoe.plan(BLOCK, tokens=4))
    frozen, x = module.freeze(), torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(frozen)(x), torch.stack([frozen(part) for part in x]))
    module = drawn(tnmoe.plan(BLOCK, tokens=4), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = module(x.float()), module.freeze()(x.float())
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_only_products_that_nobody_else_reads() -> None:
    program = tnmoe.plan(BLOCK, tokens=4).bound
    (gelu,) = (op for op in program.ops if isinstance(op, Gelu))
    assert overwrite(program).overwrites == {gelu.out.name: gelu.x.name}
    assert not overwrite(replace(program, output=gelu.x)).overwrites
    assert not overwrite(replace(program, coefficients=(gelu.x.name,))).overwrites
    twice = Add(Value("sum", gelu.x.indices), gelu.x, gelu.out)
    assert not overwrite(replace(program, ops=(*program.ops, twice))).overwrites
    assert not overwrite(replace(program, diagnostics=(twice,))).overwrites
    of_sum = replace(gelu, out=Value("again", gelu.x.indices), x=twice.out)
    assert gelu.out.name not in overwrite(replace(program, ops=(*program.ops, twice, of_sum))).overwrites
    assert "again" not in overwrite(replace(program, ops=(*program.ops, twice, of_sum))).overwrites
    of_input = replace(gelu, out=Value("of_input", program.inputs[0].indices), x=program.inputs[0])
    assert "of_input" not in overwrite(replace(program, ops=(*program.ops, of_input))).overwrites
