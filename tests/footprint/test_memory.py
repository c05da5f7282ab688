"""Bytes alive in the emitted module, step by step, against torch's MemTracker on that very module."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from support.cases import blocks, case, seeds
from support.factorized_layers import EMITTED as EMITTED_FACTORIZATIONS
from support.factorized_layers import LINEAR
from support.layers_strategy import any_order
from support.memory import DTYPES, predicted, tracker
from support.networks import random_folded_network, random_network
from support.training import random_spec, saved_bytes
from torch._subclasses import FakeTensorMode

import tnmoe
from tnmoe.cli.main import main
from tnmoe.footprint.allocations import forward_trace
from tnmoe.footprint.forward import inference, training
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import most_at_once
from tnmoe.ir.ops import operands
from tnmoe.ir.value import Role
from tnmoe.planning.plan import Plan
from tnmoe.presets.registry import PRESETS

EMITTED = [name for name, preset in PRESETS.items() if preset.emitted]


def requires_grad(plan: Plan, frozen: Collection[str] = ()) -> set[str]:
    weights = {p.name for p in plan.bound.parameters if p.role is Role.WEIGHT}
    return set(plan.input_gradients) | weights - set(frozen)


def random_layer(rng: random.Random) -> tuple[Plan, torch.dtype, set[str]]:
    """A plan, a dtype, and the names of frozen parameters."""
    plan = tnmoe.plan(
        random_spec(rng),
        tokens=rng.choice([1, 2, 5, 16]),
        planner=rng.choice(["auto", "greedy", "greedy", "greedy"]),  # which is a matter of time here, not of memory
        input_gradients=rng.random() < 0.5,
    )
    names = [p.name for p in plan.bound.parameters]
    frozen = set(rng.sample(names, rng.randint(0, len(names)))) if rng.random() < 0.6 else set()
    return plan, rng.choice(DTYPES), frozen


@pytest.mark.parametrize("block", blocks(60, of=15))
def test_random_layers_take_the_memory_predicted(block: range) -> None:
    """CP and TR, 1 to 3 levels, one and two layers, three dtypes, in orders that no planner would choose: equality.

    `test_exactness.py` has 300 layers in planned orders, with any weights frozen.
    """
    frozen_layers = dropped = 0
    for seed in block:
        with case(seed) as rng:
            plan, dtype, frozen = random_layer(rng)
            item, told = dtype.itemsize, (plan.layer.summary, plan.values, dtype, frozen)
            assert predicted(inference(plan.bound, item)) == tracker(plan, dtype, grad=False), told
            other = any_order(plan, seed)  # copies, sums and bias slices
            assert predicted(inference(other.bound, item)) == tracker(other, dtype, grad=False), told
            found = predicted(training(plan.bound, item, requires_grad(plan, frozen)))
            assert found == tracker(plan, dtype, grad=True, frozen=frozen), told
            frozen_layers += bool(frozen)
            dropped += bool(plan.bound.released)
    assert frozen_layers > 3
    assert dropped > 7


@pytest.mark.parametrize("seed", seeds(6, 1))
def test_fake_tensors_take_the_same(seed: int) -> None:
    """Tensors without data, as the tracker is meant to be used, and real ones agree."""
    plan, dtype, frozen = random_layer(random.Random(seed))
    with FakeTensorMode():
        fake = [tracker(plan, dtype, grad=grad, frozen=frozen) for grad in (False, True)]
    assert fake == [tracker(plan, dtype, grad=grad, frozen=frozen) for grad in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMITTED)
def test_presets_take_the_memory_predicted(name: str) -> None:
    """At full size, without allocating any of it."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=4096)
    with FakeTensorMode():
        assert predicted(inference(plan.bound, 4)) == tracker(plan, torch.float32, grad=False)
        assert predicted(training(plan.bound, 4, requires_grad(plan))) == tracker(plan, torch.float32, grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["entmax15", "sparsemax"])
