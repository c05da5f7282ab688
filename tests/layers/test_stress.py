"""Routing under stress: every mixture, in every lowering, at the edges of what a router can be given.

Values and gradients are those of a straight line over tokens and experts, which knows nothing of dispatch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.families import assert_equal, built, canonical, gelu
from support.straight_line import choices, seats, straight_line
from torch import Tensor, nn

import tnmoe
from tnmoe.backends.numpy.execute import execute
from tnmoe.layers.kinds import KINDS

WIDTH, TOKENS = 6, 12

FAMILIES: dict[str, tnmoe.Spec] = {
    "sparse": tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7),
    "sparse, linear": tnmoe.SparseMoE(WIDTH, 5, 4, 2, shares="before"),
    "sparse, shared": tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7, shares="normalised", shared=3, input_norm=True),
    "sparse, no block": tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7, block=1),
    "sparse, null": tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7, null=3, shares="normalised"),
    "sparse, capacity": tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7, capacity=75),
    "sparse, CP": tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7, factorization=tnmoe.CP(3)),
    "SMILE": tnmoe.SMILE(WIDTH, 7, 5, 2, 3, 1, 2),
    "multi-head": tnmoe.MultiHeadMoE(WIDTH, 7, 4, 2, 2),
    "CartesianMoE": tnmoe.CartesianMoE(WIDTH, 7, 4, 2),
    "MoEfied": tnmoe.MoEfied(WIDTH, 12, 5, 4, 2),
    "PEER": tnmoe.PEER(WIDTH, 5, 16, 2, 2, 3),
    "PEER, sparse gradients": tnmoe.PEER(WIDTH, 5, 16, 2, 2, 3, sparse_gradients=True),
    "MoA": tnmoe.MixtureOfHeads(WIDTH, 4, 2, 3),
    "expert choice": tnmoe.ExpertChoice(WIDTH, 5, 4, 100, hidden=7),
    "Soft MoE": tnmoe.SoftMoE(WIDTH, 5, 4, 2, hidden=7),
    "Mixture of Tokens": tnmoe.MixtureOfTokens(WIDTH, 7, 5, 4, 3),
    "Mixture of Depths": tnmoe.MixtureOfDepths(WIDTH, 7, 40),
    "dense": tnmoe.DenseMoE(WIDTH, 7, 5, 4),
    "Deep MoE": tnmoe.DeepMoE(WIDTH, 7, 5, 4),
    "Residual MoE": tnmoe.ResidualMoE(WIDTH, 5, 4, tnmoe.CP(3)),
    "MoLORA": tnmoe.MoLoRA(WIDTH, 5, 4, 2, True),
    "MoV": tnmoe.MoV(WIDTH, 4),
    "TensorPoly-I": tnmoe.TensorPoly(WIDTH, 5, 3, 2),
    "TensorPoly-II": tnmoe.TensorPoly(WIDTH, 5, 3, 2, 2, "II"),
    "TensorPoly-II, norm": tnmoe.TensorPoly(WIDTH, 5, 3, 2, 2, "II", True),
}

FORMS = {
    f"{name}, {lowering}" if lowering else name: replace(spec, lowering=lowering) if lowering else spec
    for name, spec in FAMILIES.items()
    for lowering in (spec.layer().lowerings or ("",))
}
"""Every family in every program that its declaration leaves to choose from."""

ROUTED = {
    name: spec for name, spec in FORMS.items() if {"active", "capacity"} & {f.name for f in dataclasses.fields(spec)}
}


def test_every_mixture_stands_here() -> None:
    kinds = {spec.kind for spec in FAMILIES.values()}
    assert set(KINDS) - kinds == {"mumoe", "mumoe_block", "linear", "mlp", "factorized_linear", "moslora"}
    assert {name for name, spec in FAMILIES.items() if spec.layer().lowerings} == {
        *("sparse", "sparse, linear", "sparse, shared", "sparse, no block", "sparse, CP"),
        *("SMILE", "multi-head", "CartesianMoE", "MoEfied"),
    }


def changed(spec: tnmoe.Spec, **values: int) -> tnmoe.Spec:
    """The declaration with those of the values that it has."""
    own = {f.name for f in dataclasses.fields(spec)}
    return replace(spec, **{name: value for name, value in values.items() if name in own})


def inputs(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without_gates(module: nn.Module) -> None:
    """Every score equal: gates, routers and queries of zeros."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "gate_projection" in name or name == "router_weight" or name.startswith("query_"):
                p.zero_()


