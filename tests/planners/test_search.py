"""The search beyond the exact planner: as cheap as any peer's path, exact where it must be, right, and repeatable."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import cotengra as peer
import numpy as np
import opt_einsum
import pytest
from support.cases import case, seeds
from support.large_network import large_network
from support.networks import Sizes, random_folded_network, random_network
from support.trees import Oracle, every_tree, value

import tnmoe
from tnmoe import Network, PlanError, Tensor
from tnmoe.costing.objective import FLOPS, MACS, TRAINING, Objective, as_objective
from tnmoe.costing.prices import Prices
from tnmoe.io import cache
from tnmoe.ir.layer import Contraction
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role, Value
from tnmoe.lowering.lower import lower_network
from tnmoe.planners import cotengra, random_greedy, search, subset_dp
from tnmoe.planners import opt_einsum as adapter
from tnmoe.planners.effort import Effort
from tnmoe.planners.reconfigure import reconfigure
from tnmoe.planners.splits import Steps, path_of, splits_of

OBJECTIVES = tuple(map(as_objective, ("flops", "macs", "training", "saved", "inference(7)", "training + 0.5*saved")))


def requires_grad(network: Network) -> frozenset[str]:
    return frozenset(t.name for t in network.tensors if t.role is Role.WEIGHT)


def whole_price(network: Network, sizes: Sizes, path: ContractionPath, objective: Objective) -> int:
    """All ops of the lowered network at once."""
    prices = Prices(network, sizes, objective, requires_grad(network) if objective.of_training else frozenset())
    return prices.of(lower_network(Contraction(Value("y", network.output), network), path))


# ---- steps of trees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_the_price_of_a_tree_is_that_of_the_lowered_network(objective: Objective, folded: bool) -> None:
    for seed in range(6):
        with case(seed) as rng:
            network, sizes = (random_folded_network if folded else random_network)(rng, rng.randint(2, 6))
            given = requires_grad(network) if objective.of_training else frozenset()
            steps = Steps(network, sizes, objective, given)  # one for all trees, as a search uses it
            for pairs in rng.sample(trees := list(every_tree(len(network.tensors))), min(8, len(trees))):
                path = ContractionPath(pairs)
                splits = splits_of(path, len(network.tensors))
                assert steps.total(splits) == whole_price(network, sizes, path, objective)
                again = path_of(splits, len(network.tensors), "test")
                assert splits_of(again, len(network.tensors)) == splits


def test_greedy_trees_are_trees_and_repeatable() -> None:
    for seed in range(20):
        with case(seed) as rng:
            network, sizes = random_network(rng, rng.randint(1, 15))
            drawn = rng.uniform(0.1, 2), rng.uniform(0, 2)
            one, two = (random_greedy.tree(network, sizes, random.Random(seed), *drawn) for _ in range(2))
            assert one == two
            path_of(one, len(network.tensors), "test").check(len(network.tensors))


def test_greedy_without_noise_takes_the_smallest_growth() -> None:
    """By hand: cd·de has 100 entries instead of 10 + 250; then ab·bc 8 instead of 12 + 6, but bc·ce 150 for 106."""
    network = Network.parse("ab,bc,cd,de->ae")
    sizes = {"a": 4, "b": 3, "c": 2, "d": 5, "e": 50}
    splits = random_greedy.tree(network, sizes, random.Random(0))
    assert 0b1100 in splits
    assert 0b0011 in splits


# ---- improving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(5, 1))
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_no_piece_is_left_to_improve(objective: Objective, seed: int) -> None:
    """A piece as large as the network is the exact planner's problem; smaller pieces never make it dearer."""
    network, sizes = random_network(random.Random(seed), 7)
    given = requires_grad(network) if objective.of_training else frozenset()
    steps = Steps(network, sizes, objective, given)
    start = random_greedy.tree(network, sizes, random.Random(seed), 1, 3.0)
    costs = [steps.total(start)]
    for most in (3, 4, 5):
        start = reconfigure(steps, start, most, Effort(None, 10**9))
        costs.append(steps.total(start))
    assert costs == sorted(costs, reverse=True)
    whole = reconfigure(steps, start, 7, Effort(None, 10**9))
    best = whole_price(network, sizes, subset_dp.plan(network, sizes, objective, given), objective)
    assert steps.total(whole) == best


