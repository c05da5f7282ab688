"""Families of mixtures against straight-line implementations: loops over tokens, experts and slots."""

from __future__ import annotations

import math

import pytest
import torch
from support.families import built, canonical, check_compiled, rows, softmax
from support.family_claims import held, macs

import tnmoe
from tnmoe.backends.numpy.execute import execute
from tnmoe.ir.contractions import Merge
from tnmoe.ir.pointwise_ops import Entmax15, Sparsemax
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder

PHI = 7 * (6 + 5)
"""Products of one two-layer expert of the sizes below."""


# ---- layers that couple tokens ---------------------------------------------------------------------------------


def test_expert_choice() -> None:
    report = held(tnmoe.ExpertChoice(6, 5, 4, 150, hidden=7))
    assert report.layer.couples_tokens
    report = tnmoe.cost(tnmoe.ExpertChoice(6, 5, 4, 150, hidden=7, bias=False), tokens=12)
    assert report.parameters == 6 * 4 + 4 * PHI
    assert macs(report, "gate", "up", "down") == 12 * 6 * 4 + 4 * 5 * PHI  # I N + (N c / T) φ for each token


def test_soft_moe() -> None:
    report = held(tnmoe.SoftMoE(6, 5, 4, 3, hidden=7))
    assert report.layer.couples_tokens
    report = tnmoe.cost(tnmoe.SoftMoE(6, 6, 4, 3, hidden=7, bias=False), tokens=24)
    phi = 7 * (6 + 6)
    assert report.parameters == 4 * 3 * 6 + 4 * phi  # N s I + N φ
    assert report.macs == 24 * (3 * 4 * 3 * 6) + 4 * 3 * phi  # 3 N s I + (N s / T) φ for each token


@pytest.mark.parametrize("norm", [False, True])
def test_soft_moe_shows_its_coefficients(norm: bool) -> None:
    """C, of which the layer's own program reads more than the shares: its logits, and the normed input."""
    plan, module = built(tnmoe.SoftMoE(6, 5, 4, 3, hidden=7, input_norm=norm), 12)
    x = rows(plan, 12)
    z = torch.nn.functional.layer_norm(x, (6,), module.norm_weight, module.norm_bias) if norm else x
    (shares,) = module.expert_coefficients(x.reshape(3, 4, 6))
    assert torch.allclose(shares.reshape(12, 12), softmax(z @ module.gate_projection), rtol=0, atol=1e-14)


def test_entmax_runs_over_any_axis() -> None:
    """Sparse gates over the tokens and over a middle axis, by their definition: differences to a threshold, squared."""
    for activation, power in ((Entmax15, 2), (Sparsemax, 1)):
        for axis in range(3):
            b = Builder([6, 3, 4], 6)
            b.size("n", "N", 3)
            b.size("r", "R", 4)
            project = b.weight("project", ("i", "n", "r"), b.fan_in("i"), "gate")
            logits = b.network(Value("logits", ("t", "n", "r"), "gate"), b.x, project)
            y = Value("y", logits.indices, "gate")
            merged = Value("merged", ("t", "q"), "gate")
            b.length("q", b.sizes.sizes["n"] * b.sizes.sizes["r"])
            b.add(activation(y, logits, logits.indices[axis]), Merge(merged, y, "q", ("n", "r")))
            plan = tnmoe.plan(b.layer("Gate", merged, tnmoe.MoV(6, 3)), tokens=5)
            x = rows(plan, 5)
            module = tnmoe.build(plan, dtype=torch.float64)
            weights = canonical(plan, module)
            env = {"x": x.numpy(), "project": module.project.detach().numpy()}
            got = torch.from_numpy(execute(plan.bound, env)["merged"])
            z = torch.einsum("ti,inr->tnr", x, weights["project"]).detach() / power
            low, high = z.amax(axis, keepdim=True) - 1, z.amax(axis, keepdim=True)
            for _ in range(60):
                middle = (low + high) / 2
                above = (z - middle).clamp(min=0).pow(power).sum(axis, keepdim=True) >= 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            want = (z - low).clamp(min=0).pow(power).flatten(1)
            assert torch.allclose(got, want, rtol=0, atol=1e-12)
            assert torch.allclose(module(x).detach(), want, rtol=0, atol=1e-12)