def case(name: str, spec: tnmoe.Spec) -> tuple[tnmoe.Spec, Tensor]:
    """The declaration and the input of a case; "ties" also takes the gates away."""
    x = inputs(TOKENS)
    alike = x[:1] + 1e-3 * x  # not one token repeated, whose results nobody could tell apart
    match name:
        case "all to one expert":
            return changed(spec, active=1, active_nodes=1), alike
        case "all to the same experts":
            return spec, alike
        case "k = N":
            experts, null = getattr(spec, "experts", 0), getattr(spec, "null", None) or 0
            if isinstance(spec, tnmoe.PEER):
                return replace(spec, active=4), x
            full = {"expert_choice": 400, "mixture_of_depths": 100}.get(spec.kind, 75)
            every = {"active": getattr(spec, "groups", experts + null), "active_nodes": getattr(spec, "nodes", 1)}
            return changed(spec, **every, **({"capacity": full} if getattr(spec, "capacity", None) else {})), x
        case "N = 1":
            return changed(spec, experts=1, groups=1, nodes=1, active=1, active_nodes=1), x
        case "one token":
            return changed(spec, group=1), x[:1]
    return spec, x


CASES = ("all to one expert", "all to the same experts", "ties", "k = N", "N = 1", "one token")


built_once = functools.cache(built)