@pytest.mark.parametrize("seed", range(3))
def test_chains_come_within_a_thousandth_of_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the textbook's dynamic program over intervals, on 40 matrices."""
    monkeypatch.setattr(search, "_UNITS", 500_000)
    rng = random.Random(seed)
    n = 40
    dims = [rng.randint(1, 30) for _ in range(n + 1)]
    names = [f"i{k}" for k in range(n + 1)]
    network = Network(tuple(Tensor(f"m{k}", tuple(names[k : k + 2])) for k in range(n)), (names[0], names[-1]))
    best = {(k, k): 0 for k in range(n)}
    for length in range(1, n):
        for i in range(n - length):
            j = i + length
            best[i, j] = min(best[i, k] + best[k + 1, j] + dims[i] * dims[k + 1] * dims[j + 1] for k in range(i, j))
    path = search.plan(network, dict(zip(names, dims)), MACS)
    macs = Oracle(network, dict(zip(names, dims))).path(path.steps)[1]
    assert best[0, n - 1] <= macs <= 1.001 * best[0, n - 1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("folded", [False, True])
def test_small_networks_get_the_exact_price(folded: bool, seed: int) -> None:
    rng = random.Random(f"small {seed}")
    network, sizes = (random_folded_network if folded else random_network)(rng, rng.randint(1, 8))
    path = search.plan(network, sizes)
    path.check(len(network.tensors))
    assert not path.exact
    assert whole_price(network, sizes, path, FLOPS) == whole_price(
        network, sizes, subset_dp.plan(network, sizes), FLOPS
    )


def test_a_folded_bias_in_a_large_layer() -> None:
    """Six levels of experts make 15 tensors; the reference's order, factor by factor, is what all agree on."""
    spec = tnmoe.MuMoE(64, 48, (2, 3, 2, 3, 2, 3), tnmoe.CP(16))
    plans = [tnmoe.plan(spec, planner=p) for p in ("auto", "greedy", "cotengra")]
    assert plans[0].flops == min(p.flops for p in plans)
    by_hand = 2 * 16 * (2 + 3 + 2 + 3 + 2 + 3) + 2 * 16 * 64 + 16 + 6 * 16 + 2 * 16 * 48
    gates = 2 * 64 * (2 + 3 + 2 + 3 + 2 + 3)
    assert tnmoe.cost(plans[0]).matmul_flops == 1024 * (by_hand - 16 - 6 * 16 + gates)


# ---- against peers, and in execution ---------------------------------------------------------------------------

LARGE = [(30, 0, 6, MACS), (50, 2, 4, TRAINING), (100, 4, 2, FLOPS)]


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "seed", "most", "objective"), LARGE, ids=str)
def test_never_dearer_than_peers(tensors: int, seed: int, most: int, objective: Objective, monkeypatch: Any) -> None:
    monkeypatch.setattr(search, "_UNITS", 60_000)  # a small part of what users get
    network, sizes = large_network(tensors, seed, most=most)
    given = requires_grad(network) if objective.of_training else frozenset()
    ours = whole_price(network, sizes, search.plan(network, sizes, objective, given), objective)
    for path in (
        adapter.plan(network, sizes, algorithm="greedy"),
        adapter.plan(network, sizes, algorithm="auto"),
        cotengra.plan(network, sizes),
        cotengra.plan(network, sizes, optimizer=peer.GreedyOptimizer()),
    ):
        assert ours <= whole_price(network, sizes, path, objective)


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("tensors", "seed"), [(30, 10), (45, 11)])
def test_the_value_is_that_of_opt_einsum(tensors: int, seed: int, installed: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(cotengra, "INSTALLED", installed)
    monkeypatch.setattr(search, "_UNITS", 30_000)
    network, sizes = large_network(tensors, seed, most=2)
    rng = np.random.default_rng(seed)
    arrays = {t.name: rng.choice([-1.0, 0.0, 1.0], [sizes[i] for i in t.indices]) for t in network.tensors}
    planned = tnmoe.plan(network, sizes=sizes)
    number = {i: k for k, i in enumerate(network.indices)}
    operands = [x for t in network.tensors for x in (arrays[t.name], [number[i] for i in t.indices])]
    expected = opt_einsum.contract(*operands, [number[i] for i in network.output], optimize="greedy")
    np.testing.assert_array_equal(value(planned, arrays), expected)


def test_disconnected_parts_and_scalars() -> None:
    network = Network.parse("ab,bc,,de,e,fg,gh,hi,ij,jk,kl,lm,mn,no->af")
    sizes = dict(zip("abcdefghijklmno", itertools.cycle([2, 3])))
    path = search.plan(network, sizes)
    assert (
        Oracle(network, sizes).path(path.steps)[0]
        <= Oracle(network, sizes).path(cotengra.plan(network, sizes).steps)[0]
    )


# ---- budget, repeatability, cache ------------------------------------------------------------------------------

PRINT = """
import random, sys
sys.path.insert(0, {tests!r})
from support.networks import random_network
from tnmoe.planners import search
search._UNITS = 100_000
print(search.plan(*random_network(random.Random(7), 20)).steps)
"""


@pytest.mark.slow
def test_another_process_finds_the_same() -> None:
    """Whatever Python's hash seed is."""
    script = PRINT.format(tests=str(Path(__file__).parents[1]))
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert "(" in found.pop()


def test_how_far_a_search_is_is_told() -> None:
    network, sizes = large_network(40, 5)
    told: list[tuple[float, float]] = []
    search.plan(network, sizes, budget=0.3, progress=lambda done, all_: told.append((done, all_)))
    assert told == sorted(told)
    assert {all_ for _, all_ in told} == {0.3}
    assert max(told)[0] == 0.3


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), True, "3", []])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(PlanError, match="budget must be a positive number of seconds"):
        tnmoe.plan(Network.parse("ab,bc->ac"), sizes={"a": 2, "b": 2, "c": 2}, budget=budget)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(search, "_UNITS", 50_000)
    return tmp_path / "entries"


