"""Products of rows with the matrix of their expert. The emitter copies all that stands below the imports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of x, sorted by expert, times the matrix of their expert; rows of experts without one give zeros."""
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    on_device = has_grouped_mm(x, weight)
    if not on_device and not torch.compiler.is_compiling():
        return expert_loop(x, weight, counts, bias)
    null = counts.shape[0] - weight.shape[0]
    owner = torch.arange(counts.shape[0], device=x.device)
    owner = torch.repeat_interleave(owner, counts, output_size=x.shape[0]) if null or bias is not None else owner
    if on_device:  # it leaves the rows behind the last matrix undefined, and so does its backward pass
        x = torch.where((owner < weight.shape[0]).unsqueeze(1), x, 0) if null else x
        ends = counts[: weight.shape[0]].cumsum(0, dtype=torch.int32)
        y = F.grouped_mm(x, weight, offs=ends)
        y = torch.where((owner < weight.shape[0]).unsqueeze(1), y, 0) if null else y
    else:
        y = torch.ops.tnmoe_emitted.grouped_matmul(x, weight, counts)
    return y if bias is None else y + F.pad(bias, (0, 0, 0, null)).index_select(0, owner)


def has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a kernel for all experts at once: bfloat16, CUDA from 8.0 on, axes of whole 16 bytes."""
    fits = x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    aligned = x.shape[-1] % 8 == 0 and weight.shape[-1] % 8 == 0
    return fits and aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def expert_loop(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product for each expert; up to two rows an expert one for each row, which then depends on no other."""
    sizes = counts.tolist()
    if x.shape[0] <= 2 * len(sizes):
        owners = [n for n, count in enumerate(sizes) for _ in range(count)]
        groups = x.unsqueeze(1).unbind()
    else:
        owners = [n for n, count in enumerate(sizes) if count]
        groups = torch.split(x, [sizes[n] for n in owners])
    # All slices are taken at once for the sake of their gradients: each by itself would have one of the whole.
    trained = torch.is_grad_enabled()
    matrices = weight.unbind() if trained and weight.requires_grad else weight
    biases = bias.unbind() if trained and bias is not None and bias.requires_grad else bias
    true = [(n, rows) for n, rows in zip(owners, groups, strict=True) if n < len(matrices)]
    parts = [rows @ matrices[n] if biases is None else torch.addmm(biases[n], rows, matrices[n]) for n, rows in true]
    parts = parts or [x[:0] @ matrices[0]]  # so that the weights have a gradient, of zeros
    null = x.shape[0] - sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(null, weight.shape[-1])] if null else parts)


def outer_loop(x: Tensor, grad: Tensor, counts: Tensor, experts: int) -> Tensor:
    """The gradient of the matrices: for each expert its rows of x, transposed, times theirs of `grad`."""
    sizes = counts.tolist()
    groups = zip(torch.split(x, sizes), torch.split(grad, sizes), strict=True)
    return torch.stack([rows.mT @ theirs for rows, theirs in groups][:experts])


def grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Gradients of the compiled form, by the compiled forms."""
    x, weight, counts = ctx.saved_tensors
    ops, grad = torch.ops.tnmoe_emitted, grad.contiguous()
    of_x = ops.grouped_matmul(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
    of_weight = ops.grouped_outer(x, grad, counts, weight.shape[0]) if ctx.needs_input_grad[1] else None
    return of_x, of_weight, None


def grouped_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    """All operands are kept."""
    ctx.save_for_backward(*inputs)


def register_grouped() -> None:
    """Loops over experts as ops that `torch.compile` and `torch.export` take whole; once in a process."""
    if hasattr(torch.ops.tnmoe_emitted, "grouped_matmul"):
        return

    def product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return expert_loop(x, weight, counts)

    def outer(x: Tensor, grad: Tensor, counts: Tensor, experts: int) -> Tensor:
        return outer_loop(x, grad, counts, experts)

    for name, loop in (("grouped_matmul", product), ("grouped_outer", outer)):
        op = torch.library.custom_op(f"tnmoe_emitted::{name}", loop, mutates_args=())
        if name == "grouped_matmul":
            op.register_fake(lambda x, weight, counts: x.new_empty(x.shape[0], weight.shape[-1]))
            op.register_autograd(grouped_backward, setup_context=grouped_context)
        else:
            op.register_fake(lambda x, grad, counts, experts: x.new_empty(experts, x.shape[-1], grad.shape[-1]))


register_grouped()