def made(spec: tnmoe.Spec, *, gates: bool = True) -> tuple[tnmoe.Plan, nn.Module]:
    """A plan and its module in float64, with random weights; without `gates`, every score is equal."""
    plan, module = built_once(spec, TOKENS)
    module = copy.deepcopy(module)
    if not gates:
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "gate_projection" in name or name == "router_weight" or name.startswith("query_"):
                    p.zero_()
    return plan, module


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_straight_line(name: str) -> None:
    """Values, gradients and NumPy's values in every case; of PEER's ties, which come in any order, see below."""
    for which in CASES:
        if which == "ties" and isinstance(FORMS[name], tnmoe.PEER):
            continue
        spec, x = case(which, FORMS[name])
        plan, module = made(spec, gates=which != "ties")
        x.requires_grad_()
        y, want = module(x), straight_line(spec)(x, canonical(plan, module))
        assert_equal(y, want, f"{which}: output")
        env = {"x": x.detach().numpy()} | {name: p.detach().numpy() for name, p in module.named_parameters()}
        values = execute(plan.bound, env)
        assert_equal(torch.from_numpy(np.asarray(values[plan.bound.output.name])), want, f"{which}: NumPy")
        cotangent = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).reshape(y.shape).cos()
        leaves = {"x": x} | {n: p for n, p in module.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(want, leaves.values(), cotangent)
        y.backward(cotangent)
        for (leaf, p), e in zip(leaves.items(), expected, strict=True):
            got = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            assert_equal(got, e, f"{which}: gradient of {leaf}")


@pytest.mark.parametrize("name", FORMS)
def test_empty_batch(name: str) -> None:
    """No token gives no row, gradients of zeros, and finite losses."""
    plan, module = made(FORMS[name])
    x = inputs(0).requires_grad_()
    y = module(x)
    assert y.shape == (0, int(plan.bound.sizes[plan.bound.output.indices[-1]]))
    y.sum().backward()
    assert x.grad is not None
    grads = [p.grad.to_dense() for p in module.parameters() if p.grad is not None]
    assert all(float(g.abs().sum()) == 0 for g in grads)
    if plan.layer.coefficients:
        assert all(len(a) == 0 for a in module.expert_coefficients(x))
    if hasattr(module, "diagnostics"):
        for scalar, value in module.diagnostics(x).items():
            assert float(value.detach()) == 0, scalar


@pytest.mark.parametrize("whole", [True, False], ids=["token", "entry"])
@pytest.mark.parametrize("name", FORMS)
def test_nan_shows_in_its_token_and_routes_no_other(name: str, whole: bool) -> None:
    """The token's result and gradient are NaN; where tokens are not coupled, those of the others are what they were.

    To the bit, by `tests/layers/test_interference.py`.
    """
    plan, module = made(FORMS[name])
    x = inputs(TOKENS)
    x[4, slice(None) if whole else 2] = torch.nan
    others = [t for t in range(TOKENS) if t != 4]
    found = []
    for batch in (inputs(TOKENS), x):
        batch = batch.clone().requires_grad_()
        y = module(batch)
        y.sum().backward()
        assert batch.grad is not None
        found.append((y.detach(), batch.grad))
    (clean, clean_grad), (y, grad) = found
    assert bool(y[4].isnan().all()) or FORMS[name].kind == "mixture_of_depths"  # which adds its input
    assert bool(y[4].isnan().any())
    assert bool(grad[4].isnan().any())
    if not plan.layer.couples_tokens:
        assert_equal(y[others], clean[others], "output for the others")
        assert_equal(grad[others], clean_grad[others], "gradient of the others")


# ---- no token is lost, and what is dropped is counted ----------------------------------------------------------


def chosen_of(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The positions among the coefficients."""
    return [a for a in module.expert_coefficients(x) if not a.is_floating_point()]


@pytest.mark.parametrize("name", FORMS)
def test_every_token_chooses_as_many_experts_as_declared(name: str) -> None:
    """k different ones of those there are; the same ones for tokens that are alike, the first ones if none leads."""
    for which in CASES:
        spec, x = case(which, FORMS[name])
        plan, module = made(spec, gates=which != "ties")
        for positions in chosen_of(module, x) if plan.layer.coefficients else ():
            experts = math.prod(int(getattr(spec, f, 1)) for f in ("experts", "groups", "nodes"))
            experts += getattr(spec, "null", None) or 0
            k = int(spec.active) * int(getattr(spec, "active_nodes", 1))
            assert positions.shape[-1] == k
            assert positions.shape[0] == len(x)
            assert int(positions.min()) >= 0
            assert int(positions.max()) < experts
            rows = positions.reshape(-1, k).sort(-1).values
            assert bool((rows.diff(dim=-1) > 0).all()), f"{which}: an expert twice"
            if which.startswith("all to"):
                assert bool((positions == positions[:1]).all()), f"{which}: the case is none"
            if which == "k = N" and not isinstance(spec, tnmoe.PEER):
                assert bool((rows == torch.arange(experts)).all())
            if which == "ties" and spec.kind in ("sparse_moe", "multi_head_moe", "moefied", "mixture_of_heads"):
                assert bool((rows == torch.arange(k)).all())


@pytest.mark.parametrize("name", [n for n, s in FORMS.items() if s.kind == "sparse_moe" and not s.factorization])
def test_experts_that_answer_one_give_the_shares(name: str) -> None:
    """A token's result is then the sum of its shares, in every case: one, but for what is dropped and counted."""
    for which in CASES:
        spec, x = case(which, FORMS[name])
        _, module = made(spec, gates=which != "ties")
        with torch.no_grad():
            for parameter, p in module.named_parameters():
                if parameter in ("up_weight", "down_weight", "weight") or parameter.startswith("shared_"):
                    p.zero_()
                elif parameter in ("down_bias", "bias"):
                    p.fill_(1)
        y = module(x)[:, 0].detach()
        scores = x @ module.gate_projection
        wanted = [choices(row, int(spec.active)) for row in scores]
        kept, p = seats(spec, wanted), torch.softmax(scores, -1)
        for t, chosen in enumerate(wanted):
            true = [n for n in chosen if n < int(spec.experts)]
            total = sum(p[t, n] for n in (chosen if spec.shares == "after" else true))
            shares = {n: p[t, n] / (1 if spec.shares == "before" else total) for n in true}
            want = sum(float(share.detach()) for n, share in shares.items() if (t, n) in kept)
            assert abs(float(y[t]) - want) < 1e-12, (which, t)


@pytest.mark.parametrize("capacity", [25, 75, 100, 400])
def test_dropped_choices_are_those_without_a_seat(capacity: int) -> None:
    declared = tnmoe.SparseMoE(WIDTH, 5, 4, 2, hidden=7, capacity=capacity)
    for which in (*CASES, "NaN"):
        spec, x = case(which, declared)
        spec = replace(spec, capacity=capacity)
        if which == "NaN":
            x[3:] = torch.nan
        _, module = made(spec, gates=which != "ties")
        (wanted,) = chosen_of(module, x)
        kept = seats(spec, wanted.tolist())
        assert int(module.diagnostics(x)["dropped"]) == wanted.numel() - len(kept)
        lost = [t for t in range(len(x)) if not any((t, n) in kept for n in range(int(spec.experts)))]
        assert bool((module(x)[lost] == 0).all()), "a token without a seat gets nothing, and no NaN"
        if capacity == 25 and which.startswith("all to"):
            assert len(lost) > 0


def test_tokens_that_no_expert_takes_are_counted() -> None:
    """By the declared number of places, in all cases; their result is zero and so are their coefficients."""
    for which in CASES:
        spec, x = case(which, FORMS["expert choice"])
        _, module = made(spec, gates=which != "ties")
        scores = torch.softmax(x @ module.gate_projection, -1)
        places = math.ceil(spec.capacity * len(x) / (100 * int(spec.experts)))
        taken = [choices(scores[:, n], places) for n in range(int(spec.experts))]
        lost = [t for t in range(len(x)) if not any(t in rows for rows in taken)]
        assert int(module.diagnostics(x)["dropped"]) == len(lost)
        assert bool((module(x)[lost] == 0).all())
        (shares,) = module.expert_coefficients(x)
        for n, rows in enumerate(taken):
            want = torch.zeros(len(x), dtype=x.dtype)
            want[rows] = scores[rows, n].detach()
            assert_equal(shares[:, n], want, f"{which}: coefficients of {n}")
    depths, x = FORMS["Mixture of Depths"], inputs(TOKENS)
    _, module = made(depths)
    assert int(module.diagnostics(x)["skipped"]) == TOKENS - math.ceil(0.4 * TOKENS)


@pytest.mark.parametrize("name", ["PEER", "PEER, sparse gradients"])
def test_ties_of_product_keys(name: str) -> None:
    """Any of equal experts may be taken: what is computed is what the coefficients say, with equal shares."""
    spec = FORMS[name]
    _, module = made(spec, gates=False)
    x = inputs(TOKENS)
    shares, chosen = module.expert_coefficients(x)
    assert bool((shares == 0.5).all())
    want = torch.zeros(TOKENS, 5, dtype=x.dtype)
    for t in range(TOKENS):
        for n in chosen[t].flatten().tolist():
            want[t] += 0.5 * gelu(x[t] @ module.down_vectors[n]) * module.up_vectors[n]
    assert_equal(module(x), want, "output")


# ---- coefficients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMS if name.endswith(", masked")])
def test_lowerings_show_the_same_shares(name: str) -> None:
    """The masked form's coefficients are the gathered form's, at their places, with zeros elsewhere."""
    (masked_plan, masked), (plan, gathered) = (made(FORMS[n]) for n in (name, name.replace("masked", "gathered")))
    weights, x = canonical(plan, gathered), inputs(TOKENS)
    with torch.no_grad():
        for parameter, p in canonical(masked_plan, masked).items():
            p.copy_(weights[parameter])
    assert_equal(masked(x), gathered(x), "output")
    wholes, parts = list(masked.expert_coefficients(x)), list(gathered.expert_coefficients(x))
    while parts:
        first = parts.pop(0)
        shares, chosen = (first, parts.pop(0)) if first.is_floating_point() else (torch.ones(first.shape), first)
        whole = wholes.pop(0)
        assert_equal(whole, torch.zeros_like(whole).scatter(-1, chosen, shares.to(whole.dtype)), "coefficients")
    assert not wholes


def test_coefficients_of_groups_and_heads() -> None:
    """By the gates' definitions, for any leading axes."""
    x = inputs(TOKENS)
    _, mixture = made(FORMS["Mixture of Tokens"])
    (shares,) = mixture.expert_coefficients(x.reshape(3, 4, WIDTH))
    want = torch.softmax((x @ mixture.gate_projection).reshape(4, 3, 4), 1)
    assert_equal(shares.reshape(4, 3, 4), want, "shares of a group")
    _, module = made(FORMS["multi-head, gathered"])
    shares, chosen = module.expert_coefficients(x.reshape(3, 4, WIDTH))
    assert shares.shape == chosen.shape == (3, 4, 2, 2)
    sub = (x @ module.head_weight + module.head_bias).reshape(TOKENS, 2, 3)
    for t in range(TOKENS):
        for h in range(2):
            logits = sub[t, h] @ module.gate_projection
            best = choices(logits, 2)
            assert chosen.reshape(TOKENS, 2, 2)[t, h].tolist() == best
            assert_equal(shares.reshape(TOKENS, 2, 2)[t, h], torch.softmax(logits[best], -1), "shares of a head")
