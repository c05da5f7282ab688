"""Timelines as predicted, and as torch's MemTracker has them."""

from __future__ import annotations

from collections.abc import Collection

import torch

import tnmoe
from support.tracked import Tracked, ready, track
from tnmoe.footprint.timeline import Step
from tnmoe.planning.plan import Plan

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tracker(plan: Plan, dtype: torch.dtype, *, grad: bool, frozen: Collection[str] = ()) -> tuple[Tracked, ...]:
    """What torch's tracker sees of a forward pass without grad, or of a forward and then of a backward pass."""
    module = ready(tnmoe.build(plan, dtype=dtype), grad=grad, frozen=frozen)
    inputs = [torch.empty([plan.bound.sizes[i] for i in v.indices], dtype=dtype) for v in plan.bound.inputs]
    for v, x in zip(plan.bound.inputs, inputs, strict=True):
        x.requires_grad_(grad and v.name in plan.input_gradients)
    return track(module, inputs, grad=grad)


def predicted(steps: list[Step]) -> tuple[Tracked, ...]:
    """The same off a timeline."""
    ends = [k for k, m in enumerate(steps) if k + 1 == len(steps) or steps[k + 1].phase != m.phase]
    return tuple(Tracked(max(m.peak for m in steps[: end + 1]), steps[end].after) for end in ends)
