"""Shortlists: the cheapest orders of a layer, chosen among by predicted time or by what is copied."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.all_trees import all_trees
from support.cases import blocks, case, seeds
from support.device_by_hand import by_hand
from support.networks import random_network
from support.training import Oracle
from torch.utils._python_dispatch import TorchDispatchMode

import tnmoe
from tnmoe.cli.main import main
from tnmoe.ir.contractions import Permute
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import with_tokens

trees = cache(all_trees)

DENSE = tnmoe.DenseMoE(24, 160, 40, 4)


class Copies(TorchDispatchMode):
    """Counts the elements that torch clones."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.clone:
            self.elements += out.numel()
        return out


def cloned(plan: Plan, tokens: int) -> int:
    module = tnmoe.build(plan)
    with Copies() as mode, torch.no_grad():
        module(torch.randn(tokens, 24))
    return mode.elements


@pytest.mark.parametrize("seed", seeds(100, 10))
def test_candidates_are_the_cheapest_of_all_trees(seed: int) -> None:
    """The FLOPs of the candidates are the smallest of all trees, by the oracle."""
    network, sizes = random_network(random.Random(seed), 3 + seed % 3)
    oracle = Oracle(network, sizes, set())
    every = sorted(oracle.of_path(path)[1] for path in trees(len(network.tensors)))
    found = tnmoe.shortlist(network, sizes=sizes, count=7)
    assert [c.plan.flops for c in found] == every[:7]
    assert [oracle.of_path(c.plan.paths["result"])[1] for c in found] == every[:7]
    assert all(c.seconds is None for c in found)


@pytest.mark.slow
def test_candidates_of_a_layer_combine_its_networks() -> None:
    """Two networks of a block, each with every one of its orders: the cheapest sums, and no pair twice."""
    spec = tnmoe.MuMoEBlock(7, 11, 5, 3, tnmoe.TensorRing((2, 3, 4)), bias=False)
    found = tnmoe.shortlist(spec, tokens=3, count=30)
    plan = tnmoe.plan(spec, tokens=3)
    alone = {}
    for name in ("hidden", "y"):
        others = {n: p for n, p in plan.paths.items() if n != name}
        alone[name] = [Plan(plan.layer, {**others, name: p}, plan.values).flops - plan.flops for p in trees(5)]
    sums = sorted(plan.flops + a + b for a in alone["hidden"] for b in alone["y"])
    assert [c.plan.flops for c in found] == sums[:30]
    assert len({tuple(c.plan.orders.items()) for c in found}) == 30


@pytest.mark.parametrize("block", blocks(150, of=30))
def test_layout_copies_least_within_one_per_cent(block: range) -> None:
    """Random networks, sizes drawn so that near-ties occur: no tree within 1 % of the fewest FLOPs copies less."""
    fewer = complete = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 2, max_size=4)
            plan = tnmoe.plan(network, sizes=sizes, objective="layout")
            every = []
            for path in trees(len(network.tensors)):
                other = Plan(plan.layer, {"result": path}, plan.values)
                copied = 0
                for op in other.program.ops:
                    if isinstance(op, Permute):
                        volume = 1
                        for index in op.out.indices:
                            volume *= sizes[index]
                        copied += volume
                every.append((other.flops, copied))
            least = min(flops for flops, _ in every)
            assert plan.flops * 100 <= least * 101
            assert plan.exact == plan.shortlist.complete
            if plan.exact:
                assert plan.copied == min(copied for flops, copied in every if flops * 100 <= least * 101)
                complete += 1
            fewer += plan.copied < tnmoe.plan(network, sizes=sizes).copied
    assert complete > 12
    assert fewer > 0


def test_layout_of_a_dense_mixture() -> None:
    """By FLOPs two token-sized values are copied, as torch sees too; by layout none, for less than 1 % more FLOPs."""
    flops, layout = (tnmoe.plan(DENSE, tokens=8, objective=o) for o in ("flops", "layout"))
    assert flops.copied == 8 * 4 * (160 + 40) == cloned(flops, 8)
    assert layout.copied == 0 == cloned(layout, 8)
    assert flops.flops < layout.flops <= 1.01 * flops.flops
    assert "0 (chosen)" in str(layout)
    assert "6,400 elements are copied" in str(flops)
    assert "all 2 order(s) within 1 %" in layout.proof


def test_time_takes_the_least_predicted() -> None:
    """On a machine whose streams are slow the copies cost more than the FLOPs they spare; the plan says so."""
    slow = by_hand()
    plan = tnmoe.plan(DENSE, tokens=64, objective="time", profile=slow)
    candidates = tnmoe.shortlist(DENSE, tokens=64, profile=slow)
    seconds = [tnmoe.predict(c.plan.bound, slow).seconds for c in candidates]
    assert [c.seconds for c in candidates] == seconds
    assert tnmoe.predict(plan.bound, slow).seconds == min(seconds)
    assert seconds[0] > min(seconds)
    assert not plan.exact
    assert plan.shortlist.chosen == seconds.index(min(seconds))
    assert [c.seconds for c in plan.shortlist.considered] == seconds
    assert "a model, no proof" in str(plan)
    assert "Profile: slow machine, by hand, float32." in str(plan)
    assert "a model, no proof" in tnmoe.emit(plan)
    assert "The next best order" in tnmoe.explain(plan)
    with pytest.raises(tnmoe.PlanError, match="not proven"):
        tnmoe.token_range(plan, "y")


