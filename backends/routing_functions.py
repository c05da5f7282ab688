"""Routing for torch. The emitter copies these definitions into the files it writes, word for word."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and where they are; of equal ones the first, NaN above all."""
    values, positions = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), positions[..., :k].contiguous()


def product_top_k(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest sums a[..., i] + b[..., j], and their positions i * len(b) + j (arXiv 1907.05242)."""
    (best_a, at_a), (best_b, at_b) = (s.topk(min(k, s.shape[-1])) for s in (a, b))
    sums, pairs = (best_a.unsqueeze(-1) + best_b.unsqueeze(-2)).flatten(-2).topk(k)
    width = best_b.shape[-1]
    return sums, at_a.gather(-1, pairs // width) * b.shape[-1] + at_b.gather(-1, pairs % width)


def sort_slots(positions: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for the slots (token, choice) sorted by expert: row of each slot, token of each row, rows of each expert."""
    flat = positions.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    return torch.argsort(order), order // positions.shape[1], counts


def sort_slots_in_blocks(positions: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_slots`, with a multiple of `block` rows for each expert and as many in all as are always enough."""
    flat = positions.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + block - 1) // block * block
    before = (padded - counts).cumsum(0) - (padded - counts)
    place = torch.arange(flat.shape[0], device=flat.device) + before[flat[order]]
    total = block * ((flat.shape[0] + block - 1) // block + min(experts, flat.shape[0]))
    rows = flat.new_zeros(total).index_copy(0, place, order // positions.shape[1])
    padded[-1] += total - padded.sum()
    return torch.zeros_like(order).index_copy(0, order, place), rows, padded


def unsort(x: Tensor, slots: Tensor, choices: int) -> Tensor:
    """The row of each slot, (tokens, choices, ...)."""
    back = x.index_select(0, slots)
    return back.reshape(slots.shape[0] // choices, choices, *x.shape[1:])


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of x, sorted by expert, times the matrix of their expert; rows of experts without one give zeros."""
    groups = torch.split(x, counts.tolist())
    biases = [None] * len(weight) if bias is None else bias.unbind()
    parts = [
        rows @ matrix if b is None else torch.addmm(b, rows, matrix)
        for n, (rows, matrix, b) in enumerate(zip(groups, weight.unbind(), biases, strict=False))
        if n == 0 or len(rows)
    ]
    null = sum(len(rows) for rows in groups[len(weight) :])
    if null:
        parts.append(parts[0].new_zeros(null, weight.shape[-1]))
    return torch.cat(parts)


def capacity_slots(shares: Tensor, positions: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Tables (experts, capacity) of shares and tokens: first choices first, then earlier tokens; the rest drops."""
    chosen = positions.mT.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    ends = torch.searchsorted(chosen[order], torch.arange(experts, device=chosen.device), right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    place = starts.unsqueeze(1) + torch.arange(capacity, device=chosen.device)
    filled = place < ends.unsqueeze(1)
    place = order[place.clamp(max=chosen.shape[0] - 1)]
    held = torch.where(filled, shares.mT.reshape(-1)[place], 0)
    return held, torch.where(filled, place % max(1, positions.shape[0]), 0)


def normalise(x: Tensor) -> Tensor:
    """x over its sum along the last axis; rows of zeros stay zero."""
    total = x.sum(-1, keepdim=True)
    return x / torch.where(total == 0, 1, total)


def load_balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """N times the sum over experts of (share of the choices) x (mean probability) (arXiv 2101.03961)."""
    experts = probabilities.shape[-1]
    counts = torch.bincount(chosen.flatten(), minlength=experts).to(probabilities.dtype)
    return experts * (counts / chosen.numel() * probabilities.mean(0)).sum()


def dropped_choices(chosen: Tensor, experts: int, capacity: int) -> Tensor:
    """How many choices find no place in a table (experts, capacity)."""
    return (torch.bincount(chosen.flatten(), minlength=experts) - capacity).clamp(min=0).sum()
