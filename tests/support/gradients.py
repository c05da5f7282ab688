"""A module with a backward pass of its own beside the one of autograd."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from support import oracle
from support.modules import SPECS
from support.training import saved_bytes
from tnmoe.autodiff.adjoint import adjoint
from tnmoe.autodiff.backward_plan import Function
from tnmoe.costing.backward import gradient_names
from tnmoe.planning.plan import Plan

every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def pair(plan: Plan, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The module that leaves its backward pass to autograd, and the planned one, with the same weights."""
    plain = oracle.randomise(tnmoe.build(replace(plan, function=None), dtype=dtype), seed)
    module = tnmoe.build(plan, dtype=dtype)
    module.load_state_dict(plain.state_dict())
    return plain, module


def gradients(module: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of the input and of every parameter, for a random gradient of the output."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    module.zero_grad()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype))
    return y.detach(), [x.grad, *(p.grad for p in module.parameters())]


def assert_same(plain: nn.Module, module: nn.Module, x: Tensor, tolerance: float) -> None:
    want, want_grads = gradients(plain, x)
    got, got_grads = gradients(module, x)
    for a, b in zip([got, *got_grads], [want, *want_grads], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def draw(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def any_kept(plan: Plan, seed: int) -> Plan:
    """The plan, keeping any of the results that its function makes."""
    rng = random.Random(seed)
    whole = adjoint(plan.bound, gradient_names(plan.bound, plan.input_gradients))
    function = plan.function or Function(())
    return replace(plan, function=replace(function, kept=tuple(op.out.name for op in whole.ops if rng.random() < 0.5)))


# ---- what is planned is what runs ----------------------------------------------------------------------------


def onednn_flops(x, weight, *args, out_shape, **kwargs) -> int:
    """Two for each product; weight is (out, in)."""
    return 2 * math.prod(x) * weight[0]


def measure(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOPs of forward and backward, oneDNN's products included, and the bytes that saved-tensor hooks see."""
    saved, _ = saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with FlopCounterMode(display=False, custom_mapping={} if op is None else {op: onednn_flops}) as counter:
        module(x).sum().backward()
    return counter.get_total_flops(), saved
