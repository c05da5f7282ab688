"""Memory of routed layers against torch's MemTracker and saved-tensor hooks on the emitted module."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Collection

import pytest
import torch
from support.cases import case, seeds
from support.families import rows
from support.memory import DTYPES, predicted
from support.tracked import ready, spread_evenly, track, track_sparse
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import tnmoe
from tnmoe.planning.plan import Plan
from tnmoe.presets.moe import EQUAL_PARAMETERS
from tnmoe.reports.memory_report import MemoryReport

CP, RING = tnmoe.CP(3), tnmoe.TensorRing((2, 2, 3))
FAMILIES: dict[str, tnmoe.Spec] = {
    "top-2": tnmoe.SparseMoE(6, 5, 4, 2, 7),
    "one linear map": tnmoe.SparseMoE(6, 5, 4, 2, bias=False, input_norm=True),
    "all experts": tnmoe.SparseMoE(6, 5, 4, 4, 7, shares="before"),
    "normalised shares": tnmoe.SparseMoE(6, 5, 4, 2, 7, shares="normalised"),
    "capacity": tnmoe.SparseMoE(6, 5, 4, 2, 7, capacity=125),
    "capacity, CP": tnmoe.SparseMoE(6, 5, 4, 1, 7, capacity=125, factorization=CP),
    "masked": tnmoe.SparseMoE(6, 5, 4, 2, 7, lowering="masked"),
    "gathered CP": tnmoe.SparseMoE(6, 5, 4, 2, 7, factorization=CP),
    "gathered ring": tnmoe.SparseMoE(6, 5, 4, 2, 7, factorization=RING),
    "noise": tnmoe.SparseMoE(6, 5, 4, 2, 7, noise=True),
    "shared": tnmoe.SparseMoE(6, 5, 4, 2, 7, shared=3),
    "null experts": tnmoe.SparseMoE(6, 5, 4, 2, 7, null=3, shares="normalised"),
    "SMILE": tnmoe.SMILE(6, 7, 5, 3, 4, 1, 2),
    "expert choice": tnmoe.ExpertChoice(6, 5, 4, 150, 7),
    "Soft MoE": tnmoe.SoftMoE(6, 5, 4, 3, hidden=7),
    "Mixture of Tokens": tnmoe.MixtureOfTokens(6, 7, 5, 4, 3),
    "Mixture of Depths": tnmoe.MixtureOfDepths(6, 7, 30),
    "multi-head": tnmoe.MultiHeadMoE(6, 7, 5, 2, 2),
    "PEER": tnmoe.PEER(6, 5, 36, 2, 3, 4),
    "CartesianMoE": tnmoe.CartesianMoE(6, 7, 4, 2),
    "Deep MoE": tnmoe.DeepMoE(6, 7, 5, 4),
    "Residual MoE": tnmoe.ResidualMoE(6, 5, 4),
    "MoEfied": tnmoe.MoEfied(6, 8, 5, 4, 2),
    "MoA": tnmoe.MixtureOfHeads(6, 4, 2, 3),
    "MoLORA": tnmoe.MoLoRA(6, 5, 4, 3, True),
    "MoV": tnmoe.MoV(6, 4),
    "MoSLoRA": tnmoe.MoSLoRA(6, 5, 3),
    "TensorPoly-I": tnmoe.TensorPoly(6, 5, 3, 2),
    "TensorPoly-II": tnmoe.TensorPoly(9, 4, 3, 2, 2, "II"),
}


def surviving_bytes(run: Callable[[], Tensor], exclude: Collection[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps until the forward pass is done, those of `exclude` aside."""

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    boxes: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(t: Tensor) -> Kept:
        box = Kept(t)
        boxes.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        out = run()
    skip = {t.untyped_storage().data_ptr() for t in exclude}
    found = {box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes() for box in boxes}
    del out
    return sum(count for pointer, count in found.items() if pointer not in skip)


def built(plan: Plan, dtype: torch.dtype, *, grad: bool, frozen: Collection[str]) -> tuple[nn.Module, Tensor]:
    """The module with a known load, and its input."""
    module = ready(tnmoe.build(plan, dtype=dtype), grad=grad, frozen=frozen)
    spread_evenly(module, plan)
    x = rows(plan, plan.values["T"]).to(dtype)
    return module, x.requires_grad_(grad and bool(plan.input_gradients))


