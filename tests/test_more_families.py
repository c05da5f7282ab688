"""Adapters, two-stage, bi-level and residual mixtures against straight-line implementations."""

from __future__ import annotations

import functools

import pytest
import torch
from families import Weights, built, canonical, check_family, gelu, mlp, rows, softmax
from test_families import macs
from test_sparse_moe import choices
from torch import Tensor

import tnmoe
from tnmoe.backends.moefication import balanced_clusters, split_ffn

# ---- adapters --------------------------------------------------------------------------------------------------


def molora(x: Tensor, w: Weights) -> Tensor:
    shares = softmax(x @ w["gate_projection"])
    y = sum(shares[:, n : n + 1] * (x @ w["down_factor"][n] @ w["up_factor"][n]) for n in range(4))
    return y + x @ w["base_weight"] if "base_weight" in w else y


@pytest.mark.parametrize("base", [False, True])
def test_molora(base: bool) -> None:
    report = check_family(tnmoe.MoLoRA(6, 5, 4, 3, base), molora)
    assert report.parameters == 6 * 4 + 4 * 3 * (6 + 5) + base * 30  # I N + N r (I + O)
    if not base:  # the same MACs, and N r to weigh the N r products before B
        assert report.macs == 12 * (6 * 4 + 4 * 3 * (6 + 5) + 4 * 3)


def test_mov() -> None:
    report = check_family(tnmoe.MoV(6, 4), lambda x, w: x * (softmax(x @ w["gate_projection"]) @ w["vectors"]))
    assert report.parameters == 6 * 4 + 4 * 6  # I N + N O
    assert report.macs == 12 * (6 * 4 + 4 * 6 + 6)


@pytest.mark.parametrize("base", [False, True])
def test_moslora(base: bool) -> None:
    def oracle(x: Tensor, w: Weights) -> Tensor:
        y = x @ (w["down_factor"] @ w["mixer"] @ w["up_factor"])
        return y + x @ w["base_weight"] if base else y

    report = check_family(tnmoe.MoSLoRA(6, 5, 3, base), oracle)
    assert report.parameters == 3 * (6 + 5) + 9 + base * 30  # r (I + O) + r²


def kron(factors: list[Tensor]) -> Tensor:
    """The tensor product of vectors, the first running slowest."""
    return functools.reduce(torch.kron, factors)


def tensor_poly(spec: tnmoe.TensorPoly):
    """W is formed for every token."""

    def oracle(x: Tensor, w: Weights) -> Tensor:
        axes, out = range(1, spec.order + 1), []
        for row in x:
            if spec.variant == "I":
                g = softmax(torch.einsum("i,inr->nr", row, w["gate_projection"]), 0)
                terms = [
                    g[n, r]
                    * torch.outer(kron([w[f"in_{j}"][n, r] for j in axes]), kron([w[f"out_{j}"][n, r] for j in axes]))
                    for n in range(3)
                    for r in range(2)
                ]
            else:
                gates = {j: softmax(torch.einsum("i,inr->nr", row, w[f"gate_projection_{j}"]), 0) for j in axes}
                mixed = {
                    (s, j): torch.einsum("nr,nra->ra", gates[j], w[f"{s}_{j}"]) for s in ("in", "out") for j in axes
                }
                terms = [
                    torch.outer(kron([mixed["in", j][r] for j in axes]), kron([mixed["out", j][r] for j in axes]))
                    for r in range(2)
                ]
            out.append(row @ sum(terms)[: spec.inputs, : spec.outputs])
        return torch.stack(out)

    return oracle


@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.TensorPoly(6, 5, 3, 2),
        tnmoe.TensorPoly(9, 4, 3, 2, 2, "II"),
        tnmoe.TensorPoly(8, 7, 3, 2, 3, "II"),
        tnmoe.TensorPoly(8, 27, 3, 2, 3),
    ],
    ids=str,
)
def test_tensor_poly(spec: tnmoe.TensorPoly) -> None:
    report = check_family(spec, tensor_poly(spec))
    m = spec.order
    sides = [next(s for s in range(1, 99) if s**m >= width) for width in (spec.inputs, spec.outputs)]
    routing = spec.inputs * 3 * 2 * (m if spec.variant == "II" else 1)
    assert report.parameters == m * 3 * 2 * sum(sides) + routing  # m N r (⌈I^(1/m)⌉ + ⌈O^(1/m)⌉)


# ---- several stages --------------------------------------------------------------------------------------------


