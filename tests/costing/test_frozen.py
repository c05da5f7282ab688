"""Parameters that are frozen have no gradient and no state; their work is held in `test_exactness.py`."""

from __future__ import annotations

import pytest
import torch
from support.cases import blocks, case
from support.training import random_spec, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

import tnmoe


def test_frozen_parameters_have_no_state() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), bias=False))
    report = tnmoe.cost(plan, frozen="input_factor")
    assert tnmoe.cost(plan).trained_parameters - report.trained_parameters == 6 * 3
    assert report.parameters == tnmoe.cost(plan).parameters
    assert report.training_state("adam", "fp32").state_bytes == 8 * report.trained_parameters
    assert not any("gradient of input_factor" in str(r) for r in report.backward().records())
    with pytest.raises(tnmoe.CostError, match="unknown parameter 'factor'"):
        tnmoe.cost(plan, frozen=["factor"])


@pytest.mark.parametrize("block", blocks(30, of=10))
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_a_function_skips_what_is_frozen_later_and_keeps_what_was_planned(memory: str, block: range) -> None:
    """Random weights frozen on the built module: products by torch's counter, saved bytes by its hooks."""
    fewer = 0
    for seed in block:
        with case(memory, seed) as rng:
            plan = tnmoe.plan(random_spec(rng), tokens=6, planner="greedy", memory=memory, input_gradients=False)
            names = [p.name for p in plan.bound.parameters]
            frozen = rng.sample(names, rng.randint(1, len(names)))
            module, x = tnmoe.build(plan), torch.randn(6, int(plan.bound.sizes["i"]))
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name not in frozen)
            with FlopCounterMode(display=False) as counter:
                y = module(x)
                if y.requires_grad:
                    y.sum().backward()
            report = tnmoe.cost(plan, frozen=frozen)
            assert counter.get_total_flops() == report.training_matmul_flops, (plan.layer.summary, frozen)
            saved, _ = saved_bytes(lambda module=module, x=x: module(x), [*module.parameters(), *module.buffers(), x])
            assert saved == report.saved_bytes, (plan.layer.summary, frozen)
            assert report.saved_bytes == report.formula("saved_bytes").subs(
                {tnmoe.symbol(k): v for k, v in plan.values.items()}
            )
            fewer += report.training_matmul_flops < tnmoe.cost(plan).training_matmul_flops
    assert fewer > 4