def check(plan: Plan, dtype: torch.dtype = torch.float32, frozen: Collection[str] = ()) -> MemoryReport:
    """Equality of the peaks and of what is saved; returns the report."""
    name = str(dtype).removeprefix("torch.")
    report, told = tnmoe.memory(plan, dtype=name, frozen=sorted(frozen)), (plan.layer.summary, plan.values, frozen)
    module, x = built(plan, dtype, grad=False, frozen=frozen)
    assert predicted(list(report.inference)) == track(module, [x], grad=False), told
    module, x = built(plan, dtype, grad=True, frozen=frozen)
    assert predicted(list(report.training)) == track(module, [x], grad=True), told
    found = surviving_bytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])
    assert found == report.saved_bytes == tnmoe.cost(plan, dtype=name, frozen=frozen).saved_bytes, told
    assert all(s.reasons for s in report.saved)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_take_the_memory_predicted(name: str) -> None:
    """One row; few rows, of which an expert may have one; and many, in blocks."""
    for k, tokens in enumerate((1, 2, 6, 30)):
        tokens = 3 * tokens if name == "Mixture of Tokens" else tokens
        plan = tnmoe.plan(FAMILIES[name], tokens=tokens, input_gradients=k % 2 == 0)
        check(plan, DTYPES[k % 3])


@pytest.mark.parametrize("seed", seeds(25, 4))
def test_random_weights_are_frozen(seed: int) -> None:
    rng = random.Random(seed)
    spec = rng.choice(list(FAMILIES.values()))
    plan = tnmoe.plan(spec, tokens=rng.choice([3, 6, 24]), planner="greedy", input_gradients=rng.random() < 0.5)
    names = [p.name for p in plan.bound.parameters]
    check(plan, rng.choice(DTYPES), set(rng.sample(names, rng.randint(0, len(names)))))


def sparse_moe(rng: random.Random) -> tnmoe.SparseMoE:
    """Any of its forms and options, of any small size."""
    experts = rng.randint(1, 6)
    form = rng.choice(
        [
            {},
            {"block": rng.choice([1, 2, 8])},
            {"capacity": rng.choice([50, 100, 300]), "factorization": rng.choice([None, CP])},
            {"lowering": "masked"},
            {"null": rng.randint(1, 4), "shares": "normalised"},
            {"factorization": rng.choice([CP, RING])},
        ]
    )
    options = {
        "shares": rng.choice(["after", "before", "normalised"]),
        "noise": rng.random() < 0.3,
        "bias": rng.random() < 0.6,
        "input_norm": rng.random() < 0.4,
        "shared": rng.choice([None, 3]),
        "hidden": rng.choice([None, rng.randint(1, 8)]),
    }
    widths = rng.randint(1, 8), rng.randint(1, 8)
    return tnmoe.SparseMoE(*widths, experts, rng.randint(1, experts), **(options | form))


@pytest.mark.parametrize("seed", seeds(30, 4))
def test_random_sparse_mixtures_take_the_memory_predicted(seed: int) -> None:
    rng = random.Random(seed)
    check(tnmoe.plan(sparse_moe(rng), tokens=rng.choice([1, 2, 6, 24]), planner="greedy"), rng.choice(DTYPES))


def test_any_load_takes_no_more() -> None:
    """The forward pass takes as much whatever is chosen, the backward pass at most as much: the report says so."""
    less = 0
    for seed in range(15):
        with case(seed) as rng:
            spec = tnmoe.SparseMoE(6, 5, rng.randint(4, 9), rng.randint(1, 3), 7)
            plan = tnmoe.plan(spec, tokens=rng.choice([3, 9, 20]))
            report = tnmoe.memory(plan)
            assert "chosen alike" in str(report.summary())
            x = rows(plan, plan.values["T"]).float()
            module = ready(tnmoe.build(plan), grad=False)
            assert predicted(list(report.inference)) == track(module, [x], grad=False)
            (forward, both), found = (
                predicted(list(report.training)),
                track(ready(tnmoe.build(plan), grad=True), [x.requires_grad_()], grad=True),
            )
            assert found[0] == forward
            assert found[1].peak <= both.peak
            assert found[1].after == both.after
            less += found[1].peak < both.peak
    assert 0 < less < 15


SIZED = (
    "sparse MoE, capacity 125 %",
    "sparse MoE, all experts run",
    "sparse MoE of CP experts (N = 256, R = 556)",
    "expert choice (200 %)",
    "Soft MoE (16 experts, 8 slots)",
    "Mixture of Depths (12.5 %)",
    "PEER (2,809 experts, 4 heads of 16)",
)
"""Those that fake tensors can follow: no size depends on what is chosen."""


@pytest.mark.parametrize("name", SIZED)
def test_presets_take_the_memory_predicted(name: str) -> None:
    """At full size, without allocating any of it."""
    plan = tnmoe.plan(EQUAL_PARAMETERS[name], tokens=1024)
    report = tnmoe.memory(plan)
    with FakeTensorMode():
        x = torch.empty(1024, 768)
        assert predicted(list(report.inference)) == track(ready(tnmoe.build(plan), grad=False), [x], grad=False)
        x.requires_grad_()
        assert predicted(list(report.training)) == track(ready(tnmoe.build(plan), grad=True), [x], grad=True)