def test_mixture_of_tokens() -> None:
    report = held(tnmoe.MixtureOfTokens(6, 7, 5, 4, 3))
    assert report.layer.couples_tokens
    report = tnmoe.cost(tnmoe.MixtureOfTokens(6, 7, 6, 4, 3, bias=False), tokens=12)
    phi = 7 * (6 + 6)
    assert report.parameters == 6 * 4 + 4 * phi
    assert report.macs == 12 * 3 * 6 * 4 + 12 // 3 * 4 * phi  # 3 I N + (N / g) φ for each token


def test_check_takes_whole_groups() -> None:
    assert tnmoe.check(tnmoe.plan(tnmoe.MixtureOfTokens(6, 7, 5, 4, 16), tokens=32)).passed


def test_mixture_of_tokens_takes_whole_groups_alone() -> None:
    _, module = built(tnmoe.MixtureOfTokens(6, 7, 5, 4, 3), 12)
    with pytest.raises(RuntimeError, match="unflatten"):
        module(torch.zeros(13, 6, dtype=torch.float64))


def test_mixture_of_depths() -> None:
    report = held(tnmoe.MixtureOfDepths(6, 7, 30))
    assert report.layer.couples_tokens
    report = tnmoe.cost(tnmoe.MixtureOfDepths(6, 7, 25, bias=False), tokens=12)
    assert report.parameters == 6 + 7 * 12
    assert macs(report, "gate", "up", "down") == 12 * 6 + 3 * 7 * 12  # I + (c / T) of the block for each token


# ---- PEER ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_peer(sparse: bool) -> None:
    report = held(tnmoe.PEER(6, 5, 64, 2, 3, 4, sparse_gradients=sparse))
    assert not report.layer.couples_tokens
    assert report.parameters == 64 * (6 + 5) + 2 * 2 * 4 * (6 + 8)  # N (I + O) + 2 h d_k (I + √N)
    weighted = 2 * 3  # h k products of shares and activations
    assert report.macs == 12 * (2 * 2 * 4 * (6 + 8) + 2 * 3 * (6 + 5) + weighted)


def test_peer_takes_all_of_a_side_and_a_single_expert() -> None:
    for experts, active in ((9, 3), (1, 1)):
        _, module = built(tnmoe.PEER(4, 4, experts, 1, active, 2), 5)
        y = module(torch.randn(5, 4, dtype=torch.float64))
        assert bool(y.isfinite().all())


def test_peer_never_scores_all_experts() -> None:
    """At a million experts no value but the stored vectors has that size."""
    plan = tnmoe.plan(tnmoe.PEER(256, 256, 1 << 20, 8, 16, 128), tokens=64)
    sizes = plan.bound.sizes
    largest = max(math.prod(int(sizes[i]) for i in op.out.indices) for op in plan.bound.ops)
    assert largest == 64 * 8 * 16 * 256
    assert tnmoe.cost(plan).parameters == (1 << 20) * 512 + 2 * 8 * 128 * (256 + 1024)


# ---- multi-head ------------------------------------------------------------------------------------------------


