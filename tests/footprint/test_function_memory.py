"""Memory of modules with a backward pass of their own, in chunks and whole, against torch's MemTracker."""

from __future__ import annotations

import random

import pytest
import torch
from support.cases import blocks, case, seeds
from support.factorized_layers import EMITTED as FACTORIZATIONS
from support.factorized_layers import LINEAR
from support.function_memory import reported, tracked
from support.memory import DTYPES
from support.training import random_spec, saved_bytes
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.planning.plan import Plan
from tnmoe.presets.registry import PRESETS


def random_function(rng: random.Random) -> tuple[Plan, torch.dtype, set[str]]:
    """A plan with a function, a dtype, and the names of frozen parameters."""
    plan = tnmoe.plan(
        random_spec(rng),
        tokens=rng.choice([1, 2, 5, 16]),
        planner="greedy",
        input_gradients=rng.random() < 0.5,
        memory=rng.choice(["save", "recompute"]),
        flavour=rng.choice(["portable", "fast"]),
        chunk=rng.choice([None, 1, 2, 3, 7]),
    )
    names = [p.name for p in plan.bound.parameters]
    frozen = set(rng.sample(names, rng.randint(0, len(names)))) if rng.random() < 0.5 else set()
    return plan, rng.choice(DTYPES), frozen


@pytest.mark.parametrize("block", blocks(100, of=20))
def test_random_functions_take_the_memory_predicted(block: range) -> None:
    """CP and TR, one and two layers, both policies, whole and in chunks, any weights frozen: equality."""
    several = 0
    for seed in block:
        with case(seed) as rng:
            plan, dtype, frozen = random_function(rng)
            told = (plan.layer.summary, plan.values, plan.function, dtype, frozen)
            assert reported(plan, dtype, frozen) == tracked(plan, dtype, frozen), told
            assert plan.function is not None
            several += plan.function.chunk is not None and plan.function.chunk < plan.values["T"]
    assert several > 3


CASES = [(f"linear {name}", tnmoe.FactorizedLinear(12, 14, f)) for name, f in LINEAR.items()] + [
    (name, tnmoe.MuMoEBlock(12, 12, 12, 4, f)) for name, f in FACTORIZATIONS.items()
]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("name", "spec"), CASES, ids=[name for name, _ in CASES])
def test_factorizations_take_the_memory_and_the_work_predicted(name: str, spec: object, chunk: int | None) -> None:
    """Also those that make products of weights alone, which chunks do not repeat: bytes, and FLOPs as torch counts."""
    for memory in ("save", "recompute"):
        plan = tnmoe.plan(spec, tokens=9, memory=memory, chunk=chunk, input_gradients=True)  # type: ignore[arg-type]
        assert reported(plan, torch.float32, set()) == tracked(plan, torch.float32, set())
        module, x = tnmoe.build(plan).train(), torch.randn(9, 12, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        assert tnmoe.cost(plan).training_matmul_flops == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr"])
def test_presets_take_the_memory_predicted(name: str, memory: str) -> None:
    """At full size, in 8 chunks of 512 tokens, without allocating any of it."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=4096, memory=memory, chunk=512)
    with FakeTensorMode():
        assert reported(plan, torch.float32, set()) == tracked(plan, torch.float32, set())


def test_a_function_by_hand() -> None:
    """16→24, 8 experts, CP of rank 12, softmax, 10 tokens, float32; all of it kept, in chunks of 5.

    Weights 2864, x 640 (as in `test_a_layer_by_hand`). Of a value t·n 320, t·r 480, t·o 960. The function keeps experts
    projected and gated, 3·480, and the coefficients, 320, which softmax keeps as well; chunks fill the result, 960.
    """
    spec = tnmoe.MuMoE(16, 24, 8, tnmoe.CP(12), gate=tnmoe.Gate("softmax", "none"))
    plan = tnmoe.plan(spec, tokens=10, memory=10**9, chunk=5)
    report = tnmoe.memory(plan)
    assert {s.name: s.bytes for s in report.saved} == {
        "coefficients": 320, "experts": 480, "projected": 480, "gated": 480
    }  # fmt: skip
    assert report.saved[0].reasons == (
        "result of softmax, for ∂logits",
        "to compute ∂expert_factor",
    )
    assert report.forward_peak == 2864 + 640 + (320 + 3 * 480) + 960
    assert report.saved_bytes == tnmoe.cost(plan).saved_bytes


@pytest.mark.parametrize("seed", seeds(30, 4))
def test_saved_tensors_agree_with_hooks(seed: int) -> None:
    """Their bytes, each with a reason, sum to what autograd's hooks see."""
    plan, dtype, frozen = random_function(random.Random(seed))
    report = tnmoe.memory(plan, dtype=str(dtype).removeprefix("torch."), frozen=sorted(frozen))
    module = tnmoe.build(plan, dtype=dtype)
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
    width = plan.bound.sizes["i"]
    x = torch.randn(plan.values["T"], width, dtype=dtype, requires_grad="x" in plan.input_gradients)
    found, _ = saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])
    assert report.saved_bytes == found, (plan.layer.summary, plan.function, frozen)
    assert all(s.reasons for s in report.saved)