def test_sparse_gradients_hold_rows_and_positions() -> None:
    """Forward by a tracker of storages. Backward under no tracker, which would make torch copy: what is left."""
    plan = tnmoe.plan(tnmoe.PEER(6, 5, 36, 2, 3, 4, sparse_gradients=True), tokens=12)
    report = tnmoe.memory(plan)
    module, x = built(plan, torch.float32, grad=True, frozen=())
    assert track_sparse(module, [x])[0] == predicted(list(report.training))[0]
    module, x = built(plan, torch.float32, grad=True, frozen=())
    module(x).backward(torch.ones(12, 5))
    held: dict[int, int] = {}
    for leaf in (x, *module.parameters()):
        grad = leaf.grad
        assert grad is not None
        for part in (grad._indices(), grad._values()) if grad.is_sparse else (grad,):
            held[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    gradients = report.gradient_bytes + report.input_gradient_bytes
    assert gradients == sum(held.values())
    result = 2 * 12 * 5 * 4  # with its gradient
    weights = report.weight_bytes + report.input_bytes
    assert report.training[-1].after == weights + result + gradients
    dense = tnmoe.memory(tnmoe.plan(tnmoe.PEER(6, 5, 36, 2, 3, 4), tokens=12))
    assert (dense.inference_peak, dense.saved_bytes) == (report.inference_peak, report.saved_bytes)


def test_both_trackers_agree() -> None:
    for name in ("top-2", "PEER", "capacity"):
        plan = tnmoe.plan(FAMILIES[name], tokens=6)
        found = [
            f(*built(plan, torch.float32, grad=True, frozen=()))
            for f in (lambda m, x: track(m, [x], grad=True), lambda m, x: track_sparse(m, [x]))
        ]
        assert found[0] == found[1]


def test_a_mixture_by_hand() -> None:
    """4→3, top-1 of 2 experts, 6 tokens, float32; as the default says, blocks of 4 rows: 4·(2 + ⌊(6-2)/4⌋) = 12 rows.

    Weights 4·(4·2 + 2·4·3 + 2·3) = 152, x 96. Kept: shares t·k 24, the result of its softmax; the order of the sort
    8·6·2 = 96; slots 8·6 = 48; rows 8·12 = 96; dispatched 4·12·4 = 192; outputs 4·6·3 = 72, a factor.
    """
    plan = tnmoe.plan(tnmoe.SparseMoE(4, 3, 2, 1), tokens=6)
    report = check(plan)
    assert (report.weight_bytes, report.input_bytes) == (152, 96)
    assert {s.name: s.bytes for s in report.saved} == {
        "shares": 24, "slots": 48, "rows": 96, "dispatched": 192, "expert_outputs": 72, "of top_logits": 96
    }  # fmt: skip
    reasons = {s.name: s.reasons for s in report.saved}
    assert reasons["dispatched"] == ("factor of sorted_outputs, for ∂weight",)
    assert reasons["rows"] == ("positions of dispatched, for ∂x",)
    assert reasons["of top_logits"] == ("order of the sort, for ∂logits",)


def test_what_only_chooses_keeps_nothing() -> None:
    """No gradient reaches a predictor of positions: the order that it sorts is gone with its function."""
    plan = tnmoe.plan(FAMILIES["MoEfied"], tokens=6)
    assert not any("order of the sort" in reason for s in check(plan).saved for reason in s.reasons)


def test_least_peaks() -> None:
    """The objective "peak" plans routed layers too, equal to the tracker."""
    plan = tnmoe.plan(tnmoe.SparseMoE(6, 5, 4, 2, 7, factorization=RING), tokens=24, objective="peak")
    fastest = tnmoe.plan(tnmoe.SparseMoE(6, 5, 4, 2, 7, factorization=RING), tokens=24)
    assert check(plan).inference_peak <= check(fastest).inference_peak


REPORTED = {**FAMILIES, "sparse gradients": tnmoe.PEER(6, 5, 36, 2, 3, 4, sparse_gradients=True)}


@pytest.mark.parametrize("spec", REPORTED.values(), ids=list(REPORTED))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_name_one_figure(spec: tnmoe.Spec, dtype: str) -> None:
    """What the cost report and the memory report call alike is the same number, however either came by it."""
    plan = tnmoe.plan(spec, tokens=12)
    cost, memory = tnmoe.cost(plan, dtype=dtype), tnmoe.memory(plan, dtype=dtype)
    for name in ("weight_bytes", "gradient_bytes", "saved_bytes"):
        assert getattr(cost, name) == getattr(memory, name), name
