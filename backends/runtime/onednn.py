"""Products of the flavour `fast`. The emitter copies all that stands below the imports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula


def _find_onednn():  # type: ignore[no-untyped-def]
    """oneDNN's x @ W.T + b, private in torch, if this torch has it and it multiplies; else None.

    Where a CPU has AVX-512, it can be twice as fast as torch's own product; elsewhere it is slower.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise
        found = product(torch.eye(2), torch.ones(2, 2), None, "none", [], "")
        return product if torch.equal(found, torch.ones(2, 2)) else None
    except (AttributeError, RuntimeError):
        return None


_onednn = _find_onednn()  # type: ignore[no-untyped-call]

if _onednn is not None and _onednn not in flop_registry:  # as it is if another such file came first

    @register_flop_formula(_onednn)
    def _onednn_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        """FLOPs of a product of tensors of these shapes, for torch's own counter."""
        return 2 * x.numel() * weight[0]


class _Product(torch.autograd.Function):
    """a @ b, which `_mm` multiplies forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _mm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        (a, b), (of_a, of_b) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad.contiguous()  # once, where each product would copy an expanded one
        return None if b is None else _mm(grad, b.mT), None if a is None else _mm(a.mT, grad)


def _dense(t: Tensor) -> Tensor:
    """t, or a copy if it is no whole matrix, row by row or column by column.

    oneDNN's product reads an expanded or sliced weight a thousand times as slowly.
    """
    return t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous()


def _over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a.mT @ b, as the gradient of the weights of a 1 × 1 convolution over as many pixels as rows.

    That reads both as they lie, where a product copies the first one transposed. A single thread
    would take torch's own product for it.
    """
    x, grad = (t[None, None].permute(0, 3, 1, 2) for t in (b, a))  # one pixel high, channels last
    weight = b[:1, :1].expand(a.shape[1], b.shape[1])[..., None, None]  # its shape alone counts
    plain = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation and the like
    call = torch.ops.aten.convolution_backward
    found = call(grad, x, weight, None, *plain, [False, True, False])
    return found[1].flatten(1)  # type: ignore[no-any-return]


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b, plus a bias if given: by oneDNN for float32 on a CPU, else by public products.

    oneDNN's is slower for a single row, and autograd does not know it.
    """
    tensors = [t for t in (a, b, bias) if t is not None]
    if _onednn is not None and not torch.compiler.is_compiling() and min(a.shape) > 1:
        asked = torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
        float32 = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if asked and float32 and learns and bias is None:
            return _Product.apply(a, b)  # type: ignore[no-any-return, no-untyped-call]
        if asked and float32 and not learns:
            (left, rows), right = a.shape, b.shape[1]
            # What is copied of few rows, or of few columns on the left, stays in the cache.
            many = rows >= 2048 and bias is None and torch.get_num_threads() > 1
            wide = left >= min(right, 256) and min(left, right) >= 8
            if many and wide and a.mT.is_contiguous() and b.is_contiguous():
                return _over_rows(a.mT, b)
            bias = None if bias is None else bias.contiguous()  # its stride would not be read
            return _onednn(_dense(a), _dense(b).mT, bias, "none", [], "")  # type: ignore[no-any-return]
    return a @ b if bias is None else torch.addmm(bias, a, b)
