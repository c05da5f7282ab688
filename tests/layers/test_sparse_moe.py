"""Token choice against a loop over tokens: values, gradients, cost, stress and interference."""

from __future__ import annotations

import copy

import pytest
import torch
from support.families import built, check_family, mlp, rows, saved_bytes, softmax
from support.straight_line import choices, straight_line

import tnmoe
from tnmoe import SparseMoE
from tnmoe.backends.runtime.routing_functions import sort_slots_in_blocks

SPECS = {
    "linear": SparseMoE(6, 5, 8, 2),
    "mlp": SparseMoE(6, 5, 8, 2, hidden=7),
    "one": SparseMoE(6, 5, 8, 1, hidden=7, bias=False),
    "before": SparseMoE(6, 5, 8, 3, hidden=7, shares="before", input_norm=True),
    "normalised": SparseMoE(6, 5, 8, 2, hidden=7, shares="normalised"),
    "all": SparseMoE(6, 5, 4, 4, hidden=7),
    "single": SparseMoE(6, 5, 1, 1, hidden=7),
    "shared": SparseMoE(6, 5, 8, 2, hidden=7, shared=9, input_norm=True),
    "capacity": SparseMoE(6, 5, 4, 2, hidden=7, capacity=75),
    "capacity, linear": SparseMoE(6, 5, 4, 1, capacity=125, bias=False),
    "masked": SparseMoE(6, 5, 8, 2, hidden=7, lowering="masked"),
    "masked, linear, before": SparseMoE(6, 5, 8, 2, lowering="masked", shares="before"),
    "block": SparseMoE(6, 5, 8, 2, hidden=7, block=4),
    "fine-grained": SparseMoE.fine_grained(6, 8, 5, 4, 1, 4, shared=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_straight_line(name: str) -> None:
    spec = SPECS[name]
    report = check_family(spec, straight_line(spec))
    assert report.layer.couples_tokens == (spec.capacity is not None)


@pytest.mark.parametrize("options", [{}, {"lowering": "masked"}, {"capacity": 100}], ids=str)
def test_factorized_experts(options) -> None:
    spec = SparseMoE(6, 5, 8, 2, hidden=7, factorization=tnmoe.CP(4), **options)
    check_family(spec, straight_line(spec))


def padded(counts: list[int], block: int = 4) -> list[int]:
    """Rows of each expert: a multiple of `block` each, and what is left of block · (N + ⌊(kT − N) / block⌋) rows."""
    if sum(counts) <= 2 * len(counts):
        return counts
    rows_of = [-(-c // block) * block for c in counts]
    last = max(n for n, c in enumerate(counts) if c)
    rows_of[last] += block * (len(counts) + (sum(counts) - len(counts)) // block) - sum(rows_of)
    return rows_of


def test_null_experts() -> None:
    """Values against the straight line; executed FLOPs are those of the true choices, the report's the expected."""
    spec = SparseMoE(6, 5, 6, 2, hidden=7, null=3, shares="normalised", bias=False)
    plan, module = built(spec, 90)
    x = rows(plan, 90)
    weights = dict(module.named_parameters())
    assert torch.allclose(module(x), straight_line(spec)(x, weights), rtol=0, atol=1e-12)
    shares, chosen = module.expert_coefficients(x)
    assert int((chosen >= 6).sum()) > 0
    assert bool(((shares.sum(1) - 1).abs() < 1e-12)[(chosen < 6).any(1)].all())
    true = sum(padded(torch.bincount(chosen.flatten(), minlength=9).tolist())[:6])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        module(x)
    combine = 2 * 90 * 2 * 5
    assert counter.get_total_flops() == 2 * 90 * 6 * 9 + 2 * true * 7 * 11 + combine
    # 4 · (9 + ⌊171 / 4⌋) = 204 rows, of which N / (N + M) = 2/3 are expected to be true; without padding, of 180
    report = tnmoe.cost(plan)
    assert report.matmul_flops == 2 * 90 * 6 * 9 + 2 * 136 * 7 * 11 + combine
    assert report.ideal.matmul_flops == 2 * 90 * 6 * 9 + 2 * 120 * 7 * 11 + combine


@pytest.mark.parametrize("seed", range(4))
def test_rows_in_blocks_are_as_declared(seed: int) -> None:
    """Counts, rows and places of skewed choices, in torch and in NumPy's executor, against a loop."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.tensor([0.0, 9.0, 0.2, 3.0, 1.0, 0.1, 0.0])
    chosen = torch.multinomial(skew.expand(40, 7), 2, generator=generator)
    slots, row, counts = sort_slots_in_blocks(chosen, 7, 4)
    own = torch.bincount(chosen.flatten(), minlength=7).tolist()
    assert counts.tolist() == padded(own)
    assert len(row) == sum(padded(own)) == 4 * (7 + (80 - 7) // 4)
    ends = counts.cumsum(0)
    for t in range(40):
        for c in range(2):
            place, n = int(slots[2 * t + c]), int(chosen[t, c])
            assert int(row[place]) == t
            assert int(ends[n] - counts[n]) <= place < int(ends[n])
    assert len(set(slots.tolist())) == 80


def test_figures_of_the_table() -> None:
    """Parameters I N + N φ and MACs a token I N + k φ (mathematics of the field), φ = H (I + O), without biases."""
    inputs, hidden, outputs, experts, active, tokens = 16, 24, 12, 8, 2, 40
    phi = hidden * (inputs + outputs)
    for options, executed in (
        ({"block": 1}, active * phi),
        ({}, 104 / tokens * phi),  # 4 · (8 + ⌊(80 − 8) / 4⌋) = 104 rows
        ({"lowering": "masked"}, experts * phi),
        ({"capacity": 120}, None),
    ):
        spec = SparseMoE(inputs, outputs, experts, active, hidden, bias=False, **options)
        report = tnmoe.cost(spec, tokens=tokens)
        assert report.parameters == inputs * experts + experts * phi
        macs = {row[0]: row[2] for row in report.parts().rows}
        assert macs["gate"] == tokens * inputs * experts
        if executed is None:  # c = ⌈1.2 · 2 · 40 / 8⌉ = 12 slots an expert
            assert macs["up"] + macs["down"] == experts * 12 * phi
        else:
            mixing = tokens * experts * hidden if "lowering" in options else 0
            assert macs["up"] + macs["down"] == tokens * executed + mixing


@pytest.mark.parametrize("name", ["mlp", "before", "masked", "shared", "linear", "block"])
def test_saved_for_backward(name: str) -> None:
    plan, module = built(SPECS[name], 12)
    x = rows(plan, 12).requires_grad_()
    assert saved_bytes(module, x) == tnmoe.cost(plan, dtype="float64").saved_bytes


# ---- losses, noise ---------------------------------------------------------------------------------------------


def test_diagnostics() -> None:
    plan, module = built(SparseMoE(6, 5, 4, 2, hidden=3, capacity=50), 20)
    x = rows(plan, 20)
    found = module.diagnostics(x)
    logits = x @ module.gate_projection
    chosen = [choices(row, 2) for row in logits]
    counts = torch.tensor([sum(n in c for c in chosen) for n in range(4)], dtype=torch.float64)
    balance = 4 * sum(counts[n] / 40 * softmax(logits)[:, n].mean() for n in range(4))
    assert abs(float(found["load_balance_loss"] - balance)) < 1e-12
    assert abs(float(found["z_loss"] - (torch.log(torch.exp(logits).sum(1)) ** 2).mean())) < 1e-12
    assert int(found["dropped"]) == sum(max(0, int(c) - 5) for c in counts) > 0
    found["load_balance_loss"].backward()
    assert module.gate_projection.grad is not None


def test_noise_only_in_training() -> None:
    plan, module = built(SparseMoE(6, 5, 8, 2, hidden=7, noise=True), 12)
    x, w = rows(plan, 12), dict(module.named_parameters())
    quiet = straight_line(SparseMoE(6, 5, 8, 2, hidden=7))
    assert torch.allclose(module.eval()(x), quiet(x, w), rtol=0, atol=1e-12)
    module.train()
    torch.manual_seed(3)
    noisy = module(x)
    torch.manual_seed(3)
    logits = x @ w["gate_projection"]
    logits = logits + torch.log1p(torch.exp(x @ w["noise_projection"])) * torch.randn_like(logits)
    want = []
    for row, z in zip(x, logits, strict=True):
        chosen = choices(z, 2)
        want.append(sum(s * mlp(row, w, n) for s, n in zip(softmax(z[chosen]), chosen, strict=True)))
    assert torch.allclose(noisy, torch.stack(want), rtol=0, atol=1e-12)
    noisy.sum().backward()
    assert float(w["noise_projection"].grad.abs().sum()) > 0


# ---- stress ----------------------------------------------------------------------------------------------------

FORMS = {
    "gathered": SparseMoE(6, 5, 8, 2, hidden=7),
    "masked": SparseMoE(6, 5, 8, 2, hidden=7, lowering="masked"),
    "block": SparseMoE(6, 5, 8, 2, hidden=7, block=8),
    "no block": SparseMoE(6, 5, 8, 2, hidden=7, block=1),
    "null": SparseMoE(6, 5, 8, 2, hidden=7, null=3, shares="normalised"),
    "capacity": SparseMoE(6, 5, 8, 2, hidden=7, capacity=400),
    "factorized": SparseMoE(6, 5, 8, 2, hidden=7, factorization=tnmoe.CP(3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_tokens_to_one_expert_and_ties(form: str) -> None:
    """All logits equal: the first experts are taken, by every token, and none is lost (400 % of an even share)."""
    plan, module = built(FORMS[form], 10)
    with torch.no_grad():
        module.gate_projection.zero_()
    x = rows(plan, 10)
    y = module(x)
    alone = torch.cat([module(row.unsqueeze(0)) for row in x])
    assert torch.allclose(y, alone, rtol=0, atol=1e-12)
    if form != "masked":
        return
    assert bool((module.expert_coefficients(x)[0][:, :2] == 0.5).all())


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form: str) -> None:
    plan, module = built(FORMS[form], 10)
    x = rows(plan, 10)[:0].requires_grad_()
    y = module(x)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in module.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_with_its_token(form: str) -> None:
    plan, module = built(FORMS[form], 10)
    x = rows(plan, 10)
    clean = module(x)
    x[4] = float("nan")
    y = module(x)
    assert bool(y[4].isnan().all())
    others = [t for t in range(10) if t != 4]
    assert torch.allclose(y[others], clean[others], rtol=0, atol=1e-12)


# ---- torch's features ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_and_exports_with_a_dynamic_batch(form: str) -> None:
    plan, module = built(FORMS[form], 16)
    x = rows(plan, 16)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},), strict=False).module()
    for count in (16, 9):
        assert torch.allclose(compiled(x[:count]), module(x[:count]), rtol=0, atol=1e-12)
        assert torch.allclose(exported(x[:count]), module(x[:count]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_deepcopy_and_functional_call(form: str) -> None:
    plan, module = built(FORMS[form], 16)
    module = module.float()
    x = rows(plan, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert torch.allclose(y.float(), module(x), rtol=0.1, atol=0.1)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    halved = {name: p * 0.5 for name, p in module.named_parameters()}
    assert not torch.equal(torch.func.functional_call(module, halved, (x,)), module(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda: SparseMoE(6, 5, 4, 5),
        lambda: SparseMoE(6, 5, 4, 2, shares="softmax"),
        lambda: SparseMoE(6, 5, 4, 2, lowering="dense"),
        lambda: SparseMoE(6, 5, 4, 2, capacity=1.25),
        lambda: SparseMoE(6, 5, 4, 2, capacity=100, lowering="masked"),
        lambda: SparseMoE(6, 5, 4, 2, null=2),
        lambda: SparseMoE(6, 5, 4, 2, block=0),
        lambda: SparseMoE(6, 5, 4, 2, block=8, lowering="masked"),
        lambda: SparseMoE(6, 5, 4, 2, factorization="cp"),
        lambda: SparseMoE.fine_grained(6, 7, 5, 4, 1, 2),
    ],
)
def test_bad_declarations(call) -> None:
    with pytest.raises(tnmoe.DeclarationError):
        call()


def test_check_passes_where_rows_are_data() -> None:
    assert tnmoe.check(tnmoe.plan(SparseMoE(6, 5, 8, 2, hidden=7), tokens=50)).passed


def test_blocks_run_as_many_rows_as_are_always_enough() -> None:
    """2 of 8 experts, blocks of 4: 24 choices take 4 · (8 + ⌊16 / 4⌋) = 48 rows; 16 choices, two an expert, as many."""
    spec = SparseMoE(6, 5, 8, 2, hidden=7, bias=False, block=4)
    report = tnmoe.cost(spec, tokens=12)
    assert {row[0]: row[2] for row in report.parts().rows}["up"] == 48 * 6 * 7
    assert report.ideal is not None
    assert {row[0]: row[2] for row in report.ideal.parts().rows}["up"] == 24 * 6 * 7
    few = tnmoe.cost(spec, tokens=8)
    assert {row[0]: row[2] for row in few.parts().rows}["up"] == 16 * 6 * 7
    assert few.ideal is None