def test_what_was_found_is_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes = large_network(15, 1)
    first = search.plan(network, sizes)
    assert len(list(kept.iterdir())) == 1

    def never(*_: Any) -> Any:
        raise AssertionError("searched again")

    with monkeypatch.context() as patch:
        patch.setattr(search, "best", never)
        assert search.plan(network, sizes) == first
        rename = {i: f"new_{i}" for i in network.indices}
        other = Network(
            tuple(Tensor(f"x{k}", tuple(rename[i] for i in t.indices), t.role) for k, t in enumerate(network.tensors)),
            tuple(rename[i] for i in reversed(network.output)),
        )
        assert search.plan(other, {rename[i]: s for i, s in sizes.items()}) == first
        index = network.indices[0]
        for changed in (
            lambda: search.plan(network, {**sizes, index: sizes[index] + 1}),
            lambda: search.plan(network, sizes, MACS),
            lambda: search.plan(network, sizes, TRAINING, requires_grad(network)),
            lambda: search.plan(network, sizes, seed=1),
            lambda: search.plan(network, sizes, budget=1),
            lambda: search.plan(Network(network.tensors, network.output[:1]), sizes),
            lambda: search.plan(Network(network.tensors[::-1], network.output), sizes),
        ):
            with pytest.raises(AssertionError, match="searched again"):
                changed()
        monkeypatch.setenv("TNMOE_CACHE", "off")
        with pytest.raises(AssertionError, match="searched again"):
            search.plan(network, sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", [{}, {"steps": 3}, {"steps": [[0, 1]]}, {"steps": [[0, 0]] * 14}, {"steps": [["a", 1]]}]
)
def test_an_entry_that_is_no_path_is_replaced(kept: Path, value: dict[str, Any]) -> None:
    network, sizes = large_network(15, 1)
    first = search.plan(network, sizes)
    (entry,) = kept.iterdir()
    assert cache.put(entry.stem, value)
    assert search.plan(network, sizes) == first
    assert cache.get(entry.stem) == {"steps": [list(s) for s in first.steps], "planner": "search", "exact": False}


@pytest.mark.parametrize(("tensors", "entries"), [(10, 0), (11, 1), (12, 1)])
def test_exact_paths_are_kept_where_planning_takes_long(kept: Path, tensors: int, entries: int) -> None:
    network, sizes = large_network(tensors, 1)
    first = subset_dp.plan(network, sizes)
    assert subset_dp.plan(network, sizes) == first
    assert first.exact
    assert len(list(kept.parent.rglob("*.json"))) == entries
