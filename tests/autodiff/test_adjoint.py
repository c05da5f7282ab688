"""The planned backward program, run by NumPy, against torch's gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.gradients import draw, pair
from support.modules import SPECS

import tnmoe
from tnmoe.backends.numpy import execute as numpy_backend


def test_numpy_runs_the_backward_program() -> None:
    """The backward ops mean what the NumPy backend says: it finds the gradients of torch."""
    plan = tnmoe.plan(SPECS["tr_block"], tokens=4, memory="recompute")
    a = plan.adjoint
    plain, module = pair(plan)
    x = draw(4, 6)
    stored = {n: p.detach().numpy() for n, p in plain.named_parameters()}
    forward = numpy_backend.execute(plan.bound, {"x": x.detach().numpy(), **stored}, training=True)
    seed = np.random.default_rng(0).normal(size=(4, 5))
    known = {v.name: forward[v.name] for v in a.backward_program.leaves if v.name in forward}
    found = numpy_backend.execute(a.backward_program, {**known, a.seed.name: seed})
    module(x).backward(torch.from_numpy(seed))
    for name, p in module.named_parameters():
        if name in a.wanted:
            np.testing.assert_allclose(found[a.wanted[name].name], p.grad.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "way", [{"memory": "save"}, {"flavour": "fast"}, {"flavour": "triton"}, {"memory": 10**6}], ids=str
)
def test_an_end_that_computes_nothing_backwards_is_refused(way: dict[str, Any]) -> None:
    """A residual sum after a scatter hands its gradient on to both: there is no backward pass to write."""
    with pytest.raises(tnmoe.PlanError, match="its output comes straight from ScatterAdd"):
        tnmoe.plan(tnmoe.MixtureOfDepths(192, 640, 12), tokens=512, **way)
    assert tnmoe.plan(tnmoe.MixtureOfDepths(192, 640, 12), tokens=512).function is None
