"""Bytes alive in the emitted module, step by step, against torch's MemTracker on that very module."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from layers_strategy import any_order
from networks import random_folded_network, random_network
from test_training import random_spec
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import tnmoe
from tnmoe.allocations import forward_script, room
from tnmoe.memory import Moment, inference, training
from tnmoe.network import Role
from tnmoe.ops import operands
from tnmoe.plan import Plan
from tnmoe.presets import PRESETS

EMITTED = [name for name, preset in PRESETS.items() if preset.emitted]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Tracked(NamedTuple):
    """Bytes: the most in the pass so far, and those alive after it."""

    peak: int
    after: int


def tracker(plan: Plan, dtype: torch.dtype, *, grad: bool, frozen: Collection[str] = ()) -> tuple[Tracked, ...]:
    """What torch's tracker sees of a forward pass without grad, or of a forward and then of a backward pass.

    `forward` is called past the module's hooks, for the tracker's own fail on a frozen parameter; all that they do is
    to sort the bytes into classes.
    """
    module = tnmoe.build(plan, dtype=dtype).train(grad)
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
    inputs = [torch.empty([plan.bound.sizes[i] for i in v.indices], dtype=dtype) for v in plan.bound.inputs]
    for v, x in zip(plan.bound.inputs, inputs, strict=True):
        x.requires_grad_(grad and v.name in plan.input_gradients)
    found = MemTracker()
    found.track_external(module, *inputs)

    def now() -> Tracked:
        most = found.get_tracker_snapshot("peak").values()
        alive = found.get_tracker_snapshot("current").values()
        return Tracked(sum(s["Total"] for s in most), sum(s["Total"] for s in alive))

    with found, contextlib.nullcontext() if grad else torch.no_grad():
        y: Tensor = module.forward(*inputs)
        forward = now()
        if not y.requires_grad:
            return (forward,)
        gradient = torch.empty_like(y)
        y.backward(gradient)
        return forward, now()


def predicted(moments: list[Moment]) -> tuple[Tracked, ...]:
    """The same off a timeline."""
    ends = [k for k, m in enumerate(moments) if k + 1 == len(moments) or moments[k + 1].phase != m.phase]
    return tuple(Tracked(max(m.peak for m in moments[: end + 1]), moments[end].after) for end in ends)


def needing(plan: Plan, frozen: Collection[str] = ()) -> set[str]:
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


def test_random_layers_take_the_memory_predicted() -> None:
    """300 layers, CP and TR, 1 to 3 levels, one and two layers, three dtypes, any weights frozen: equality."""
    rng = random.Random(51)
    frozen_layers = dropped = 0
    for k in range(300):
        plan, dtype, frozen = random_layer(rng)
        item, told = dtype.itemsize, (plan.layer.summary, plan.values, dtype, frozen)
        assert predicted(inference(plan.bound, item)) == tracker(plan, dtype, grad=False), told
        if k % 6 == 0:  # copies, sums and bias slices that no planner would choose
            other = any_order(plan, k)
            assert predicted(inference(other.bound, item)) == tracker(other, dtype, grad=False), told
        found = predicted(training(plan.bound, item, needing(plan, frozen)))
        assert found == tracker(plan, dtype, grad=True, frozen=frozen), told
        frozen_layers += bool(frozen)
        dropped += bool(plan.bound.drops)
    assert frozen_layers > 100
    assert dropped > 200


def test_fake_tensors_take_the_same() -> None:
    """Tensors without data, as the tracker is meant to be used, and real ones agree."""
    rng = random.Random(52)
    for _ in range(6):
        plan, dtype, frozen = random_layer(rng)
        with FakeTensorMode():
            fake = [tracker(plan, dtype, grad=grad, frozen=frozen) for grad in (False, True)]
        assert fake == [tracker(plan, dtype, grad=grad, frozen=frozen) for grad in (False, True)]


@pytest.mark.parametrize("name", EMITTED)
def test_presets_take_the_memory_predicted(name: str) -> None:
    """At full size, without allocating any of it."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=4096)
    with FakeTensorMode():
        assert predicted(inference(plan.bound, 4)) == tracker(plan, torch.float32, grad=False)
        assert predicted(training(plan.bound, 4, needing(plan))) == tracker(plan, torch.float32, grad=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["entmax15", "sparsemax"])
def test_gates_of_many_logits_take_the_memory_predicted(activation: str, dtype: torch.dtype) -> None:
    """Sparse gates sort few logits, and find the threshold of many by Newton's method."""
    for experts in (1, 2, 5, 32):
        for tokens in (8192 // experts, 8192 // experts - 1, 1):
            plan = tnmoe.plan(
                tnmoe.MuMoE(3, 2, experts, tnmoe.CP(2), gate=tnmoe.Gate(activation, "layer")), tokens=tokens
            )
            assert predicted(inference(plan.bound, dtype.itemsize)) == tracker(plan, dtype, grad=False)
            found = predicted(training(plan.bound, dtype.itemsize, needing(plan)))
            assert found == tracker(plan, dtype, grad=True)


def test_random_networks_take_the_memory_predicted() -> None:
    """Any einsum, with and without a folded bias, in a forward pass without grad."""
    rng = random.Random(53)
    for _ in range(200):
        network, sizes = (
            random_network(rng, rng.randint(1, 5), max_size=4)
            if rng.random() < 0.7
            else random_folded_network(rng, rng.randint(2, 5))
        )
        plan = tnmoe.plan(network, sizes=sizes)
        assert predicted(inference(plan.bound, 4)) == tracker(plan, torch.float32, grad=False), str(network)


def test_drops_reach_the_least_peak_there_is() -> None:
    """No further `del` would lower the peak: dropping every value right after its last use gives the same."""
    rng = random.Random(54)
    saved = 0
    for _ in range(80):
        plan, *_ = random_layer(rng)
        program = plan.bound
        order = [op.out.name for op in program.ops]
        kept = replace(program, drops={})
        peak = max(m.peak for m in inference(program, 4))
        assert peak <= max(m.peak for m in inference(kept, 4))
        saved += peak < max(m.peak for m in inference(kept, 4))
        module_values = {name for names in program.drops.values() for name in names}
        assert module_values <= set(order)
        # By hand: at each step, what is read now or later, and what is written.
        least = least_peak(plan)
        assert peak == least, plan.layer.summary
    assert saved > 40


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
        scratch = room(forward_script(op, program.sizes, 4, kept=False, evaluation=True))
        most = max(most, leaves + sum(count[n] for n in made) + scratch)
    return most