def test_gates_of_many_logits_take_the_memory_predicted(activation: str, dtype: torch.dtype) -> None:
    """Sparse gates sort few logits, and find the threshold of many by Newton's method."""
    for experts in (1, 2, 5, 32):
        for tokens in (4096 // experts, 4096 // experts - 1, 1):
            plan = tnmoe.plan(
                tnmoe.MuMoE(3, 2, experts, tnmoe.CP(2), gate=tnmoe.Gate(activation, "layer")), tokens=tokens
            )
            assert predicted(inference(plan.bound, dtype.itemsize)) == tracker(plan, dtype, grad=False)
            found = predicted(training(plan.bound, dtype.itemsize, requires_grad(plan)))
            assert found == tracker(plan, dtype, grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", {**LINEAR, **EMITTED_FACTORIZATIONS})
def test_factorizations_take_the_memory_predicted(name: str, frozen: bool) -> None:
    """Views of split axes share memory; padded ones are copies."""
    for spec in (
        *([tnmoe.FactorizedLinear(12, 14, LINEAR[name])] if name in LINEAR else []),
        *([tnmoe.MuMoEBlock(12, 12, 12, 4, EMITTED_FACTORIZATIONS[name])] if name in EMITTED_FACTORIZATIONS else []),
    ):
        plan = tnmoe.plan(spec, tokens=9)
        names = {p.name for p in plan.bound.parameters[1:]} if frozen else set()
        assert predicted(inference(plan.bound, 4)) == tracker(plan, torch.float32, grad=False)
        found = predicted(training(plan.bound, 4, requires_grad(plan, names)))
        assert found == tracker(plan, torch.float32, grad=True, frozen=names)


def test_a_layer_by_hand() -> None:
    """16→24, 8 experts, CP of rank 12, softmax, 10 tokens, float32.

    Weights 4·(16·8 + 8·12 + 16·12 + 12·24 + 12) = 2864, x 640. Of a value t·n 320, t·r 480, t·o 960. The gated step
    has given the coefficients up, holds experts and projected, and writes gated: 3·480; the next one has given these
    up, and writes y: 480 + 960, as much. Backward, besides weights, x, y and its gradient (960 each): the first
    product makes 1152 (output_factor) and 480; the second has given gated up and makes 2·480; the third takes one 480
    and makes 192·4 = 768, 640 and 48.
    """
    spec = tnmoe.MuMoE(16, 24, 8, tnmoe.CP(12), gate=tnmoe.Gate("softmax", "none"))
    report = tnmoe.memory(tnmoe.plan(spec, tokens=10))
    assert (report.weight_bytes, report.input_bytes) == (2864, 640)
    assert (report.gradient_bytes, report.input_gradient_bytes) == (2864, 640)
    assert report.inference_peak == 2864 + 640 + 3 * 480
    assert report.largest == ("y", 960)
    # coefficients, experts, projected, gated; logits are not: softmax reads its result
    assert report.saved_bytes == 320 + 3 * 480
    assert {s.name: s.reasons for s in report.saved} == {
        "coefficients": ("result of softmax, for ∂logits", "factor of experts, for ∂expert_factor"),
        "experts": ("factor of gated, for ∂projected",),
        "projected": ("factor of gated, for ∂experts",),
        "gated": ("factor of y, for ∂output_factor",),
    }
    held = 2864 + 640 + 2 * 960
    assert [m.peak for m in report.training if m.phase == "backward"][:3] == [
        held + (320 + 3 * 480) + 1152 + 480,
        held + (320 + 2 * 480) + 1152 + 480 + 2 * 480,
        held + 320 + 1152 + 2 * 480 + 768 + 640 + 48,
    ]


@pytest.mark.parametrize("seed", seeds(30, 4))
def test_reports_agree_with_hooks_and_with_themselves(seed: int) -> None:
    """What is saved, with its reasons, sums to what autograd's hooks see; classes sum to the peaks."""
    plan, dtype, frozen = random_layer(random.Random(seed))
    name = str(dtype).removeprefix("torch.")
    report = tnmoe.memory(plan, dtype=name, frozen=sorted(frozen))
    module = tnmoe.build(plan, dtype=dtype)
    for p_name, p in module.named_parameters():
        p.requires_grad_(p_name not in frozen)
    x = torch.randn(plan.values["T"], module_width(plan), dtype=dtype, requires_grad="x" in plan.input_gradients)
    found, _ = saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])
    assert report.saved_bytes == found, plan.layer.summary
    assert all(s.reasons for s in report.saved)
    for m in (*report.inference, *report.training):
        assert sum(m.live.values()) == m.peak >= m.after


def module_width(plan: Plan) -> int:
    return int(plan.bound.sizes["i"])


