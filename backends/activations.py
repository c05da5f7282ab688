"""Sparse gates for torch. The emitter copies these definitions into the files it writes, word for word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Entmax15Root(torch.autograd.Function):
    """r = max(x/2 - τ, 0) with τ such that Σ r² = 1, over the last axis; saves r alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        z = (z - z.amax(-1, keepdim=True)) / 2
        z = z.clamp(min=-2)  # τ ≥ -1: entries far below would only cost digits
        ordered = z.sort(-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        mean = ordered.cumsum(-1) / count
        spread = count * (ordered.square().cumsum(-1) / count - mean.square())
        tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
        chosen = (tau <= ordered).sum(-1, keepdim=True).clamp(min=1)
        return (z - tau.gather(-1, chosen - 1)).clamp(min=0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        root: Tensor = ctx.saved_tensors[0]
        grad = grad * (root > 0)
        mean = grad.sum(-1, keepdim=True) / root.sum(-1, keepdim=True)
        return (grad - root * mean) / 2


def entmax15(x: Tensor) -> Tensor:
    """Entmax with α = 1.5 over the last axis (arXiv 1905.05702, algorithm 2)."""
    return _Entmax15Root.apply(x).square()  # type: ignore[no-untyped-call, no-any-return]


class _Sparsemax(torch.autograd.Function):
    """p = max(x - τ, 0) with τ such that Σ p = 1, over the last axis; saves p alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        z = z - z.amax(-1, keepdim=True)
        z = z.clamp(min=-2)  # τ ≥ -1: entries far below would only cost digits
        ordered = z.sort(-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        excess = ordered.cumsum(-1) - 1
        chosen = (count * ordered > excess).sum(-1, keepdim=True).clamp(min=1)
        return (z - excess.gather(-1, chosen - 1) / chosen).clamp(min=0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        p: Tensor = ctx.saved_tensors[0]
        chosen = p > 0
        grad = grad * chosen
        return grad - chosen * (grad.sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True))


def sparsemax(x: Tensor) -> Tensor:
    """Projection onto the simplex over the last axis (arXiv 1602.02068)."""
    return _Sparsemax.apply(x)  # type: ignore[no-untyped-call, no-any-return]
