"""Attention in every form that torch has. It is counted in full: what a mask, causal ones too, leaves out counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tnmoe.counting.torch_formulas.call import Call, Formula
from tnmoe.counting.torch_formulas.norms import SOFTMAX, SOFTMAX_BACKWARD
from tnmoe.counting.work import Flops


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *, masked: bool = False, dropped: bool = False
) -> Flops:
    """softmax(q kᵀ · scale + mask) v, from shapes (…, heads, length, width); keys may have fewer heads.

    The scale is one product a score, a mask one sum, dropout two products; the softmax is special.
    """
    scores = math.prod(query[:-1]) * key[-2]
    return Flops(2 * scores * (query[-1] + value[-1]), scores * (1 + masked + 2 * dropped), SOFTMAX * scores)


def attention_backward_flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    wanted: tuple[bool, bool, bool] = (True, True, True),
    *,
    masked: bool = False,
    dropped: bool = False,
) -> Flops:
    """Gradients of q, k, v of the formula above, with its weights at hand; of the mask too, if that is `masked`.

    Kernels that keep no weights compute the scores anew, which saves memory and is not part of the mathematics: it is
    counted for no kernel, so that the figure is the same for all. `wanted` says which operands need a gradient.
    """
    scores = math.prod(query[:-1]) * key[-2]
    of_q, of_k, of_v = wanted
    through = of_q or of_k or masked  # each then needs the gradient of the weights, a product with the values
    matmul = 2 * scores * (query[-1] * (of_q + of_k) + value[-1] * (of_v + through))
    others = (of_q or of_k) + masked + 2 * (dropped and through)
    return Flops(matmul, scores * others, SOFTMAX_BACKWARD * scores * through)


def _forward(mask: str) -> Formula:
    def formula(call: Call) -> Flops:
        shapes = (call.shape(name) for name in ("query", "key", "value"))
        return attention_flops(*shapes, masked=call[mask] is not None)

    return formula


def _backward(call: Call) -> Flops:
    query, key, value = (call.shape(name) for name in ("query", "key", "value"))
    return attention_backward_flops(query, key, value, masked=bool((call["grad_input_mask"] or (False,))[-1]))


def _unpadded(shape: Sequence[int], longest: Any, packed: bool) -> tuple[int, ...]:
    """(…, heads, length, width) of a kernel's (batch, length, heads, width), or of packed (rows, heads, width)."""
    if packed and len(shape) == 3:
        rows, heads, width = shape
        length = int(longest)
        return -(-rows // length) if length else 0, heads, min(length, rows), width
    batch, length, heads, width = shape
    return batch, heads, length, width


def _shapes_of_kernel(call: Call, lengths: tuple[str, str], longest: tuple[str, str]) -> list[tuple[int, ...]]:
    packed = call[lengths[0]] is not None
    q = _unpadded(call.shape("query"), call[longest[0]], packed)
    return [q, *(_unpadded(call.shape(n), call[longest[1]], packed) for n in ("key", "value"))]


FLASH = ("cum_seq_q", "cum_seq_k"), ("max_q", "max_k")
EFFICIENT = ("cu_seqlens_q", "cu_seqlens_k"), ("max_seqlen_q", "max_seqlen_k")


def _kernel(names: tuple[tuple[str, str], tuple[str, str]], *, backward: bool = False) -> Formula:
    """Of a kernel with another order of axes. Packed sequences count as the longest one, as often as rows fill it."""

    def formula(call: Call) -> Flops:
        query, key, value = _shapes_of_kernel(call, *names)
        if backward:
            return attention_backward_flops(query, key, value, masked=bool(call["bias_requires_grad"]))
        return attention_flops(query, key, value, masked=call["bias"] is not None)

    return formula


def heads_flops(query: Sequence[int], key: Sequence[int], width: int, heads: int, *, masked: bool) -> Flops:
    """`nn.MultiheadAttention`: four maps of `width` with biases around attention, from (batch, length, …)."""
    batch, length = query[0], query[1]
    others = key[1]
    inside = attention_flops(
        (batch, heads, length, width // heads),
        (batch, heads, others, width // heads),
        (batch, heads, others, width // heads),
        masked=masked,
    )
    rows = batch * (2 * length + 2 * others)
    maps = Flops(2 * rows * width * width, rows * width)
    return Flops(inside.matmul + maps.matmul, inside.elementwise + maps.elementwise, inside.special)


def _native_heads(call: Call) -> Flops:
    masked = call["mask"] is not None
    return heads_flops(call.shape("query"), call.shape("key"), call["embed_dim"], call["num_head"], masked=masked)


FORMULAS: dict[str, Formula] = {
    "aten::_scaled_dot_product_flash_attention": _forward("attn_mask"),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _forward("attn_mask"),
    "aten::_scaled_dot_product_efficient_attention": _forward("attn_bias"),
    "aten::_scaled_dot_product_cudnn_attention": _forward("attn_bias"),
    "aten::_scaled_dot_product_fused_attention_overrideable": _forward("attn_bias"),
    "aten::_scaled_dot_product_attention_math_for_mps": _forward("attn_mask"),
    "aten::_scaled_dot_product_flash_attention_backward": _backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _backward,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _backward,
    "aten::_flash_attention_forward": _kernel(FLASH),
    "aten::_cudnn_attention_forward": _forward("attn_bias"),
    "aten::_efficient_attention_forward": _kernel(EFFICIENT),
    "aten::_flash_attention_backward": _kernel(FLASH, backward=True),
    "aten::_efficient_attention_backward": _kernel(EFFICIENT, backward=True),
    "aten::_native_multi_head_attention": _native_heads,
}
