"""What runs in place of operations whose kernels, and so whose costs, torch would choose by device, type or values.

Each gives results of the right shapes, passes gradients on, and charges formulas to the counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnmoe.counting.counter import WorkCounter
from tnmoe.counting.torch_formulas.attention import attention_backward_flops, attention_flops
from tnmoe.counting.torch_formulas.call import tensor_bytes
from tnmoe.counting.torch_formulas.grouped import grouped_bytes, grouped_flops
from tnmoe.counting.work import Flops, Work

Charge = Callable[[Sequence[bool]], None]
"""Adds the work of a backward pass, given which operands need a gradient."""


class _Opaque(torch.autograd.Function):
    """Some tensors to one of a shape, by work that is charged and not done."""

    @staticmethod
    def forward(ctx: Any, charge: Charge, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        ctx.charge = charge
        ctx.made = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        like = next(t for t in tensors if t is not None)
        return like.new_empty(tuple(shape), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        ctx.charge(wanted)
        made = (
            torch.empty(m[0], dtype=m[1], device=m[2]) if w and m is not None else None
            for w, m in zip(wanted, ctx.made, strict=True)
        )
        return (None, None, None, *made)


def opaque(charge: Charge, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
    """A tensor of a shape that depends on others; its backward pass is charged when it runs."""
    return _Opaque.apply(charge, shape, dtype, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def attention(counter: WorkCounter) -> Callable[..., Tensor]:
    """In place of `torch.nn.functional.scaled_dot_product_attention`."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        operands = (query, key, value, attn_mask)
        shapes = query.shape, key.shape, value.shape
        lead = query.shape[:-2] if enable_gqa else torch.broadcast_shapes(*(s[:-2] for s in shapes))  # type: ignore[no-untyped-call]
        shapes = torch.Size((*lead, *query.shape[-2:])), key.shape, value.shape
        if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
            raise RuntimeError(f"attention of queries {query.shape}, keys {key.shape} and values {value.shape}")
        out_shape = (*lead, query.shape[-2], value.shape[-1])
        read = sum(tensor_bytes(t) for t in operands if t is not None)
        written = query.element_size() * torch.Size(out_shape).numel()
        counter.add(attention_flops(*shapes, masked=attn_mask is not None, dropped=dropout_p > 0), (read, written))

        def charge(wanted: Sequence[bool]) -> None:
            of_q, of_k, of_v, of_mask = wanted
            flops = attention_backward_flops(*shapes, (of_q, of_k, of_v), masked=of_mask, dropped=dropout_p > 0)
            made = sum(tensor_bytes(t) for t, want in zip(operands, wanted, strict=True) if want and t is not None)
            counter.add(flops, (read + written, made))

        return opaque(charge, out_shape, query.dtype, *operands)

    return scaled_dot_product_attention


def flexible_attention(counter: WorkCounter) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """In place of the operation behind `flex_attention`; what its user's functions do to scores does not count.

    Blocks that a mask leaves out count as in all other attention.
    """
    plain = attention(counter)

    def flex_attention_hop(
        query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = plain(query, key, value, enable_gqa=True)
        statistics = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        return out, statistics, statistics

    return flex_attention_hop


def grouped_product(rows: Tensor, weight: Tensor, counter: WorkCounter) -> Tensor:
    """Rows (S, K), each times a matrix of (E, K, N), whichever the router chooses: (S, N).

    As many matrices are read as rows can choose, at most all; the gradient of the weights is written for all.
    """
    (count, inner), (experts, _, outer) = rows.shape, weight.shape
    flops = grouped_flops(count, inner, outer)
    read, chosen = tensor_bytes(rows), grouped_bytes(count, experts, tensor_bytes(weight))
    written = rows.element_size() * count * outer
    counter.add(flops, (read + chosen, written))

    def charge(wanted: Sequence[bool]) -> None:
        of_rows, of_weight = wanted
        if of_rows:
            counter.add(flops, (written + chosen, read))
        if of_weight:
            counter.add(flops, (written + read, tensor_bytes(weight)))

    return opaque(charge, (count, outer), rows.dtype, rows, weight)


def charged(counter: WorkCounter, work: Work) -> None:
    """Charge work that a report has told."""
    flops = Flops(work.matmul_flops, work.elementwise_flops, work.special_flops)
    counter.add(flops, (work.read_bytes, work.written_bytes))