def test_multi_head_moe() -> None:
    report = held(tnmoe.MultiHeadMoE(8, 7, 5, 2, 2))
    assert not report.layer.couples_tokens
    report = tnmoe.cost(tnmoe.MultiHeadMoE(8, 7, 5, 2, 2, bias=False), tokens=12)
    phi = 7 * (8 + 8)
    assert report.parameters == 2 * 64 + 2 * 8 + 8 * 5 // 2 + 5 * phi // 2  # 2 I² + 2 I + I N / h + N φ / h
    assert report.ideal is not None
    assert macs(report.ideal, "head", "gate", "up", "down", "merge") == 12 * (2 * 64 + 8 * 5 + 2 * phi)
    run = 4 * (5 + (12 * 2 * 2 - 5) // 4)  # rows of sub-tokens in blocks of 4, for 48 choices among 5 experts
    assert macs(report, "up", "down") == run * 7 * (4 + 4)


# ---- all of them -----------------------------------------------------------------------------------------------

EVERY = {
    "expert choice": tnmoe.ExpertChoice(8, 8, 4, 100, hidden=6),
    "soft": tnmoe.SoftMoE(8, 8, 4, 2, hidden=6, input_norm=True),
    "mixture of tokens": tnmoe.MixtureOfTokens(8, 6, 8, 4, 3),
    "mixture of depths": tnmoe.MixtureOfDepths(8, 6, 50),
    "peer": tnmoe.PEER(8, 8, 16, 2, 3, 4),
    "multi-head": tnmoe.MultiHeadMoE(8, 6, 4, 2, 2),
    "multi-head, masked": tnmoe.MultiHeadMoE(8, 6, 4, 2, 2, lowering="masked"),
    "expert choice, tensor ring": tnmoe.ExpertChoice(8, 8, 4, 100, 6, factorization=tnmoe.TensorRing((2, 3, 2))),
    "soft, Tucker": tnmoe.SoftMoE(8, 8, 4, 2, 6, factorization=tnmoe.Tucker((2, 3, 3))),
}


@pytest.mark.parametrize("name", EVERY)
def test_checks_round_trip_and_empty_batch(name: str) -> None:
    """The command's own check (NumPy against torch, numel, FLOPs), plans as JSON, an empty batch, any leading axes."""
    plan, module = built(EVERY[name], 12)
    assert tnmoe.check(plan).passed
    assert tnmoe.Plan.from_json(plan.to_json()).bound == plan.bound
    x = rows(plan, 12)
    empty = x[:0].requires_grad_()
    module(empty).sum().backward()
    assert torch.allclose(module(x.reshape(3, 4, 8)).reshape(12, 8), module(x), rtol=0, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_compiles_whole(name: str) -> None:
    check_compiled(EVERY[name])


@pytest.mark.parametrize("name", [name for name, spec in EVERY.items() if spec.layer().couples_tokens])
def test_layers_that_couple_tokens_do(name: str) -> None:
    """The flag is no precaution: another token's change does reach a token that stays."""
    plan, module = built(EVERY[name], 12)
    x = rows(plan, 12)
    y, moved = module(x), []
    for t in range(12):
        other = 10 * x[t - 1].repeat(12, 1)
        other[t] = x[t]
        moved.append(not torch.allclose(module(other)[t], y[t], rtol=0, atol=1e-9))
    assert any(moved)


@pytest.mark.parametrize("name", EVERY)
def test_nan_propagates(name: str) -> None:
    plan, module = built(EVERY[name], 12)
    x = rows(plan, 12)
    x[1] = float("nan")
    assert bool(module(x)[1].isnan().any())


@pytest.mark.parametrize(
    "call",
    [
        lambda: tnmoe.ExpertChoice(6, 5, 4, 500),
        lambda: tnmoe.MixtureOfDepths(6, 7, 120),
        lambda: tnmoe.PEER(6, 5, 63, 2, 3, 4),
        lambda: tnmoe.PEER(6, 5, 64, 2, 9, 4),
        lambda: tnmoe.MultiHeadMoE(7, 7, 4, 2, 2),
        lambda: tnmoe.MultiHeadMoE(8, 7, 4, 5, 2),
        lambda: tnmoe.SoftMoE(6, 5, 4, 0),
    ],
)
def test_bad_declarations(call) -> None:
    with pytest.raises(tnmoe.DeclarationError):
        call()
