"""Sparse gates for torch. The emitter copies these definitions into the files it writes, word for word.

The threshold τ solves a convex equation, on which Newton's method from the left never overshoots. The number of its
steps depends on the number n of entries alone: 3 + ⌊½⌈log2 n⌉⌋ for entmax-1.5, whose equation is ‖max(z - τ, 0)‖ = 1
rather than its square, and 3 + ⌈¾⌈log2 n⌉⌉ for sparsemax. Few numbers are sorted. Why so, and how exact that is:
docs/decisions/newton-gates.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _entmax15_threshold(z: Tensor) -> Tensor:
    """τ such that Σ max(z - τ, 0)² = 1 over the last axis, where the largest entry is 0."""
    n = z.shape[-1]
    if not torch.compiler.is_compiling() and z.numel() < 4096:  # sorting is faster
        ordered = z.sort(-1, descending=True).values
        count = torch.arange(1, n + 1, device=z.device, dtype=z.dtype)
        total, squares = ordered.cumsum(-1), ordered.square().cumsum(-1)
        mean = total / count
        spread = torch.addcmul(squares, total, mean, value=-1)
        rest = ((1 - spread) / count).clamp(min=1e-30)
        # mean - √rest; for the root itself, MKL would wake its threads.
        tau = torch.addcmul(mean, rest, rest.rsqrt(), value=-1)
        last = n - 1 - (tau > ordered).sum(-1, keepdim=True)
        return tau.gather(-1, last)
    tau = torch.full_like(z[..., :1], -1.0)
    for _ in range(3 + (n - 1).bit_length() // 2 + (z.dtype == torch.float64)):
        # Newton's method on a norm: convex, so that it never passes the root, and nearly linear.
        excess = (z - tau).relu_()
        norm = torch.linalg.vector_norm(excess, dim=-1, keepdim=True)
        tau = torch.addcdiv(tau, (norm - 1) * norm, excess.sum(-1, keepdim=True))
    return tau


class _Entmax15Root(torch.autograd.Function):
    """r = max(x/2 - τ, 0) with τ such that Σ r² = 1, over the last axis; saves r alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        z = (z - z.amax(-1, keepdim=True)) / 2
        z = z.clamp(min=-2)  # τ ≥ -1: entries far below would only cost digits
        return (z - _entmax15_threshold(z)).clamp(min=0).to(x.dtype)

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
    """Entmax with α = 1.5 over the last axis (arXiv 1905.05702)."""
    root = _Entmax15Root.apply if torch.is_grad_enabled() else _Entmax15Root.forward
    return root(x).square()


def _sparsemax_threshold(z: Tensor) -> Tensor:
    """τ such that Σ max(z - τ, 0) = 1 over the last axis, where the largest entry is 0."""
    n = z.shape[-1]
    if not torch.compiler.is_compiling() and z.numel() < 4096:  # sorting is faster
        ordered = z.sort(-1, descending=True).values
        count = torch.arange(1, n + 1, device=z.device, dtype=z.dtype)
        excess = ordered.cumsum(-1) - 1
        chosen = (count * ordered > excess).sum(-1, keepdim=True).clamp(min=1)
        return excess.gather(-1, chosen - 1) / chosen
    tau = torch.full_like(z[..., :1], -1.0)
    digits = (n - 1).bit_length()
    steps = 3 + digits - digits // 4 + 2 * (z.dtype == torch.float64)
    for _ in range(steps):  # Newton's method; on a convex curve it never passes the root
        excess = (z - tau).relu_()
        total = excess.sum(-1, keepdim=True)
        tau = tau + (total - 1) / excess.sign_().sum(-1, keepdim=True)
    return tau


class _Sparsemax(torch.autograd.Function):
    """p = max(x - τ, 0) with τ such that Σ p = 1, over the last axis; saves p alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        z = z - z.amax(-1, keepdim=True)
        z = z.clamp(min=-2)  # τ ≥ -1: entries far below would only cost digits
        return (z - _sparsemax_threshold(z)).clamp(min=0).to(x.dtype)

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
    function = _Sparsemax.apply if torch.is_grad_enabled() else _Sparsemax.forward
    return function(x)