def test_time_also_looks_at_orders_that_move_little() -> None:
    """Over tiny modes none of the orders with the fewest FLOPs merges small factors first; "time" sees some that do."""
    network = tnmoe.Network.parse("befg,hijklm,ah,ci,dj,ek,fl,gm->bacd", weights="hijklm ah ci dj ek fl gm")
    sizes = dict(zip("abcdefghijklm", (4, 512, 12, 16, 4, 12, 16, 3, 8, 11, 3, 8, 11), strict=True))
    plan = tnmoe.plan(network, sizes=sizes, objective="time", profile=by_hand())
    fewest = [c.plan.orders for c in tnmoe.shortlist(network, sizes=sizes, count=16)]
    considered = [c.orders for c in plan.shortlist.considered]
    assert considered[:16] == fewest
    assert not any("(ek · fl)" in orders["result"] for orders in fewest)
    assert any("(ek · fl)" in orders["result"] for orders in considered)
    flops = [c.flops for c in plan.shortlist.considered]
    assert flops == sorted(flops)


def test_json_keeps_the_shortlist(tmp_path: Path) -> None:
    for objective, profile in (("time", by_hand()), ("layout", None)):
        plan = tnmoe.plan(DENSE, tokens=5, objective=objective, profile=profile)
        back = Plan.from_json(plan.to_json())
        assert (back.shortlist, back.paths, back.objective) == (plan.shortlist, plan.paths, objective)
        assert back.to_json() == plan.to_json()
    data = json.loads(plan.to_json())
    for change in (
        {"by": "speed"},
        {"by": "time"},
        {"chosen": len(plan.shortlist.considered)},
        {"chosen": True},
        {"considered": [{}]},
        {"considered": [{"orders": {"y": 3}, "flops": 1, "copied": 1, "seconds": None}], "chosen": 0},
        {"considered": [{"orders": {}, "flops": True, "copied": 1, "seconds": None}], "chosen": 0},
        {"considered": [{"orders": {}, "flops": 1, "copied": -1, "seconds": None}], "chosen": 0},
        {"considered": [{"orders": {}, "flops": 1, "copied": 1, "seconds": float("nan")}], "chosen": 0},
        {"complete": 1},
        {"source": None},
    ):
        with pytest.raises(tnmoe.PlanError, match="shortlist"):
            Plan.from_json(json.dumps({**data, "shortlist": {**data["shortlist"], **change}}))
    with pytest.raises(tnmoe.PlanError, match="shortlist"):
        Plan.from_json(json.dumps({**data, "shortlist": 7}))


def test_other_tokens_have_another_shortlist() -> None:
    plan = tnmoe.plan(DENSE, tokens=5, objective="layout")
    assert with_tokens(plan, 6).shortlist is None
    assert not with_tokens(plan, 6).exact


def test_profiles_by_file_and_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(tnmoe.PlanError, match="tnmoe calibrate"):
        tnmoe.plan(DENSE, objective="time")
    file = tmp_path / "here.json"
    with pytest.raises(tnmoe.FileError, match="cannot be read"):
        tnmoe.plan(DENSE, objective="time", profile=file)
    file.write_text("{}")
    with pytest.raises(tnmoe.DeclarationError, match=r"here\.json"):
        tnmoe.plan(DENSE, objective="time", profile=file)
    file.write_text(by_hand().to_json())
    by_file = tnmoe.plan(DENSE, objective="time", profile=file)
    assert by_file.shortlist == tnmoe.plan(DENSE, objective="time", profile=by_hand()).shortlist
    kept = tmp_path / "tnmoe" / "profile-cpu.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(replace(by_hand(), name="cached").to_json())
    assert "cached" in tnmoe.plan(DENSE, objective="time").shortlist.source
    with pytest.raises(SystemExit) as stop:
        main(["plan", "clip-128-dense", "--tokens", "3", "--objective", "time", "--profile", str(file)])
    assert stop.value.code == 0
    assert "Predicted µs, the fewest FLOPs first:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "time", "calls": 3}, "stands alone"),
        ({"objective": "time + flops"}, "stands alone"),
        ({"objective": ("layout", "flops")}, "stands alone"),
        ({"objective": "layout", "planner": "greedy"}, "a search of its own"),
        ({"objective": "flops", "profile": "x.json"}, "a profile goes with"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tnmoe.PlanError, match=message):
        tnmoe.plan(DENSE, **arguments)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3", 10**9])
def test_faulty_counts_are_refused(count: Any) -> None:
    with pytest.raises(tnmoe.PlanError, match="count"):
        tnmoe.shortlist(DENSE, count=count)
    with pytest.raises(tnmoe.PlanError, match="shortlist itself"):
        tnmoe.shortlist(DENSE, objective="time")
