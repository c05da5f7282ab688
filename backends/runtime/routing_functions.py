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
    counts = flat.new_zeros(experts).index_add(0, flat, torch.ones_like(flat))
    return torch.argsort(order), order // positions.shape[1], counts


def sort_slots_in_blocks(positions: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_slots`, with a multiple of `block` rows for each expert, and as many in all as are always enough.

    What is left of them goes to the last expert that was chosen. Up to two slots an expert are not padded, for these
    are multiplied one by one; nor is what is compiled, whose arithmetic is the compiler's.
    """
    slots, row, counts = sort_slots(positions, experts)
    choices = slots.shape[0]
    if torch.compiler.is_compiling() or choices <= 2 * experts:
        return slots, row, counts
    padded = (counts + block - 1) // block * block
    total = block * (experts + (choices - experts) // block)
    last = torch.where(counts > 0, torch.arange(experts, device=counts.device), 0).amax(0, keepdim=True)
    padded = padded.index_add(0, last, (total - padded.sum()).unsqueeze(0))
    before = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    slots = slots + before[positions.flatten()]
    return slots, slots.new_zeros(total).index_copy(0, slots, row[slots - before[positions.flatten()]]), padded


def unsort(x: Tensor, slots: Tensor, choices: int) -> Tensor:
    """The row of each slot, (tokens, choices, ...)."""
    back = x.index_select(0, slots)
    return back.reshape(slots.shape[0] // choices, choices, *x.shape[1:])


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
    counts = chosen.new_zeros(experts).index_add(0, chosen.flatten(), torch.ones_like(chosen).flatten())
    share = counts.to(probabilities.dtype) / max(1, chosen.numel())
    return experts * (share * probabilities.sum(0) / max(1, probabilities.shape[0])).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean square of the logsumexp of each row (arXiv 2202.08906); zero without rows."""
    return torch.logsumexp(logits, -1).square().sum() / max(1, logits.shape[0])


def dropped_choices(chosen: Tensor, experts: int, capacity: int) -> Tensor:
    """How many choices find no place in a table (experts, capacity)."""
    counts = chosen.new_zeros(experts).index_add(0, chosen.flatten(), torch.ones_like(chosen).flatten())
    return (counts - capacity).clamp(min=0).sum()


def missed(positions: Tensor, count: int) -> Tensor:
    """How many of 0 … count - 1 are at none of the positions."""
    return positions.new_ones(count).index_fill(0, positions.flatten(), 0).sum()