def cartesian(x: Tensor, w: Weights) -> Tensor:
    def stage(z: Tensor, p: str) -> Tensor:
        out = []
        for row in z:
            logits = row @ w[f"{p}gate_projection"]
            chosen = choices(logits, 2)
            routed = sum(s * mlp(row, w, n, p) for s, n in zip(softmax(logits[chosen]), chosen, strict=True))
            blend = softmax(row @ w[f"{p}blend_weight"] + w[f"{p}blend_bias"])
            out.append(blend[0] * mlp(row, w, prefix=f"{p}shared_") + blend[1] * routed)
        return torch.stack(out)

    z = stage(x, "first_")
    z = (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, keepdim=True, unbiased=False) + 1e-5)
    return stage(z * w["norm_weight"], "second_")


def test_cartesian_moe() -> None:
    check_family(tnmoe.CartesianMoE(6, 7, 4, 2), cartesian)
    report = tnmoe.cost(tnmoe.CartesianMoE(6, 7, 4, 2, bias=False), tokens=12)
    phi = 7 * (6 + 6)
    assert report.parameters == 2 * (6 * 4 + (4 + 1) * phi + 2 * (6 + 1)) + 6
    combine = 12 * 2 * (2 * 6)  # two products of shares and outputs in each stage
    blended = 12 * 2 * (2 * 6)  # and the two blended terms
    assert report.ideal is not None
    assert report.ideal.macs == 12 * 2 * (6 * 4 + (2 + 1) * phi + 2 * 6) + combine + blended
    run = 4 * (4 + (12 * 2 - 4) // 4)  # rows in blocks of 4, for 24 choices among 4 experts
    assert report.macs == report.ideal.macs + 2 * (run - 24) * phi


def deep(x: Tensor, w: Weights) -> Tensor:
    a = softmax(x @ w["first_gate_projection"])
    z = sum(a[:, n : n + 1] * gelu(x @ w["first_weight"][n] + w["first_bias"][n]) for n in range(4))
    c = softmax(z @ w["second_gate_projection"])
    return sum(c[:, n : n + 1] * (z @ w["second_weight"][n] + w["second_bias"][n]) for n in range(4))


def test_deep_moe() -> None:
    report = check_family(tnmoe.DeepMoE(6, 7, 5, 4), deep)
    assert report.parameters == 6 * 4 + 4 * 7 * 6 + 4 * 7 + 7 * 4 + 4 * 7 * 5 + 4 * 5


def test_residual_moe() -> None:
    def oracle(x: Tensor, w: Weights) -> Tensor:
        shares = softmax(x @ w["gate_projection"])
        delta = torch.einsum("nr,ir,or->nio", w["expert_factor"], w["input_factor"], w["output_factor"])
        whole = w["base_weight"] + delta
        return torch.einsum("tn,ti,nio->to", shares, x, whole) + w["base_bias"]

    report = check_family(tnmoe.ResidualMoE(6, 5, 4, tnmoe.CP(3)), oracle)
    assert report.parameters == 6 * 4 + 3 * (4 + 6 + 5) + 6 * 5 + 5  # one core more


def smile(x: Tensor, w: Weights) -> Tensor:
    out = []
    for row in x:
        g = [softmax(row @ w[f"{level}_gate_projection"]) for level in ("node", "inner")]
        total = row.new_zeros(5)
        for p in choices(g[0], 2):
            for q in choices(g[1], 2):
                total = total + g[0][p] * g[1][q] * mlp(row, w, 4 * p + q)
        out.append(total)
    return torch.stack(out)


def test_smile() -> None:
    check_family(tnmoe.SMILE(6, 7, 5, 3, 4, 2, 2), smile)
    report = tnmoe.cost(tnmoe.SMILE(6, 7, 5, 3, 4, bias=False), tokens=12)
    assert report.parameters == 6 * (3 + 4) + 12 * 7 * 11
    assert macs(report, "up", "down") == 12 * 7 * 11


def heads(x: Tensor, w: Weights) -> Tensor:
    keys, values = x @ w["key_weight"], x @ w["value_weight"]
    out = []
    for row in x:
        logits = row @ w["gate_projection"]
        chosen = choices(logits, 2)
        parts = [softmax((row @ w["query_weight"][n]) @ keys.T) @ values @ w["output_weight"][n] for n in chosen]
        out.append(sum(s * part for s, part in zip(softmax(logits[chosen]), parts, strict=True)))
    return torch.stack(out)


def test_mixture_of_heads() -> None:
    report = check_family(tnmoe.MixtureOfHeads(6, 5, 2, 4), heads)
    assert report.layer.couples_tokens
    assert report.parameters == 6 * 5 + 2 * 5 * 6 * 4 + 2 * 6 * 4  # I N + 2 N I d_h + 2 I d_h
    combine = 12 * 2 * 6
    # I N + (2 k + 2) I d_h + 2 k T d_h for each token
    assert report.macs == 12 * (6 * 5 + (2 * 2 + 2) * 6 * 4 + 2 * 2 * 12 * 4) + combine


def test_mixture_of_heads_round_trips_and_takes_no_tokens() -> None:
    plan, module = built(tnmoe.MixtureOfHeads(6, 5, 2, 4), 12)
    assert tnmoe.check(plan).passed
    assert tnmoe.Plan.from_json(plan.to_json()).bound == plan.bound
    module(rows(plan, 12)[:0]).sum().backward()
    x = rows(plan, 12)
    x[3] = float("nan")
    assert bool(module(x).isnan().all())  # all tokens attend to it


# ---- MoEfication -----------------------------------------------------------------------------------------------


def moefied(x: Tensor, w: Weights) -> Tensor:
    out = []
    for row in x:
        chosen = choices(row @ w["gate_projection"], 2)
        parts = [gelu(row @ w["up_weight"][n] + w["up_bias"][n]) @ w["down_weight"][n] for n in chosen]
        out.append(sum(parts) + w["output_bias"])
    return torch.stack(out)


def test_moefied() -> None:
    report = check_family(tnmoe.MoEfied(6, 12, 5, 4, 2), moefied, apart=("gate_projection",))
    assert report.parameters == 6 * 12 + 12 + 12 * 5 + 5 + 6 * 4  # the FFN and its predictor
    assert report.ideal is not None
    assert macs(report.ideal, "gate", "up", "down") == 12 * (6 * 4 + 2 * 3 * 11)  # I N + k φ(H / N)


def test_all_groups_are_the_ffn() -> None:
    plan, ffn = built(tnmoe.MLP(6, 12, 5), 8)
    weights = {name: p.detach() for name, p in canonical(plan, ffn).items()}
    state = split_ffn(*(weights[f"{s}_{kind}"] for s in ("up", "down") for kind in ("weight", "bias")), groups=4)
    _, module = built(tnmoe.MoEfied(6, 12, 5, 4, 4), 8)
    module.load_state_dict({**module.state_dict(), **state})
    x = rows(plan, 8)
    assert torch.allclose(module(x), ffn(x), rtol=0, atol=1e-12)


def test_clusters_are_balanced_and_close() -> None:
    """Four well separated heaps of three points, shuffled, are found."""
    generator = torch.Generator().manual_seed(0)
    heaps = torch.randperm(12, generator=generator) % 4
    points = torch.eye(4)[heaps] * 9 + 0.1 * torch.randn(12, 4, generator=generator)
    found = balanced_clusters(points, 4)
    assert torch.bincount(found).tolist() == [3] * 4
    assert len({(int(a), int(b)) for a, b in zip(heaps, found, strict=True)}) == 4
    with pytest.raises(tnmoe.DeclarationError):
        split_ffn(torch.zeros(2, 6), torch.zeros(6), torch.zeros(6, 2), torch.zeros(2), 4)


# ---- all of them -----------------------------------------------------------------------------------------------

EVERY = {
    "molora": tnmoe.MoLoRA(6, 6, 4, 3),
    "mov": tnmoe.MoV(6, 4),
    "moslora": tnmoe.MoSLoRA(6, 6, 3, True),
    "poly": tnmoe.TensorPoly(6, 6, 3, 2, 2, "II"),
    "cartesian": tnmoe.CartesianMoE(6, 7, 4, 2),
    "deep": tnmoe.DeepMoE(6, 7, 6, 4),
    "residual": tnmoe.ResidualMoE(6, 6, 4, tnmoe.Tucker((2, 3, 3))),
    "smile": tnmoe.SMILE(6, 7, 6, 3, 4, 2, 2),
    "moefied": tnmoe.MoEfied(6, 12, 6, 4, 2),
}


@pytest.mark.parametrize("name", EVERY)
def test_contract(name: str) -> None:
    """Check, JSON, an empty batch, and a token alone gives what it gives among others."""
    plan, module = built(EVERY[name], 12)
    assert tnmoe.check(plan).passed
    assert tnmoe.Plan.from_json(plan.to_json()).bound == plan.bound
    assert not plan.layer.couples_tokens
    x = rows(plan, 12)
    module(x[:0]).sum().backward()
    alone = torch.cat([module(row.unsqueeze(0)) for row in x])
    assert torch.allclose(module(x), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_compiles_whole(name: str) -> None:
    plan, module = built(EVERY[name], 12)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (12, 6):
        x = rows(plan, count)
        assert torch.allclose(compiled(x), module(x), rtol=0, atol=1e-12)