def test_faults() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(4, 5, 3, tnmoe.CP(2)), tokens=6)
    with pytest.raises(tnmoe.CostError, match="unknown dtype 'float31'"):
        tnmoe.memory(plan, dtype="float31")
    with pytest.raises(tnmoe.CostError, match="did you mean 'input_factor'"):
        tnmoe.memory(plan, frozen=["input_facto"])


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cost", "gpt2-cp", "--memory", "--tokens", "64"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "peak of inference" in text
    assert "factor of hidden, for ∂up_output_factor" in text
    with pytest.raises(SystemExit) as stop:
        main(["cost", "gpt2-cp", "--memory", "--tokens", "64", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    report = tnmoe.memory(PRESETS["gpt2-cp"].spec, tokens=64)
    assert [r["peak"] for r in rows] == [m.peak for m in (*report.inference, *report.training)]
    with pytest.raises(SystemExit) as stop:
        main(["cost", "gpt2-sparse", "--memory", "--tokens", "64"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "all experts chosen alike" in text
    assert "order of the sort, for ∂" in text


@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr"])
def test_a_backward_pass_of_its_own_gives_dead_values_up(name: str) -> None:
    """At 4096 tokens, by the tracker: less is kept, and one function needs hardly more at once than autograd does.

    What it has kept it holds until it returns. Without `del` it held every result until then: 1.5 times as much.
    """
    forward, peaks = {}, {}
    for memory in (None, "save", "recompute"):
        plan = tnmoe.plan(PRESETS[name].spec, tokens=4096, memory=memory)
        with FakeTensorMode():
            forward[memory], (peaks[memory], _) = tracker(plan, torch.float32, grad=True)
    assert forward["recompute"].after < forward["save"].after < forward[None].after
    assert max(peaks["recompute"], peaks["save"]) < 1.05 * peaks[None]


@pytest.mark.parametrize("block", blocks(200, of=50))
def test_random_networks_take_the_memory_predicted(block: range) -> None:
    """Any einsum, with and without a folded bias, in a forward pass without grad."""
    for seed in block:
        with case(seed) as rng:
            network, sizes = (
                random_network(rng, rng.randint(1, 5), max_size=4)
                if rng.random() < 0.7
                else random_folded_network(rng, rng.randint(2, 5))
            )
            plan = tnmoe.plan(network, sizes=sizes)
            assert predicted(inference(plan.bound, 4)) == tracker(plan, torch.float32, grad=False), str(network)


@pytest.mark.parametrize("block", blocks(80, of=20))
def test_releases_reach_the_least_peak_there_is(block: range) -> None:
    """No further `del` would lower the peak: dropping every value right after its last use gives the same."""
    saved = 0
    for seed in block:
        with case(seed) as rng:
            plan, *_ = random_layer(rng)
            program = plan.bound
            order = [op.out.name for op in program.ops]
            kept = replace(program, released={})
            peak = max(m.peak for m in inference(program, 4))
            assert peak <= max(m.peak for m in inference(kept, 4))
            saved += peak < max(m.peak for m in inference(kept, 4))
            module_values = {name for names in program.released.values() for name in names}
            assert module_values <= set(order)
            # By hand: at each step, what is read now or later, and what is written.
            least = least_peak(plan)
            assert peak == least, plan.layer.summary
    assert saved > 7


def least_peak(plan: Plan) -> int:
    """The peak if every value died at its last use, from sizes and the scratch of the timeline alone."""
    program = plan.bound
    count = {v.name: 1 for v in program.leaves}
    for v in [*program.leaves, *(op.out for op in program.ops)]:
        total = 4
        for i in v.indices:
            total *= program.sizes[i]
        count[v.name] = total
    gates = [op for op in program.ops if op.out.part == "gate"]
    ops = gates + [op for op in program.ops if op.out.part != "gate"]
    leaves = sum(count[v.name] for v in program.leaves)
    coefficients = set(program.coefficients)
    most = 0
    for k, op in enumerate(ops):
        later = {v.name for o in ops[k:] for v in operands(o)} | ({program.output.name} if k else set())
        if k < len(gates):  # what is returned at the end lives
            later |= coefficients
        made = [o.out.name for o in ops[:k] if o.out.name in later]
        scratch = most_at_once(forward_trace(op, TensorBytes(program, 4), evaluation=True))
        most = max(most, leaves + sum(count[n] for n in made) + scratch)
    return most


@pytest.mark.filterwarnings("ignore::tnmoe.errors.RankWarning")
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_gradient_in_another_order_is_copied_only_where_it_cannot_be_viewed(tokens: int) -> None:
    """Of one row, the axes that the backward of `y_partial_1` merges lie one after another; of two they do not."""
    spec = tnmoe.MuMoEBlock(1, 2, 3, (2, 2), tnmoe.TensorRing((3, 3, 3, 4)), tnmoe.Gate("softmax", "none"), bias=False)
    plan = tnmoe.plan(spec, tokens=tokens, planner="greedy", input_gradients=False)
    frozen = ["up_output_core", "down_output_core"]
    found = predicted(list(tnmoe.memory(plan, frozen=frozen).training))
    assert found == tracker(plan, torch.float32, grad=True, frozen=frozen)
    if tokens == 1:
        assert found[1].peak == 1288  # a copy would make it 1,304
