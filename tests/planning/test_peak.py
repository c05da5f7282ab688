"""Plans for the least peak, and within a limit on memory, against every tree in every order of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from support.cases import blocks, case
from support.memory import tracker
from support.networks import random_network

import tnmoe
from tnmoe.footprint.forward import inference
from tnmoe.footprint.liveness import eager
from tnmoe.ir.contractions import Permute
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import with_tokens


def all_sequences(tensors: int) -> Iterator[ContractionPath]:
    """Every tree with every order of its steps: 3 for 3 tensors, 18, 180, 2,700."""

    def extend(live: tuple[int, ...], steps: tuple[tuple[int, int], ...]) -> Iterator[ContractionPath]:
        if len(live) == 1:
            yield ContractionPath(steps)
        for pair in combinations(live, 2):
            rest = tuple(k for k in live if k not in pair)
            yield from extend((*rest, tensors + len(steps)), (*steps, pair))

    yield from extend(tuple(range(tensors)), ())


class Oracle:
    """Memory and FLOPs of a sequence of steps by hand, from index sets; shares no code with the package."""

    def __init__(self, network: Network, sizes: dict[str, int]) -> None:
        self.terms = [frozenset(t.indices) for t in network.tensors]
        self.output, self.sizes = frozenset(network.output), sizes

    def volume(self, indices: frozenset[str]) -> int:
        result = 1
        for i in indices:
            result *= self.sizes[i]
        return result

    def run(self, path: ContractionPath) -> tuple[int, int]:
        """(most elements alive besides the leaves, FLOPs); an operand dies as soon as its product is made."""
        live = dict(enumerate(self.terms))
        most = alive = flops = 0
        for k, (i, j) in enumerate(path.steps):
            a, b = live.pop(i), live.pop(j)
            needed = self.output.union(*live.values())
            reduced = [frozenset(x for x in s if x in needed or x in o) for s, o in ((a, b), (b, a))]
            beside = sum(self.volume(r) for r, whole in zip(reduced, (a, b), strict=True) if r != whole)
            flops += sum(self.volume(whole) for r, whole in zip(reduced, (a, b), strict=True) if r != whole)
            joint = reduced[0] | reduced[1]
            result = joint & needed
            flops += (1 if result == joint else 2) * self.volume(joint)
            most = max(most, alive + beside + self.volume(result))
            n = len(self.terms)
            alive += self.volume(result) - sum(self.volume(s) for m, s in ((i, a), (j, b)) if m >= n)
            live[n + k] = result
        return most, flops


def peak(plan: Plan) -> int:
    return max(m.peak for m in inference(plan.bound, 4))


def leaves(plan: Plan) -> int:
    program = plan.bound
    return 4 * sum(int(torch.Size([int(program.sizes[i]) for i in v.indices]).numel()) for v in program.leaves)


@pytest.mark.parametrize("block", blocks(150, of=50))
def test_least_peaks_and_limits_are_those_of_all_orders(block: range) -> None:
    """Random networks of 3 to 5 tensors: least peak, fewest FLOPs at it, and fewest FLOPs within any limit."""
    tracked = tighter = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 3, max_size=9)
            oracle = Oracle(network, sizes)
            found = [oracle.run(path) for path in all_sequences(len(network.tensors))]
            least = min(found)
            plan = tnmoe.plan(network, sizes=sizes, objective="peak")
            assert oracle.run(plan.paths["result"]) == least, str(network)
            if any(isinstance(op, Permute) for op in plan.program.ops):
                continue
            assert plan.exact
            assert peak(plan) == leaves(plan) + 4 * least[0]
            if seed % 3 == 0:
                ((most, _),) = tracker(plan, torch.float32, grad=False)
                assert most == peak(plan)
                tracked += 1
            limit = least[0] if seed % 2 else rng.choice(found)[0]
            within = tnmoe.plan(network, sizes=sizes, memory_limit=leaves(plan) + 4 * limit)
            assert peak(within) <= leaves(plan) + 4 * limit
            cheapest = min(flops for most, flops in found if most <= limit)
            assert within.flops == cheapest or not within.exact
            tighter += within.exact and cheapest > min(flops for _, flops in found)
            if least[0] > 1:
                with pytest.raises(tnmoe.PlanError, match=f"the least is {leaves(plan) + 4 * least[0]:,}"):
                    tnmoe.plan(network, sizes=sizes, memory_limit=leaves(plan) + 4 * (least[0] - 1))
    assert tracked > 3
    assert tighter > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        tnmoe.MuMoE(6, 9, 4, tnmoe.CP(5)),
        tnmoe.MuMoE(6, 9, 4, tnmoe.TensorRing((2, 3, 4)), gate=tnmoe.Gate("softmax", "layer"), input_norm=True),
        tnmoe.MuMoEBlock(6, 9, 4, 5, tnmoe.TensorRing((3, 2, 4)), gate=tnmoe.Gate("softmax", "none")),
    ],
    ids=["cp", "tr", "block"],
)
def test_layers_reach_the_least_peak_of_all_orders(spec: tnmoe.MuMoE | tnmoe.MuMoEBlock) -> None:
    """Folded biases, gates and everything else that is alive included; on the program, every sequence tried."""
    plan = tnmoe.plan(spec, tokens=8, objective="peak")
    assert plan.exact
    ((most, _),) = tracker(plan, torch.float32, grad=False)
    assert most == peak(plan)
    least = None
    for name, path in plan.paths.items():
        for other in all_sequences(len(path.steps) + 1):
            trial = replace(plan, paths={**plan.paths, name: other})
            found = max(m.peak for m in inference(eager(trial.bound), 4))
            least = found if least is None else min(least, found)
    assert peak(plan) == least
    for dtype in ("bfloat16", "float64"):
        other = tnmoe.plan(spec, tokens=8, objective="peak", dtype=dtype)
        assert tnmoe.memory(other, dtype=dtype).inference_peak >= 2 * most // 5


def test_faults() -> None:
    spec = tnmoe.MuMoE(6, 9, 4, tnmoe.CP(5))
    for options, words in (
        ({"memory_limit": 0}, "must be a number of bytes"),
        ({"memory_limit": 10}, "the least is"),
        ({"memory_limit": 10**9, "objective": "training"}, "a price of the forward pass"),
        ({"memory_limit": 10**9, "objective": "time"}, "takes no limit"),
        ({"memory_limit": 10**9, "planner": "greedy"}, "leave planner"),
        ({"objective": "peak", "dtype": "float23"}, "unknown dtype 'float23'"),
        ({"objective": ("peak", "flops")}, "stands alone"),
    ):
        with pytest.raises(tnmoe.PlanError, match=words):
            tnmoe.plan(spec, tokens=8, **options)
    with pytest.raises(tnmoe.PlanError, match="up to 9 tensors"):
        tnmoe.plan(tnmoe.MuMoE(4, 5, (2, 2, 2, 2), tnmoe.CP(2)), objective="peak")
    plan = tnmoe.plan(spec, tokens=8, objective="peak")
    assert Plan.from_json(plan.to_json()).paths == plan.paths
    assert "memory of a forward pass" in tnmoe.explain(plan)
    within = tnmoe.plan(spec, tokens=8, memory_limit=10**6)
    assert within.proof == "proven optimal with at most 1,000,000 bytes alive at once"
    assert Plan.from_json(within.to_json()).memory_limit == 10**6
    with pytest.raises(tnmoe.PlanError, match="memory_limit of a plan must be an integer from 0, got -7"):
        Plan.from_json(within.to_json().replace("1000000", "-7"))
    assert tnmoe.plan(spec, tokens=8, objective="peak", memory_limit=10**6).exact
    assert with_tokens(within, 9).memory_limit is None
