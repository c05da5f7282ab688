"""The same of modules with a backward pass of their own."""

from __future__ import annotations

import torch

import tnmoe
from support.memory import predicted, tracker
from support.tracked import Tracked
from tnmoe.planning.plan import Plan


def reported(plan: Plan, dtype: torch.dtype, frozen: set[str]) -> tuple[tuple[Tracked, ...], tuple[Tracked, ...]]:
    """Peaks and remains of inference and of training, off the report."""
    report = tnmoe.memory(plan, dtype=str(dtype).removeprefix("torch."), frozen=sorted(frozen))
    return predicted(list(report.inference)), predicted(list(report.training))


def tracked(plan: Plan, dtype: torch.dtype, frozen: set[str]) -> tuple[tuple[Tracked, ...], tuple[Tracked, ...]]:
    """The same off the emitted module."""
    return tracker(plan, dtype, grad=False), tracker(plan, dtype, grad=True, frozen=frozen)
