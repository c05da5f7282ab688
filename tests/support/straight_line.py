"""Every family of mixtures as its paper writes it: one token after the other, one expert after the other."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import tnmoe
from support.families import Oracle, Weights, gelu, mlp, softmax


def straight_line(spec: tnmoe.Spec) -> Oracle:
    """The function that a declaration stands for, of an input (T, I) and weights in the order of the declaration."""
    return lambda x, w: FUNCTIONS[type(spec)](spec, x, w)


def choices(scores: Tensor, k: int) -> list[int]:
    """Positions of the k largest entries, the first of equal ones first, by repeated search."""
    left = scores.tolist()
    found: list[int] = []
    for _ in range(k):
        best = max((n for n in range(len(left)) if n not in found), key=lambda n: (left[n], -n))
        found.append(best)
    return found


def stacked(rows: list[Tensor], x: Tensor, width: int, w: Weights) -> Tensor:
    """The rows as one tensor, also if there are none; it depends on every operand, if only by nothing."""
    whole = torch.stack(rows) if rows else x.new_zeros(0, width)
    return whole + 0 * (x.sum() + sum(p.sum() for p in w.values()))


# ---- token choice ----------------------------------------------------------------------------------------------


def seats(spec: tnmoe.SparseMoE, wanted: list[list[int]]) -> set[tuple[int, int]]:
    """The choices (token, expert) that find a seat: first choices first, then earlier tokens."""
    experts, k = int(spec.experts), int(spec.active)
    free = [10**9] * experts
    if spec.capacity is not None:
        free = [-(-spec.capacity * k * len(wanted) // (100 * experts))] * experts
    kept = set()
    for slot in range(k):
        for t, chosen in enumerate(wanted):
            n = chosen[slot]
            if n < experts and free[n] > 0:
                free[n] -= 1
                kept.add((t, n))
    return kept


def sparse(spec: tnmoe.SparseMoE, x: Tensor, w: Weights) -> Tensor:
    expert = cp_expert if spec.factorization else mlp
    logits = x @ w["gate_projection"]
    wanted = [choices(row, int(spec.active)) for row in logits]
    kept = seats(spec, wanted)
    out = []
    for t, row in enumerate(x):
        chosen = wanted[t]
        p = softmax(logits[t])[chosen]
        shares = softmax(logits[t][chosen]) if spec.shares == "after" else p
        if spec.shares == "normalised":
            true = torch.tensor([float(n < int(spec.experts)) for n in chosen], dtype=p.dtype)
            shares = p * true / torch.clamp((p * true).sum(), min=1e-300)
        total = x.new_zeros(int(spec.outputs))
        z = row
        if spec.input_norm:
            z = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5)
            z = z * w["norm_weight"] + w["norm_bias"]
        for share, n in zip(shares, chosen, strict=True):
            if (t, n) in kept:
                total = total + share * expert(z, w, n)
        if spec.shared is not None:
            total = total + mlp(z, w, prefix="shared_")
        out.append(total)
    return stacked(out, x, int(spec.outputs), w)


def cp_expert(z: Tensor, w: Weights, n: int) -> Tensor:
    """An expert whose two matrices are slices of CP tensors."""

    def affine(z: Tensor, p: str) -> Tensor:
        matrix = torch.einsum("r,ir,or->io", w[p + "expert_factor"][n], w[p + "input_factor"], w[p + "output_factor"])
        bias = torch.einsum("r,r,or->o", w[p + "expert_factor"][n], w[p + "input_bias"], w[p + "output_factor"])
        return z @ matrix + bias

    return affine(gelu(affine(z, "up_")), "down_")


def smile(spec: tnmoe.SMILE, x: Tensor, w: Weights) -> Tensor:
    out = []
    for row in x:
        g = [softmax(row @ w[f"{level}_gate_projection"]) for level in ("node", "inner")]
        total = row.new_zeros(int(spec.outputs))
        for p in choices(g[0], int(spec.active_nodes)):
            for q in choices(g[1], int(spec.active)):
                total = total + g[0][p] * g[1][q] * mlp(row, w, int(spec.experts) * p + q)
        out.append(total)
    return stacked(out, x, int(spec.outputs), w)


def multi_head(spec: tnmoe.MultiHeadMoE, x: Tensor, w: Weights) -> Tensor:
    out = []
    for row in x @ w["head_weight"] + w["head_bias"]:
        parts = []
        for sub in row.split(spec.inputs // spec.heads):
            logits = sub @ w["gate_projection"]
            chosen = choices(logits, int(spec.active))
            parts.append(sum(s * mlp(sub, w, n) for s, n in zip(softmax(logits[chosen]), chosen, strict=True)))
        out.append(torch.cat(parts) @ w["merge_weight"] + w["merge_bias"])
    return stacked(out, x, spec.inputs, w)


def peer(spec: tnmoe.PEER, x: Tensor, w: Weights) -> Tensor:
    """All N scores of each head are formed, sorted and cut."""
    out = []
    for row in x:
        total = x.new_zeros(int(spec.outputs))
        for h in range(int(spec.heads)):
            halves = [(row @ w[f"query_{s}"][:, h]) @ w[f"keys_{s}"][h] for s in "ab"]
            scores = torch.stack([a + b for a in halves[0] for b in halves[1]])
            chosen = choices(scores, int(spec.active))
            for share, n in zip(softmax(scores[chosen]), chosen, strict=True):
                total = total + share * gelu(row @ w["down_vectors"][n]) * w["up_vectors"][n]
        out.append(total)
    return stacked(out, x, int(spec.outputs), w)


def cartesian(spec: tnmoe.CartesianMoE, x: Tensor, w: Weights) -> Tensor:
    def stage(z: Tensor, p: str) -> Tensor:
        out = []
        for row in z:
            logits = row @ w[f"{p}gate_projection"]
            chosen = choices(logits, int(spec.active))
            routed = sum(s * mlp(row, w, n, p) for s, n in zip(softmax(logits[chosen]), chosen, strict=True))
            blend = softmax(row @ w[f"{p}blend_weight"] + w[f"{p}blend_bias"])
            out.append(blend[0] * mlp(row, w, prefix=f"{p}shared_") + blend[1] * routed)
        return stacked(out, x, int(spec.inputs), w)

    z = stage(x, "first_")
    z = (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, keepdim=True, unbiased=False) + 1e-5)
    return stage(z * w["norm_weight"], "second_")


def moefied(spec: tnmoe.MoEfied, x: Tensor, w: Weights) -> Tensor:
    out = []
    for row in x:
        chosen = choices(row @ w["gate_projection"], int(spec.active))
        parts = [gelu(row @ w["up_weight"][n] + w["up_bias"][n]) @ w["down_weight"][n] for n in chosen]
        out.append(sum(parts) + w["output_bias"])
    return stacked(out, x, int(spec.outputs), w)


def heads(spec: tnmoe.MixtureOfHeads, x: Tensor, w: Weights) -> Tensor:
    keys, values = x @ w["key_weight"], x @ w["value_weight"]
    out = []
    for row in x:
        logits = row @ w["gate_projection"]
        chosen = choices(logits, int(spec.active))
        parts = [softmax((row @ w["query_weight"][n]) @ keys.T) @ values @ w["output_weight"][n] for n in chosen]
        out.append(sum(s * part for s, part in zip(softmax(logits[chosen]), parts, strict=True)))
    return stacked(out, x, int(spec.inputs), w)


# ---- what chooses or mixes tokens ------------------------------------------------------------------------------


def expert_choice(spec: tnmoe.ExpertChoice, x: Tensor, w: Weights) -> Tensor:
    scores = softmax(x @ w["gate_projection"])
    out = [row.new_zeros(int(spec.outputs)) for row in x]
    for n in range(int(spec.experts)):
        for t in choices(scores[:, n], math.ceil(spec.capacity * len(x) / (100 * int(spec.experts)))):
            out[t] = out[t] + scores[t, n] * mlp(x[t], w, n)
    return stacked(out, x, int(spec.outputs), w)


def soft_moe(spec: tnmoe.SoftMoE, x: Tensor, w: Weights) -> Tensor:
    if not len(x):
        return stacked([], x, int(spec.outputs), w)
    logits = x @ w["gate_projection"]
    slots = softmax(logits, 0).T @ x
    outputs = torch.stack([mlp(slot, w, p // int(spec.slots)) for p, slot in enumerate(slots)])
    return softmax(logits, 1) @ outputs


def mixture_of_tokens(spec: tnmoe.MixtureOfTokens, x: Tensor, w: Weights) -> Tensor:
    out = []
    for start in range(0, len(x), int(spec.group)):
        group = x[start : start + int(spec.group)]
        shares = softmax(group @ w["gate_projection"], 0)
        mixed = [mlp(shares[:, n] @ group, w, n) for n in range(int(spec.experts))]
        out += [sum(row[n] * mixed[n] for n in range(int(spec.experts))) for row in shares]
    return stacked(out, x, int(spec.outputs), w)


def mixture_of_depths(spec: tnmoe.MixtureOfDepths, x: Tensor, w: Weights) -> Tensor:
    scores = x @ w["router_weight"]
    chosen = choices(scores, math.ceil(spec.capacity * len(x) / 100))
    out = [row + scores[t] * mlp(row, w) if t in chosen else row for t, row in enumerate(x)]
    return stacked(out, x, int(spec.inputs), w)


# ---- soft gates ------------------------------------------------------------------------------------------------


def deep(spec: tnmoe.DeepMoE, x: Tensor, w: Weights) -> Tensor:
    experts = range(int(spec.experts))
    a = softmax(x @ w["first_gate_projection"])
    z = sum(a[:, n : n + 1] * gelu(x @ w["first_weight"][n] + w["first_bias"][n]) for n in experts)
    c = softmax(z @ w["second_gate_projection"])
    return sum(c[:, n : n + 1] * (z @ w["second_weight"][n] + w["second_bias"][n]) for n in experts)


def residual(spec: tnmoe.ResidualMoE, x: Tensor, w: Weights) -> Tensor:
    """Of CP differences."""
    shares = softmax(x @ w["gate_projection"])
    delta = torch.einsum("nr,ir,or->nio", w["expert_factor"], w["input_factor"], w["output_factor"])
    return torch.einsum("tn,ti,nio->to", shares, x, w["base_weight"] + delta) + w["base_bias"]


def dense(spec: tnmoe.DenseMoE, x: Tensor, w: Weights) -> Tensor:
    shares = softmax(x @ w["gate_projection"])
    return sum(shares[:, n : n + 1] * mlp(x, w, n) for n in range(int(spec.experts)))


# ---- adapters --------------------------------------------------------------------------------------------------


def molora(spec: tnmoe.MoLoRA, x: Tensor, w: Weights) -> Tensor:
    shares = softmax(x @ w["gate_projection"])
    parts = [x @ w["down_factor"][n] @ w["up_factor"][n] for n in range(int(spec.experts))]
    y = sum(shares[:, n : n + 1] * part for n, part in enumerate(parts))
    return y + x @ w["base_weight"] if spec.base else y


def mov(spec: tnmoe.MoV, x: Tensor, w: Weights) -> Tensor:
    return x * (softmax(x @ w["gate_projection"]) @ w["vectors"])


def moslora(spec: tnmoe.MoSLoRA, x: Tensor, w: Weights) -> Tensor:
    y = x @ (w["down_factor"] @ w["mixer"] @ w["up_factor"])
    return y + x @ w["base_weight"] if spec.base else y


def kron(factors: list[Tensor], norm: bool = False) -> Tensor:
    """The tensor product of vectors, the first running slowest; with `norm`, each product of two halves normalised."""
    if not norm:
        return functools.reduce(torch.kron, factors)
    if len(factors) == 1:
        return factors[0]
    half = (len(factors) + 1) // 2
    whole = torch.kron(kron(factors[:half], True), kron(factors[half:], True))
    return (whole - whole.mean()) / torch.sqrt(whole.var(unbiased=False) + 1e-5)


def tensor_poly(spec: tnmoe.TensorPoly, x: Tensor, w: Weights) -> Tensor:
    """W is formed for every token."""
    axes, ranks, experts, out = range(1, spec.order + 1), range(int(spec.rank)), range(int(spec.experts)), []

    def outer(factors: dict[tuple[str, int], Tensor]) -> Tensor:
        sides = [kron([factors[side, j] for j in axes], spec.norm) for side in ("in", "out")]
        return torch.outer(*(v * w[f"{s}_norm_weight"] if spec.norm else v for s, v in zip(("in", "out"), sides)))

    keys = [(side, j) for side in ("in", "out") for j in axes]
    for row in x:
        if spec.variant == "I":
            g = softmax(torch.einsum("i,inr->nr", row, w["gate_projection"]), 0)
            terms = [g[n, r] * outer({(s, j): w[f"{s}_{j}"][n, r] for s, j in keys}) for n in experts for r in ranks]
        else:
            gates = {j: softmax(torch.einsum("i,inr->nr", row, w[f"gate_projection_{j}"]), 0) for j in axes}
            mixed = {(s, j): torch.einsum("nr,nra->ra", gates[j], w[f"{s}_{j}"]) for s, j in keys}
            terms = [outer({key: factor[r] for key, factor in mixed.items()}) for r in ranks]
        out.append(row @ sum(terms)[: spec.inputs, : spec.outputs])
    return stacked(out, x, spec.outputs, w)


FUNCTIONS = {
    tnmoe.SparseMoE: sparse,
    tnmoe.SMILE: smile,
    tnmoe.MultiHeadMoE: multi_head,
    tnmoe.PEER: peer,
    tnmoe.CartesianMoE: cartesian,
    tnmoe.MoEfied: moefied,
    tnmoe.MixtureOfHeads: heads,
    tnmoe.ExpertChoice: expert_choice,
    tnmoe.SoftMoE: soft_moe,
    tnmoe.MixtureOfTokens: mixture_of_tokens,
    tnmoe.MixtureOfDepths: mixture_of_depths,
    tnmoe.DeepMoE: deep,
    tnmoe.ResidualMoE: residual,
    tnmoe.DenseMoE: dense,
    tnmoe.MoLoRA: molora,
    tnmoe.MoV: mov,
    tnmoe.MoSLoRA: moslora,
    tnmoe.TensorPoly: tensor_poly,
}
