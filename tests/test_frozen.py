"""FLOPs of 300 random layers with any parameters frozen: equality with what torch counts on the emitted module."""

from __future__ import annotations

import random

import pytest
import torch
from test_training import random_spec
from torch.utils.flop_counter import FlopCounterMode

import tnmoe


def test_random_layers_cost_what_torch_counts() -> None:
    """CP, TR and dense, 1 to 3 levels, one and two layers: forward, and forward with backward."""
    rng = random.Random(91)
    frozen_layers = 0
    for _ in range(300):
        plan = tnmoe.plan(
            random_spec(rng), tokens=rng.randint(1, 7), planner="greedy", input_gradients=rng.random() < 0.5
        )
        names = [p.name for p in plan.program.parameters]
        frozen = rng.sample(names, rng.randint(0, len(names))) if rng.random() < 0.7 else []
        frozen_layers += bool(frozen)
        report = tnmoe.cost(plan, frozen=frozen)
        module = tnmoe.build(plan)
        for name, p in module.named_parameters():
            p.requires_grad_(name not in frozen)
            torch.nn.init.normal_(p)
        rows = plan.values[plan.layer.token_symbol]
        x = torch.randn(rows, int(plan.bound.sizes["i"]), requires_grad=bool(plan.input_gradients))
        with FlopCounterMode(display=False) as forward:
            y = module(x)
        with FlopCounterMode(display=False) as backward:
            if y.requires_grad:
                y.sum().backward()
        told = (plan.layer.summary, plan.values, frozen)
        assert forward.get_total_flops() == report.matmul_flops, told
        assert backward.get_total_flops() == report.training_matmul_flops - report.matmul_flops, told
        trained = [p for p in module.parameters() if p.grad is not None]
        assert report.gradient_bytes >= sum(p.grad.nbytes for p in trained if p.grad is not None)
        assert report.trained_parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert frozen_layers > 100


def test_frozen_parameters_have_no_state() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), bias=False))
    report = tnmoe.cost(plan, frozen="input_factor")
    assert tnmoe.cost(plan).trained_parameters - report.trained_parameters == 6 * 3
    assert report.parameters == tnmoe.cost(plan).parameters
    assert report.training_state("adam", "fp32").state_bytes == 8 * report.trained_parameters
    assert not any("gradient of input_factor" in str(r) for r in report.backward().records())
    with pytest.raises(tnmoe.CostError, match="unknown parameter 'factor'"):
        tnmoe.cost(plan, frozen=["factor"])
