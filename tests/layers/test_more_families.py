"""Adapters, two-stage, bi-level and residual mixtures against straight-line implementations."""

from __future__ import annotations

import pytest
import torch
from support.families import built, canonical, check_compiled, rows
from support.family_claims import held, macs

import tnmoe
from tnmoe.weights.moefication import balanced_clusters, split_ffn

# ---- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True])
def test_molora(base: bool) -> None:
    report = held(tnmoe.MoLoRA(6, 5, 4, 3, base))
    assert report.parameters == 6 * 4 + 4 * 3 * (6 + 5) + base * 30  # I N + N r (I + O)
    if not base:  # the same MACs, and N r to weigh the N r products before B
        assert report.macs == 12 * (6 * 4 + 4 * 3 * (6 + 5) + 4 * 3)


def test_mov() -> None:
    report = held(tnmoe.MoV(6, 4))
    assert report.parameters == 6 * 4 + 4 * 6  # I N + N O
    assert report.macs == 12 * (6 * 4 + 4 * 6 + 6)


@pytest.mark.parametrize("base", [False, True])
def test_moslora(base: bool) -> None:
    report = held(tnmoe.MoSLoRA(6, 5, 3, base))
    assert report.parameters == 3 * (6 + 5) + 9 + base * 30  # r (I + O) + r²


@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.TensorPoly(6, 5, 3, 2),
        tnmoe.TensorPoly(9, 4, 3, 2, 2, "II"),
        tnmoe.TensorPoly(8, 7, 3, 2, 3, "II"),
        tnmoe.TensorPoly(8, 27, 3, 2, 3),
        tnmoe.TensorPoly(6, 5, 3, 2, norm=True),
        tnmoe.TensorPoly(9, 4, 3, 2, 2, "II", True),
        tnmoe.TensorPoly(8, 7, 3, 2, 3, "I", True),
        tnmoe.TensorPoly(8, 7, 3, 2, 4, "II", True),
    ],
    ids=str,
)
def test_tensor_poly(spec: tnmoe.TensorPoly) -> None:
    report = held(spec)
    m = spec.order
    sides = [next(s for s in range(1, 99) if s**m >= width) for width in (spec.inputs, spec.outputs)]
    routing = spec.inputs * 3 * 2 * (m if spec.variant == "II" else 1)
    norms = sum(s**m for s in sides) if spec.norm else 0
    assert report.parameters == m * 3 * 2 * sum(sides) + routing + norms  # m N r (⌈I^(1/m)⌉ + ⌈O^(1/m)⌉)


# ---- several stages --------------------------------------------------------------------------------------------


def test_cartesian_moe() -> None:
    held(tnmoe.CartesianMoE(6, 7, 4, 2))
    report = tnmoe.cost(tnmoe.CartesianMoE(6, 7, 4, 2, bias=False), tokens=12)
    phi = 7 * (6 + 6)
    assert report.parameters == 2 * (6 * 4 + (4 + 1) * phi + 2 * (6 + 1)) + 6
    combine = 12 * 2 * (2 * 6)  # two products of shares and outputs in each stage
    blended = 12 * 2 * (2 * 6)  # and the two blended terms
    assert report.ideal is not None
    assert report.ideal.macs == 12 * 2 * (6 * 4 + (2 + 1) * phi + 2 * 6) + combine + blended
    run = 4 * (4 + (12 * 2 - 4) // 4)  # rows in blocks of 4, for 24 choices among 4 experts
    assert report.macs == report.ideal.macs + 2 * (run - 24) * phi


def test_deep_moe() -> None:
    report = held(tnmoe.DeepMoE(6, 7, 5, 4))
    assert report.parameters == 6 * 4 + 4 * 7 * 6 + 4 * 7 + 7 * 4 + 4 * 7 * 5 + 4 * 5


def test_residual_moe() -> None:
    report = held(tnmoe.ResidualMoE(6, 5, 4, tnmoe.CP(3)))
    assert report.parameters == 6 * 4 + 3 * (4 + 6 + 5) + 6 * 5 + 5  # one core more


def test_smile() -> None:
    held(tnmoe.SMILE(6, 7, 5, 3, 4, 2, 2))
    report = tnmoe.cost(tnmoe.SMILE(6, 7, 5, 3, 4, bias=False), tokens=12)
    assert report.parameters == 6 * (3 + 4) + 12 * 7 * 11
    assert macs(report, "up", "down") == 12 * 7 * 11


def test_mixture_of_heads() -> None:
    report = held(tnmoe.MixtureOfHeads(6, 5, 2, 4))
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


def test_moefied() -> None:
    report = held(tnmoe.MoEfied(6, 12, 5, 4, 2), apart=("gate_projection",))
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
    "cartesian, masked": tnmoe.CartesianMoE(6, 7, 4, 2, lowering="masked"),
    "smile, masked": tnmoe.SMILE(6, 7, 6, 3, 4, 2, 2, lowering="masked"),
    "moefied, masked": tnmoe.MoEfied(6, 12, 6, 4, 2, "masked"),
    "poly, norm": tnmoe.TensorPoly(6, 6, 3, 2, 3, "II", True),
}


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_compiles_whole(name: str) -> None:
    check_compiled(EVERY[name])
