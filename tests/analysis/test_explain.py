"""Explanations: the ranking of orders, the exact token thresholds, and what is said of them."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from support.all_trees import all_trees
from support.cases import blocks, case, seeds
from support.networks import random_network

import tnmoe
from tnmoe.costing.objective import as_objective
from tnmoe.costing.prices import price
from tnmoe.ir.path import ContractionPath
from tnmoe.lowering.lower import lower_network
from tnmoe.planners import ranked, subset_dp


@pytest.mark.parametrize("objective", ["flops", "training", "saved"])
@pytest.mark.parametrize("seed", seeds(60, 6))
def test_ranking_is_that_of_all_trees(objective: str, seed: int) -> None:
    """The k cheapest prices, of random networks of 3 to 5 tensors, are the k smallest of all their trees."""
    rng, minimised = random.Random(seed), as_objective(objective)
    network, sizes = random_network(rng, 3 + seed % 3)
    plan = tnmoe.plan(network, sizes=sizes, objective=objective)
    (node,) = plan.layer.contractions
    requires_grad = plan.layer.gradient_names(plan.input_gradients) if objective != "flops" else frozenset()
    leaves = {t.name for t in network.leaves}

    def cost(path: ContractionPath) -> int:
        return price(lower_network(node, path), sizes, minimised, requires_grad, leaves)

    every = sorted(cost(path) for path in all_trees(len(network.tensors)))
    found = ranked.plan(network, sizes, minimised, requires_grad, count=6)
    assert [r.price for r in found] == every[:6]
    assert [cost(r.path) for r in found] == every[:6]
    assert cost(plan.paths["result"]) == every[0]


def test_ranking_refuses_large_networks() -> None:
    network = tnmoe.Network.parse(",".join("abcdefghijkl"[k : k + 2] for k in range(11)) + "->al")
    with pytest.raises(tnmoe.PlanError, match="10 tensors"):
        ranked.plan(network, dict.fromkeys(network.indices, 2))


def ring(tokens: int) -> tnmoe.Plan:
    """Threshold and saving derived by hand below: N = 4, I = 768, O = 1000, ranks 4, 32, 64."""
    spec = tnmoe.MuMoE(768, 1000, 4, tnmoe.TensorRing((4, 32, 64)), bias=False)
    return tnmoe.plan(spec, tokens=tokens)


def test_threshold_of_a_ring_by_hand() -> None:
    """Fusing the expert core with the input core pays above 31.7 tokens.

    Gate with expert core, input with its core, their product: 4·4·32 + 768·32·64 + 4·32·64 MACs a token. Fused:
    4·4·32·768·64 once, then x with it, 768·4·4·64, and the gate, 4·4·64, a token.
    """
    apart = 4 * 4 * 32 + 768 * 32 * 64 + 4 * 32 * 64
    once, fused = 4 * 4 * 32 * 768 * 64, 768 * 4 * 4 * 64 + 4 * 4 * 64
    threshold = Fraction(once, apart - fused)
    assert round(float(threshold), 1) == 31.7
    below, above = tnmoe.token_range(ring(1), "y"), tnmoe.token_range(ring(64), "y")
    assert below.high == threshold == above.low
    assert below.low == 1
    assert above.high is None
    assert ring(31).paths["y"] != ring(32).paths["y"]
    assert ring(32).paths["y"].steps == above_path(below)
    ratio = (apart + 4 * 64 * 1000) / (fused + 4 * 64 * 1000)
    assert round(ratio, 2) == 1.76


def above_path(found: tnmoe.TokenRange) -> tuple[tuple[int, int], ...]:
    assert found.above is not None
    return found.above.steps


@pytest.mark.parametrize("block", blocks(40, of=10))
def test_ranges_are_exact_on_random_layers(block: range) -> None:
    """Inside the range no order is cheaper than the plan's, and just beyond its ends one is: random rings."""
    changes = 0
    for seed in block:
        with case(seed) as rng:
            levels = rng.randint(1, 2)
            ranks = [rng.randint(1, 40) for _ in range(levels + 2)]
            experts = [rng.randint(2, 8) for _ in range(levels)]
            spec = tnmoe.MuMoE(rng.randint(4, 90), rng.randint(4, 90), experts, tnmoe.TensorRing(ranks))
            plan = tnmoe.plan(spec, tokens=rng.choice([1, 8, 64, 512]), objective=rng.choice(["flops", "training"]))
            (node,) = (n for n in plan.layer.contractions if n.out.name == "y")
            requires_grad = (
                plan.layer.gradient_names(plan.input_gradients) if plan.objective == "training" else frozenset()
            )
            leaves = {t.name for t in node.network.leaves}

            def gap(tokens: int, plan=plan, node=node, requires_grad=requires_grad, leaves=leaves) -> int:
                """What the plan's order costs more than the best at so many tokens."""
                sizes = plan.layer.bound_sizes({**plan.values, "T": tokens})
                best = subset_dp.plan(node.network, sizes, plan.minimised, requires_grad & leaves)
                mine, other = (
                    price(lower_network(node, p), sizes, plan.minimised, requires_grad & leaves, leaves)
                    for p in (plan.paths["y"], best)
                )
                return mine - other

            found = tnmoe.token_range(plan, "y")
            low, high = -(-found.low.numerator // found.low.denominator), found.high
            assert low <= plan.values["T"]
            assert gap(low) == 0
            if low > 1:
                assert gap(low - 1) > 0
                changes += 1
            if high is None:
                assert gap(1 << 40) == 0
            else:
                last = high.numerator // high.denominator
                assert gap(last) == 0
                assert gap(last + 1) > 0
                changes += 1
    assert changes > 2


@pytest.mark.slow
def test_sentences() -> None:
    text = tnmoe.explain(ring(1))
    assert "y = ((coefficients · expert_core) · (x · input_core)) · output_core." in text
    assert "above 31.7 tokens" in text
    assert "The next best order" in text
    cp = tnmoe.explain(tnmoe.plan(tnmoe.MuMoE(768, 1000, 128, tnmoe.CP(354))))
    assert "The order is the same for any number of tokens." in cp
    assert "only one order" in tnmoe.explain(tnmoe.plan(tnmoe.Linear(3, 4)))
    greedy = tnmoe.plan(tnmoe.MuMoE(8, 9, (2, 2, 2, 2, 2), tnmoe.CP(3)))
    assert "runner-up is not searched" in tnmoe.explain(greedy)
    net = tnmoe.Network.parse("ab,bc,cd->ad")
    assert "The next best order" in tnmoe.explain(tnmoe.plan(net, sizes={"a": 2, "b": 3, "c": 4, "d": 5}))


def test_what_has_no_range_is_refused() -> None:
    net = tnmoe.plan(tnmoe.Network.parse("ab,bc->ac"), sizes={"a": 2, "b": 3, "c": 4})
    with pytest.raises(tnmoe.PlanError, match="no tokens"):
        tnmoe.token_range(net, "result")
    greedy = tnmoe.plan(tnmoe.MuMoE(8, 9, 4, tnmoe.CP(3)), planner="greedy")
    with pytest.raises(tnmoe.PlanError, match="not proven"):
        tnmoe.token_range(greedy, "y")
