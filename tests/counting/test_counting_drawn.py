"""Drawn models, frozen in part, against torch's own counter on real tensors, forward and backward.

They are made of what that counter counts rightly: no grouped convolutions, recurrent layers or fused attention.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe

MODELS = 60


class Convolution(nn.Module):
    """Over the tokens, of the same length."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(width, width, kernel, padding="same", dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class Attention(nn.Module):
    """As products and a softmax, since weights are asked for; keys may come from fewer tokens."""

    def __init__(self, width: int, heads: int, every: int) -> None:
        super().__init__()
        self.inner, self.every = nn.MultiheadAttention(width, heads, batch_first=True), every

    def forward(self, x: Tensor) -> Tensor:
        keys = x[:, :: self.every]
        return x + self.inner(x, keys, keys, need_weights=True)[0]


class Routed(nn.Module):
    """Every token by the matrix of the expert that it likes best."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.weight = nn.Parameter(torch.randn(experts, width, width))

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(-1).max(-1)
        return shares[..., None] * (x[..., None, :] @ self.weight[chosen]).squeeze(-2)


class Twice(nn.Module):
    """The same module twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A chain of parts, some parameters frozen, and an input of few tokens, perhaps one, that may need a gradient."""
    width = draw(st.sampled_from([2, 4, 6]))
    parts: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = [
            lambda: nn.Linear(width, width, bias=draw(st.booleans())),
            lambda: Convolution(width, draw(st.integers(1, 3)), draw(st.integers(1, 2))),
            lambda: Attention(width, draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))),
            lambda: Routed(width, draw(st.integers(1, 4))),
            lambda: Twice(nn.Linear(width, width)),
            lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3), nn.GELU(), nn.Linear(3, width)),
            lambda: nn.TransformerEncoderLayer(
                width, 2, 5, dropout=0.0, batch_first=True, norm_first=draw(st.booleans())
            ),
            lambda: nn.SiLU(),
        ]
        parts.append(draw(st.sampled_from(kinds))())
    model = nn.Sequential(*parts)
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 3)) > 0)
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5])), width)
    return model, torch.randn(shape, requires_grad=draw(st.booleans()))


def by_torch(model: nn.Module, x: Tensor) -> tuple[int, int | None]:
    """Forward and, if anything has a gradient, backward."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = copy.deepcopy(model)(x)
        forward = counter.get_total_flops()
        if not y.requires_grad:
            return forward, None
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.slow
@settings(max_examples=MODELS)
@given(models())
def test_counts_are_torchs(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    forward, backward = by_torch(model, x)
    given_twice: list[Any] = [x, x.to("meta")]
    for inputs in given_twice:
        inputs = inputs.detach().requires_grad_(x.requires_grad)
        found = tnmoe.cost_model(model, inputs, backward=backward is not None, strict=True)
        assert found.total.matmul_flops == forward
        if backward is not None:
            assert found.total.backward is not None
            assert found.total.backward.matmul_flops == backward
            parts = [m.backward for m in found.modules if m.path.isdigit()]
            assert sum(work.matmul_flops for work in parts if work) == backward
        assert tnmoe.cost_model(model.eval(), inputs, strict=True).total.matmul_flops == forward
        model.train()
