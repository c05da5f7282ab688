"""Advice: the exact threshold of folding, recomputations at published prices, and what is copied."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
from support.all_trees import all_trees
from support.cases import case
from support.inference import Inference
from support.networks import random_network

import tnmoe
from tnmoe.analysis.advice import folding
from tnmoe.ir.network import Network, components
from tnmoe.presets.registry import PRESETS

trees = cache(all_trees)

HIERARCHICAL = Network.parse("bn,nx,bi,iy,oz,xyt,tz->bo", weights="nx iy oz xyt tz")
SIZES = {"b": 1, "n": 256, "x": 64, "i": 768, "y": 256, "o": 3072, "z": 256, "t": 64}


def test_threshold_of_folding_is_that_of_all_trees() -> None:
    """200 random networks: the fewest calls in which some tree that folds costs as much as the best without."""
    within = never = 0
    for trial in range(200):
        with case(trial) as rng:
            network, sizes = random_network(rng, 3 + trial % 2 + (trial % 12 == 1))
            oracle = Inference(network, sizes)
            works = [oracle.work(path) for path in trees(len(network.tensors))]
            plain = [each for each, once in works if not once]
            found = folding(network, sizes)
            if not plain:  # every tree makes something of weights alone
                assert found is None
                continue
            crossings = [Fraction(once, min(plain) - each) for each, once in works if once and each < min(plain)]
            threshold = min(crossings, default=None)
            if threshold is None or threshold <= 1:
                assert found is None
                never += 1
                continue
            assert found is not None
            assert found.calls == threshold
            assert oracle.work(found.path) == (found.each, found.once)
            assert found.unfolded == min(plain)
            within += 1
    assert within > 10
    assert never > 10


def test_hierarchical_tucker_by_hand() -> None:
    """Output factor times transfer matrix, 2·64·256·3072 once, spares 2·(64·256 + 256·3072 - 64·3072) a token."""
    once, spared = 2 * 64 * 256 * 3072, 2 * (64 * 256 + 256 * 3072 - 64 * 3072)
    found = folding(HIERARCHICAL, SIZES)
    assert found is not None
    assert found.calls == Fraction(once, spared)
    assert int(found.calls) == 83
    assert [round(flops / 1e6, 2) for flops in (found.unfolded, found.each)] == [4.14, 2.92]


def test_folds_in_sentences() -> None:
    plain = tnmoe.explain(tnmoe.plan(HIERARCHICAL, sizes=SIZES))
    assert "less often than every 84 calls, folding pays: ((bn · nx) · ((bi · iy) · xyt)) · (oz · tz)" in plain
    assert "takes 100,663,296 FLOPs once and then 2,924,544 instead of 4,136,960 a call" in plain
    folded = tnmoe.explain(tnmoe.plan(HIERARCHICAL, sizes=SIZES, objective="inference", calls=84))
    assert "Weights alone make result_partial_4: 100,663,296 FLOPs" in folded
    ring = tnmoe.MuMoE(768, 1000, 4, tnmoe.TensorRing((4, 32, 64)), bias=False)
    assert "less often than every 31.7 tokens, folding pays" in tnmoe.explain(tnmoe.plan(ring, tokens=1))
    assert "less often than every 31.7 tokens, folding pays" in tnmoe.explain(tnmoe.plan(ring, tokens=16))
    cp = tnmoe.explain(tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=4))
    assert cp.count("No product of weights alone pays, however rarely they change.") == 2


def test_recomputations_at_published_prices() -> None:
    """GPT-2's CP block, 4096 tokens, 26.1 MiB saved: 17.4 at +0.004 % FLOPs, 8.7 at +2.1 %, none at +8.3 %."""
    text, _, _ = tnmoe.explain(tnmoe.plan(PRESETS["gpt2-cp"].spec, tokens=4096)).partition("\n\n")
    said = text[text.index("Trained at the least cost") :]
    for mebibytes, price in ((17.4, "0.0041"), (8.7, "2.1"), (0, "8.3")):
        (offer,) = (part for part in said.split("; ") if f"at {price} % more FLOPs" in part)
        elements = int(offer.removeprefix("or ").split()[0].replace(",", ""))
        assert abs(4 * elements / 2**20 - mebibytes) < 0.05
    assert "6,832,128 elements are saved" in said  # 26.1 MiB


@pytest.mark.parametrize("objective", ["inference", "training"])
def test_only_what_is_trained_is_told_of_recomputation(objective: str) -> None:
    ring = tnmoe.MuMoE(12, 14, 3, tnmoe.TensorRing((2, 3, 4)))
    text = tnmoe.explain(tnmoe.plan(ring, tokens=8, objective=objective))
    assert ("Trained at the least cost" in text) == (objective == "training")


def test_copies_in_sentences() -> None:
    dense = tnmoe.DenseMoE(24, 160, 40, 4)
    text = tnmoe.explain(tnmoe.plan(dense, tokens=8))
    assert "6,400 elements are copied into another order of axes: activated to [n t h] (5,120), " in text
    assert "The objective 'layout' finds 0 at" in text
    assert "Nothing is copied" in tnmoe.explain(tnmoe.plan(dense, tokens=8, objective="layout"))
    stored = tnmoe.explain(tnmoe.plan(tnmoe.MuMoE(12, 14, 3, tnmoe.TensorRing((2, 3, 4))), tokens=8))
    assert "so that no step copies them: expert_core[n r1 r2], input_core[i r2 r3]" in stored


def test_a_limited_plan_is_explained_without_a_range() -> None:
    spec = tnmoe.MuMoEBlock(12, 30, 12, 4, tnmoe.TensorRing((16, 16, 2)), tnmoe.Gate("softmax", "none"))
    plan = tnmoe.plan(spec, tokens=16, objective="training", saved_limit=7000)
    assert "with at most 7,000 elements saved" in str(plan)
    assert tnmoe.Plan.from_json(plan.to_json()).saved_limit == 7000
    assert "It is not the best: it costs" in tnmoe.explain(plan)
    with pytest.raises(tnmoe.PlanError, match="not proven"):
        tnmoe.token_range(plan, "y")


def test_disconnected_networks_are_planned_with_a_note() -> None:
    net, sizes = Network.parse("ab,cd,bc,ef,g->aedg"), dict(zip("abcdefg", range(2, 9), strict=True))
    assert components(net) == (("ab", "cd", "bc"), ("ef",), ("g",))
    plan = tnmoe.plan(net, sizes=sizes)
    for text in (str(plan), tnmoe.explain(plan)):
        assert "3 parts share no index, so outer products join them: ab, cd, bc; ef; g." in text.replace("\n", " ")
    connected = tnmoe.plan(tnmoe.MuMoE(4, 5, 3, tnmoe.CP(2)))
    assert "outer product" not in str(connected) + tnmoe.explain(connected)


def test_parts_are_those_of_a_search_along_shared_indices() -> None:
    """300 random networks, scalars included: two tensors are in one part if a chain of shared indices joins them."""
    several = 0
    for trial in range(300):
        with case(trial) as rng:
            network, _ = random_network(rng, rng.randint(1, 6))
            found = components(network)
            assert sorted(name for part in found for name in part) == sorted(t.name for t in network.tensors)
            for part in found:
                reached, ahead = {part[0]}, [part[0]]
                while ahead:
                    here = set(network.tensor(ahead.pop()).indices)
                    near = [t.name for t in network.tensors if here & set(t.indices) and t.name not in reached]
                    reached |= set(near)
                    ahead += near
                assert reached == set(part)
            several += len(found) > 1
    assert several > 20
