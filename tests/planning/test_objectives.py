"""Objectives beyond single prices: inference with folded weights, weighted sums, one criterion after another."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from support.all_trees import all_trees
from support.cases import blocks, case
from support.inference import Inference
from support.networks import random_network
from support.training import Oracle

import tnmoe
from tnmoe.costing.objective import as_objective
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role

trees = cache(all_trees)


@pytest.mark.parametrize("block", blocks(240, of=60))
@pytest.mark.parametrize("calls", [1, 7, 1000, None])
def test_inference_is_the_best_of_all_trees(calls: int | None, block: range) -> None:
    """Random networks of 3 to 5 tensors; with no updates at all, folding is free and decides between equals."""
    folded = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 2 + (seed % 12 == 1))
            oracle = Inference(network, sizes)

            def price(path: ContractionPath, oracle: Inference = oracle) -> tuple[int, ...]:
                each, once = oracle.work(path)
                return (each, each + once) if calls is None else (calls * each + once,)

            plan = tnmoe.plan(network, sizes=sizes, objective="inference", calls=calls)
            assert price(plan.paths["result"]) == min(map(price, trees(len(network.tensors)))), str(network)
            each, once = oracle.work(plan.paths["result"])
            assert (plan.flops - plan.folding_flops, plan.folding_flops) == (each, once)
            folded += once > 0
            if calls == 1:
                assert plan.flops == tnmoe.plan(network, sizes=sizes).flops
    assert folded > 3


COMBINED: list[tuple[Any, list[dict[str, float]]]] = [
    ({"training": 1.0, "saved": 0.5}, [{"training": 1, "saved": 0.5}]),
    ({"flops": 1, "saved": 20, "macs": 0.3}, [{"flops": 1, "saved": 20, "macs": 0.3}]),
    (("flops", "saved"), [{"flops": 1}, {"saved": 1}]),
    (("saved", "flops"), [{"saved": 1}, {"flops": 1}]),
    ("macs, training", [{"macs": 1}, {"training": 1}]),
    (({"training": 2, "saved": 9}, "flops"), [{"training": 2, "saved": 9}, {"flops": 1}]),
    ("inference(50) + 1/3*saved", [{"inference": 1, "saved": Fraction(1, 3)}]),
]


@pytest.mark.parametrize("block", blocks(200, of=50))
@pytest.mark.parametrize(("objective", "criteria"), COMBINED, ids=[str(o) for o, _ in COMBINED])
def test_combinations_are_the_best_of_all_trees(objective: Any, criteria: list[dict[str, float]], block: range) -> None:
    """Random networks of 3 to 5 tensors with random gradients."""
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 2 + (seed % 12 == 1))
            data = [t.name for t in network.tensors if t.role is Role.DATA]
            wanted = [name for name in data if rng.random() < 0.5]
            plan = tnmoe.plan(network, sizes=sizes, objective=objective, input_gradients=wanted)
            trained = Oracle(network, sizes, {t.name for t in network.tensors if t.role is Role.WEIGHT} | set(wanted))
            forward = Inference(network, sizes)

            def price(path: ContractionPath, trained: Oracle = trained, forward: Inference = forward) -> list[Fraction]:
                saved, training = trained.of_path(path)
                each, once = forward.work(path)
                products = sum(products_of(forward, path))
                figures = {
                    "saved": saved,
                    "training": training,
                    "flops": each + once,
                    "macs": products,
                    "inference": 50 * each + once,
                }
                return [sum(Fraction(str(w)) * figures[name] for name, w in level.items()) for level in criteria]

            best = min(map(price, trees(len(network.tensors))))
            assert price(plan.paths["result"]) == best, str(network)
            assert plan.exact


def products_of(oracle: Oracle, path: ContractionPath) -> list[int]:
    """Products of each step, private indices being summed before."""
    groups = [frozenset([k]) for k in range(len(oracle.terms))]
    found = []
    for i, j in path.steps:
        left, right, whole = (oracle.kept(g) for g in (groups[i], groups[j], groups[i] | groups[j]))
        joint = {x for x in left if x in whole or x in right} | {x for x in right if x in whole or x in left}
        found.append(oracle.volume(frozenset(joint)))
        groups.append(groups[i] | groups[j])
    return found


def test_hierarchical_tucker_folds_after_83_tokens() -> None:
    """Experts 256, 768 → 3072, ranks x = t = 64, y = z = 256: multiplying the output factor and its transfer matrix
    costs 2·64·256·3072 = 100,663,296 FLOPs once, and saves 1.2 million a token."""
    net = Network.parse("bn,nx,bi,iy,oz,xyt,tz->bo", weights="nx iy oz xyt tz")
    sizes = {"b": 1, "n": 256, "x": 64, "i": 768, "y": 256, "o": 3072, "z": 256, "t": 64}
    for calls, folds in ((83, False), (84, True)):
        plan = tnmoe.plan(net, sizes=sizes, objective="inference", calls=calls)
        assert plan.folding_flops == (100_663_296 if folds else 0)
        assert round((plan.flops - plan.folding_flops) / 1e6, 2) == (2.92 if folds else 4.14)
        assert bool(plan.program.weight_only) == folds
    forever = tnmoe.plan(net, sizes=sizes, objective="inference")
    assert round((forever.flops - forever.folding_flops) / 1e6, 2) == 2.92


def test_layers_and_json() -> None:
    """A layer of two networks, and a plan that comes back from JSON."""
    spec = tnmoe.MuMoEBlock(40, 60, 40, 4, tnmoe.TensorRing((4, 8, 16)))
    plan = tnmoe.plan(spec, tokens=2, objective="inference", calls=10**6)
    assert plan.objective == "inference(1000000)"
    plain = tnmoe.plan(spec, tokens=2)
    assert plan.flops - plan.folding_flops < plain.flops
    assert plan.folding_flops > 0
    assert "up_expert_core" not in plan.program.weight_only
    back = tnmoe.Plan.from_json(plan.to_json())
    assert (back.objective, back.paths) == (plan.objective, plan.paths)
    mixed = tnmoe.plan(spec, tokens=2, objective={"training": 1.0, "saved": 0.5})
    assert tnmoe.Plan.from_json(mixed.to_json()).objective == mixed.objective == "training + 0.5*saved"


def test_explanations_compare_the_criterion_that_decides() -> None:
    """Without gradients nothing is saved in any order, and FLOPs decide; trained at both ends, one order saves none."""
    net, sizes = Network.parse("ab,bc,cd->ad"), {"a": 2, "b": 3, "c": 4, "d": 5}
    plan = tnmoe.plan(net, sizes=sizes, objective=("saved", "flops"), input_gradients=False)
    text = tnmoe.explain(plan)
    # (ab·bc)·cd: 2·2·3·4 + 2·2·4·5 = 128; ab·(bc·cd): 2·3·4·5 + 2·2·3·5 = 180, which is 1.41 times as much
    assert "ab · (bc · cd), costs 1.41 times as much (in criterion 2, flops)" in text
    weighted = Network.parse("ab,bc,cd->ad", weights="ab cd")
    text = tnmoe.explain(tnmoe.plan(weighted, sizes=sizes, objective="saved", input_gradients=False))
    assert "(ab · bc) · cd, costs 8 more, where it costs none" in text


@pytest.mark.parametrize(
    ("given", "calls", "text"),
    [
        ("flops", None, "flops"),
        ("saved,flops", None, "saved, flops"),
        (["saved", {"flops": 2.5}], None, "saved, 2.5*flops"),
        ({"training": 1.0, "saved": 1e-3}, None, "training + 0.001*saved"),
        ("training+1/3 * saved", None, "training + 1/3*saved"),
        ("inference", 7, "inference(7)"),
        (("inference", "saved"), 7, "inference(7), saved"),
    ],
)
def test_text_of_an_objective(given: Any, calls: int | None, text: str) -> None:
    objective = as_objective(given, calls)
    assert str(objective) == text
    assert as_objective(text) == objective
    assert as_objective(objective) is objective


@pytest.mark.parametrize(
    ("given", "calls", "message"),
    [
        ("speed", None, "unknown objective 'speed'"),
        ({"training": -1}, None, "a weight must be"),
        ({"training": float("nan")}, None, "must be a number"),
        ({"training": 0}, None, "a weight must be"),
        ({"training": "2"}, None, "must be a number"),
        ({"saved": 1e-30}, None, "a weight must be"),
        ({}, None, "unknown objective"),
        ([], None, "unknown objective"),
        ([["flops"]], None, "a list of objectives"),
        ({3: 1}, None, "unknown objective 3"),
        ("flops + flops", None, "twice"),
        ("flops, macs, saved, training, flops", None, "up to 4"),
        ("flops(3)", None, "only 'inference'"),
        ("inference(0)", None, "calls must be"),
        ("flops", 3, "calls goes with"),
        ("inference", 0, "calls must be"),
        ("inference", True, "calls must be"),
        ("inference", 2.5, "calls must be"),
        ("", None, "unknown objective"),
        ("flops,", None, "unknown objective"),
        ("1/0*flops", None, "a weight must be"),
        ("9" * 5000 + "*flops", None, "a weight must be"),
    ],
)
def test_faulty_objectives_are_refused(given: Any, calls: Any, message: str) -> None:
    with pytest.raises(tnmoe.PlanError, match=message):
        tnmoe.plan(Network.parse("ab,bc->ac"), sizes={"a": 2, "b": 3, "c": 4}, objective=given, calls=calls)
