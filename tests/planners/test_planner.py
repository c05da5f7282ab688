"""Planners find valid paths, the exact one the cheapest; plans survive JSON, and faulty ones are refused.

Costs are judged by `Oracle`, which prices a step by hand from index sets and knows nothing of the package; the
optimum comes from trying every order, from opt_einsum, from a textbook, or from arithmetic on paper.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cotengra as peer
import numpy as np
import opt_einsum
import pytest
from support.cases import blocks, case, seeds
from support.networks import Sizes, einsum, random_arrays, random_folded_network, random_network
from support.trees import Indices, Oracle, Steps, every_tree, folded, value

import tnmoe
from tnmoe import (
    CP,
    MLP,
    DeclarationError,
    Dense,
    DenseMoE,
    Gate,
    Linear,
    MuMoE,
    MuMoEBlock,
    Network,
    Plan,
    PlanError,
    Role,
    SparseMoE,
    Tensor,
    TensorRing,
)
from tnmoe.costing.objective import MACS, PEAK
from tnmoe.ir.layer import network_layer
from tnmoe.ir.path import ContractionPath
from tnmoe.planners import cotengra, greedy, subset_dp
from tnmoe.planners import opt_einsum as opt_einsum_planner
from tnmoe.planners.pairs import pairwise

PLANNERS = ("subset_dp", "greedy", "cotengra", "opt_einsum")

OBJECTIVES = ("flops", "macs")


def describe(network: Network, sizes: Mapping[str, int], seed: object) -> str:
    return f"{network.expression} {dict(sizes)} (seed {seed})"


def given_path(network: Network, sizes: Mapping[str, int], steps: Steps) -> Plan:
    """A plan of a bare network in an order of the test's choice."""
    layer = network_layer(network, dict(sizes))
    return Plan(layer, {layer.output.name: ContractionPath(steps)}, dict(sizes))


# ---- the generator ---------------------------------------------------------------------------------------------


def test_the_generator_draws_every_kind_of_network() -> None:
    """The comparisons below would say little if the hard cases were never drawn."""
    seen: Counter[str] = Counter()
    for seed in range(300):
        network, sizes = random_network(random.Random(seed), 3 + seed % 4)
        terms = [set(t.indices) for t in network.tensors]
        count = Counter(i for term in terms for i in term)
        shared = {i for i, n in count.items() if n > 1}
        seen["hyperedge"] += any(n > 2 for n in count.values())
        seen["batch"] += bool(shared & set(network.output))
        seen["private"] += any(n == 1 and i not in network.output for i, n in count.items())
        seen["scalar"] += any(not term for term in terms)
        seen["alone"] += any(not term & shared for term in terms)
        seen["size one"] += 1 in sizes.values()
        seen["scalar output"] += not network.output
    assert min(seen.values()) >= 10, seen
    assert len(seen) == 7


# ---- the exact planner is exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks(130, of=26))
@pytest.mark.parametrize("tensors", [3, 4, 5, 6])
def test_exact_planner_equals_the_best_tree(tensors: int, block: range) -> None:
    """On 520 networks: path priced by hand = program's cost = optimum, under both objectives."""
    for seed in block:
        with case("best", tensors, seed) as rng:
            network, sizes = random_network(rng, tensors)
            oracle = Oracle(network, sizes)
            best = oracle.optimum()
            for which, objective in enumerate(OBJECTIVES):
                planned = tnmoe.plan(network, sizes=sizes, objective=objective, planner="subset_dp")
                where = f"{objective}: {describe(network, sizes, seed)}"
                assert planned.exact
                assert oracle.path(planned.path) == (planned.flops, planned.macs), where
                assert (planned.flops, planned.macs)[which] == best[which], where


@pytest.mark.parametrize("block", blocks(30, of=10))
@pytest.mark.parametrize("tensors", [3, 4, 5, 6])
def test_exact_planner_equals_the_best_of_all_orders_without_memory(tensors: int, block: range) -> None:
    """Dynamic programming assumes that a subset's best tree does not depend on the rest; here nothing is assumed."""
    for seed in block:
        with case("all", tensors, seed) as rng:
            network, sizes = random_network(rng, tensors)
            best = Oracle(network, sizes).enumerated()
            for which, objective in enumerate(OBJECTIVES):
                planned = tnmoe.plan(network, sizes=sizes, objective=objective, planner="subset_dp")
                assert (planned.flops, planned.macs)[which] == best[which], describe(network, sizes, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "count"), [(3, 200), (4, 200), (5, 200), (6, 200), (7, 120), (8, 50), (9, 30)])
def test_exact_planner_equals_opt_einsum_under_macs(tensors: int, count: int) -> None:
    """opt_einsum sums private indices for free and counts one product per step, as our MACs do.

    A tensor without an index that is shared or kept is a scalar to it, and multiplies the result at the end, which is
    never better (`Ay,g,m->myA`: 160 against 84); such networks may differ, and are not counted among the 1,000.
    """
    compared = 0
    for seed in itertools.count(1):
        if compared == count:
            break
        with case("peer", tensors, seed) as rng:
            network, sizes = random_network(rng, tensors)
            oracle = Oracle(network, sizes)
            paths = [plan(network, sizes, MACS) for plan in (subset_dp.plan, opt_einsum_planner.plan)]
            for path in paths:
                path.check(tensors)
            ours, theirs = (oracle.path(path.steps)[1] for path in paths)
            leaves = oracle.leaves
            others = [frozenset(network.output).union(*leaves[:k], *leaves[k + 1 :]) for k in range(tensors)]
            if all(leaf & other for leaf, other in zip(leaves, others)):
                assert ours == theirs, describe(network, sizes, seed)
                compared += 1
            assert ours <= theirs, describe(network, sizes, seed)


def test_opt_einsum_planner_is_the_exact_one_by_default() -> None:
    """The comparison above is with DynamicProgramming(minimize="flops", search_outer=True), called directly here."""
    network, sizes = random_network(random.Random(7), 6, connected=True)
    shapes = [tuple(sizes[i] for i in t.indices) for t in network.tensors]
    algorithm = opt_einsum.DynamicProgramming(minimize="flops", search_outer=True)
    direct, _ = opt_einsum.contract_path(network.expression, *shapes, shapes=True, optimize=algorithm)
    steps = tuple(tuple(s) for s in opt_einsum.paths.linear_to_ssa(direct) if len(s) == 2)
    assert len(opt_einsum_planner.plan(network, sizes).steps) == len(steps) == 5
    assert opt_einsum_planner.plan(network, sizes) == opt_einsum_planner.plan(network, sizes, algorithm=algorithm)


@pytest.mark.parametrize("length", [2, 5, 8, 11, 12])
def test_matrix_chains_equal_the_textbook(length: int) -> None:
    """The interval recurrence m(i, j) = min_k m(i, k) + m(k, j) + d_i d_k d_j (CLRS, section 14.2)."""
    rng = random.Random(length)
    dims = [rng.randint(2, 60) for _ in range(length + 1)]
    best = {(k, k + 1): 0 for k in range(length)}
    for width in range(2, length + 1):
        for i in range(length - width + 1):
            j = i + width
            best[i, j] = min(best[i, k] + best[k, j] + dims[i] * dims[k] * dims[j] for k in range(i + 1, j))
    letters = "abcdefghijklm"[: length + 1]
    terms = [letters[k : k + 2] for k in range(length)]
    rng.shuffle(terms)  # the order in which the tensors are written is no hint
    network = Network.parse(",".join(terms) + "->" + letters[-1] + letters[0])
    planned = tnmoe.plan(network, sizes=dict(zip(letters, dims)), objective="macs", planner="subset_dp")
    assert planned.macs == best[0, length]
    assert planned.flops == 2 * planned.macs


@pytest.mark.parametrize("seed", seeds(15, 2))
@pytest.mark.parametrize("tensors", [4, 6, 8])
def test_the_optimum_does_not_depend_on_names_or_order(tensors: int, seed: int) -> None:
    rng = random.Random(f"order {tensors} {seed}")
    network, sizes = random_network(rng, tensors)
    other = Network(
        tuple(
            Tensor(f"v{k}", tuple(f"index_{i}" for i in rng.sample(t.indices, len(t.indices))))
            for k, t in enumerate(rng.sample(network.tensors, tensors))
        ),
        tuple(f"index_{i}" for i in rng.sample(network.output, len(network.output))),
    )
    for objective in OBJECTIVES:
        one = tnmoe.plan(network, sizes=sizes, objective=objective)
        two = tnmoe.plan(other, sizes={f"index_{i}": n for i, n in sizes.items()}, objective=objective)
        assert getattr(one, objective) == getattr(two, objective), describe(network, sizes, seed)


# ---- numbers derived by hand -----------------------------------------------------------------------------------


def test_matrix_chain_of_the_textbook() -> None:
    """CLRS (3rd edition), section 15.2: dimensions 30, 35, 15, 5, 10, 20, 25 need 15,125 scalar multiplications."""
    network = Network.parse("ab,bc,cd,de,ef,fg->ag")
    planned = tnmoe.plan(network, sizes=dict(zip("abcdefg", (30, 35, 15, 5, 10, 20, 25))), objective="macs")
    assert planned.macs == 15_125
    assert planned.flops == 30_250
    # ((A1 (A2 A3)) ((A4 A5) A6)), as printed there
    assert {frozenset(s) for s in planned.path[:1]} <= {frozenset({1, 2}), frozenset({3, 4})}


def test_outer_product_first() -> None:
    """a, b, abc -> c with a = b = 2, c = 100: the outer product first costs 4 + 400, one by one 400 + 200."""
    planned = tnmoe.plan(Network.parse("a,b,abc->c"), sizes={"a": 2, "b": 2, "c": 100}, objective="macs")
    assert planned.macs == 404
    assert planned.flops == 4 + 800  # nothing is summed in an outer product
    assert planned.path[0] in ((0, 1), (1, 0))


def test_the_objectives_differ() -> None:
    """Hadamard and outer products cost one FLOP per MAC, sums two, so the cheapest orders differ.

    a, d, abd -> b with a = 5, b = d = 3.
    Outer product first: 15 + 45 = 60 MAC, 15 + 90 = 105 FLOP.
    One by one, a first: 45 +  9 = 54 MAC, 90 + 18 = 108 FLOP.
    """
    network, sizes = Network.parse("a,d,abd->b"), {"a": 5, "b": 3, "d": 3}
    by_flops = tnmoe.plan(network, sizes=sizes, objective="flops")
    by_macs = tnmoe.plan(network, sizes=sizes, objective="macs")
    assert (by_flops.macs, by_flops.flops) == (60, 105)
    assert (by_macs.macs, by_macs.flops) == (54, 108)


def test_a_private_index_is_summed_first() -> None:
    """ij, jk -> k: the sum over i costs 2·3 FLOP and no MAC, then j: 3·4 MAC and twice as many FLOP."""
    planned = tnmoe.plan(Network.parse("ij,jk->k"), sizes={"i": 2, "j": 3, "k": 4})
    assert (planned.macs, planned.flops) == (12, 6 + 24)


def test_cp_layer() -> None:
    """CP: R(N + I + O) MAC a token, and R Hadamard products."""
    # T = 10, N = 3, I = 4, O = 5, R = 2: 10 · 2 · (3 + 4 + 5) = 240 MAC that are summed, and 10 · 2 products.
    network = Network.parse("tn,ti,nr,ir,or->to")
    sizes = {"t": 10, "n": 3, "i": 4, "o": 5, "r": 2}
    planned = tnmoe.plan(network, sizes=sizes)
    assert (planned.macs, planned.flops) == (240 + 20, 480 + 20)
    # The layer with its gate and bias: T·I·N = 120 MAC for the logits, one addition for each of T·R entries, and
    # a softmax of 5 operations on each of T·N entries.
    layer = MuMoE(4, 5, 3, CP(2), Gate("softmax", "none"), bias=True)
    planned = tnmoe.plan(layer, tokens=10)
    assert (planned.macs, planned.flops) == (120 + 260, 240 + 500 + 20 + 150)


def test_tensor_ring_of_two_levels_is_a_matrix_chain() -> None:
    """The reference's fixed order, from left to right, is not the best one.

    Ring r1 n1 r2 | r2 n2 r3 | r3 i r4 | r4 o r1 with N1 = N2 = 4, I = O = 6, r = (3, 2, 4, 2), and T = 8 tokens.
    Every order meets each core with its data first; per token that is
        r1 N1 r2 + r2 N2 r3 + r3 I r4 + r4 O r1 = 24 + 32 + 48 + 36 = 140 MAC, the last one closing the ring.
    Between them the three matrices A1 (r1 × r2), A2 (r2 × r3), B (r3 × r4) are a chain:
        (A1 A2) B: r1 r2 r3 + r1 r3 r4 = 24 + 24 = 48 MAC, the reference's order,
        A1 (A2 B): r2 r3 r4 + r1 r2 r4 = 16 + 12 = 28 MAC.
    So 8 · 188 = 1,504 MAC against 8 · 168 = 1,344. All of it is summed: twice as many FLOP.
    """
    network = Network.parse("tn,tm,ti,anb,bmc,cid,doa->to", weights="anb bmc cid doa")
    sizes = {"t": 8, "n": 4, "m": 4, "i": 6, "o": 6, "a": 3, "b": 2, "c": 4, "d": 2}
    reference: Steps = ((0, 3), (1, 4), (2, 5), (7, 8), (10, 9), (11, 6))
    assert Oracle(network, sizes).path(reference) == (3_008, 1_504)
    assert given_path(network, sizes, reference).macs == 1_504
    for objective in OBJECTIVES:
        planned = tnmoe.plan(network, sizes=sizes, objective=objective)
        assert (planned.flops, planned.macs) == (2_688, 1_344)
        assert Oracle(network, sizes).path(planned.path) == Oracle(network, sizes).optimum() == (2_688, 1_344)
    # The declared layer, without a bias, holds this very network beside the two logits (8 · 6 · 4 MAC each).
    layer = MuMoE(6, 6, (4, 4), TensorRing((3, 2, 4, 2)), Gate("softmax", "none"), bias=False)
    assert tnmoe.plan(layer, tokens=8).macs == 2 * 192 + 1_344


def test_published_figures_of_a_gpt2_block() -> None:
    """32 tokens through 768 → 3072 → 768 with 256 experts; matmul FLOPs, the reference with its bias row in them.

    CP, R = 556: 304,158,208 FLOP and 35,584 = 2 · 32 · 556 Hadamard products; TR, r = (4, 4, 149): 306,434,560.
    The reference multiplies the bias as one more row, 2 · 32 · R or 2 · 32 · r2 · r3 FLOP a layer; here it is added.
    """
    gate = Gate("entmax15", "layer")
    for factorization, published, row in (
        (CP(556), 304_158_208, 556),
        (TensorRing((4, 4, 149)), 306_434_560, 4 * 149),
    ):
        planned = tnmoe.plan(MuMoEBlock(768, 3072, 768, 256, factorization, gate, input_norm=True), tokens=32)
        report = tnmoe.cost(planned)
        assert report.matmul_flops == published - 2 * (2 * 32 * row)
    cp = tnmoe.plan(MuMoEBlock(768, 3072, 768, 256, CP(556), gate), tokens=32)
    assert 2 * cp.macs - tnmoe.cost(cp).matmul_flops == 2 * 35_584


# ---- folded bias -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """An operand with a folded bias, as index sets: the slice `extra` is None while it is all ones."""

    main: Indices
    open: bool = False
    extra: Indices | None = None


def folded_flops(network: Network, sizes: Mapping[str, int], steps: Steps) -> int:
    """FLOPs of a path with a folded bias, by hand.

    While the folded index is open, each product is taken of the matrix and of the slice (the bias row, or a row of
    ones, whose product with a tensor is that tensor, summed where nobody needs it). Closing it adds the slice.
    """
    bias = network.bias
    assert bias is not None
    oracle, output = Oracle(network, sizes), frozenset(network.output)
    live = {
        k: Folded(
            frozenset(t.indices),
            t.name in (bias.data, bias.weight),
            frozenset(bias.tensor.indices) if t.name == bias.weight else None,
        )
        for k, t in enumerate(network.tensors)
    }
    total = 0
    for k, (i, j) in enumerate(steps):
        a, b = live.pop(i), live.pop(j)
        needed = output.union(*(o.main for o in live.values()))
        flops, _, main = oracle.step(a.main, b.main, needed | ({bias.index} if a.open != b.open else set()))
        extra: Indices | None = None
        if a.open or b.open:
            slices = [o.extra if o.open else o.main for o in (a, b)]
            given = [s for s in slices if s is not None]
            if len(given) == 2:
                more, _, extra = oracle.step(given[0], given[1], needed)
            else:
                extra = given[0] & needed
                more = oracle.volume(given[0]) if given[0] != extra else 0
            flops += more
        if a.open and b.open:
            flops, extra = flops + oracle.volume(main), None
        total += flops
        live[len(network.tensors) + k] = Folded(main, a.open != b.open, extra)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "count"), [(2, 25), (3, 60), (4, 30), (5, 4)])
def test_folded_bias_in_every_order(tensors: int, count: int) -> None:
    """Every tree computes the concatenated einsum, costs what the hand says, and none costs less than ours."""
    last = outer = summed = 0
    for seed in range(count):
        with case("bias", tensors, seed) as rng:
            network, sizes = random_folded_network(rng, tensors)
            assert network.bias is not None
            where = describe(network, sizes, seed)
            arrays = random_arrays(network, sizes, seed)
            expected = einsum(network, arrays)
            data = next(k for k, t in enumerate(network.tensors) if t.name == "x")
            kept = set(network.output)
            summed += any(i != "f" and i not in kept for i in network.tensors[data].indices)
            costs: list[int] = []
            for tree in every_tree(tensors):
                steps = tuple((j, i) if rng.random() < 0.5 else (i, j) for i, j in tree)
                last += tensors > 2 and data in steps[-1]
                if data in steps[0]:
                    (other,) = set(steps[0]) - {data}
                    outer += not set(network.tensors[data].indices) & set(network.tensors[other].indices)
                planned = given_path(network, sizes, steps)
                np.testing.assert_allclose(
                    value(planned, arrays), expected, rtol=1e-10, atol=1e-10, err_msg=f"{where} {steps}"
                )
                costs.append(planned.flops)
                assert planned.flops == folded_flops(network, sizes, steps), f"{where} {steps}"
            best = tnmoe.plan(network, sizes=sizes, planner="subset_dp")
            assert best.flops == min(costs), where
            np.testing.assert_allclose(value(best, arrays), expected, rtol=1e-10, atol=1e-10, err_msg=where)
    assert summed
    if tensors > 2:
        assert last
        assert outer


@pytest.mark.parametrize("block", blocks(40, of=10, quick=1))
def test_folded_bias_under_macs(block: range) -> None:
    """The slices' products count as MACs too; the planner weighs them, whichever objective it has."""
    for seed in block:
        with case("macs", seed) as rng:
            network, sizes = random_folded_network(rng, 4)
            macs = min(given_path(network, sizes, steps).macs for steps in every_tree(4))
            assert tnmoe.plan(network, sizes=sizes, objective="macs").macs == macs, describe(network, sizes, seed)


@pytest.mark.parametrize("planner", PLANNERS)
def test_folded_bias_with_every_planner(planner: str) -> None:
    for seed in range(20):
        with case("planner", seed) as rng:
            network, sizes = random_folded_network(rng, 2 + seed % 5)
            arrays = random_arrays(network, sizes, seed)
            planned = tnmoe.plan(network, sizes=sizes, planner=planner)
            np.testing.assert_array_equal(
                value(planned, arrays), einsum(network, arrays), describe(network, sizes, seed)
            )


def test_folded_bias_by_hand() -> None:
    """t = 3, i = 4, o = 5: 60 MAC, and 15 additions; then with a scale s of the rows, in two orders."""
    planned = tnmoe.plan(folded("ti,io->to", "ti", "io", "i"), sizes={"t": 3, "i": 4, "o": 5})
    assert (planned.macs, planned.flops) == (60, 120 + 15)
    scaled, sizes = folded("ti,io,t->to", "ti", "io", "i"), {"t": 3, "i": 4, "o": 5}
    # ((ti io) t): 120 + 15 to close, and 15 products.
    assert given_path(scaled, sizes, ((0, 1), (3, 2))).flops == 120 + 15 + 15
    # ((ti t) io): 12 products, the ones become t itself; 120; the outer product of t and the bias 15; 15 additions.
    assert given_path(scaled, sizes, ((0, 2), (3, 1))).flops == 12 + 120 + 15 + 15
    # ((io t) ti): tio 60 and to 15 products; the sum 120; 15 additions.
    assert given_path(scaled, sizes, ((1, 2), (3, 0))).flops == 60 + 15 + 120 + 15
    assert tnmoe.plan(scaled, sizes=sizes).flops == 150


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factorization", [CP(3), TensorRing((2, 3, 2)), Dense()], ids=lambda f: f.kind)
def test_declared_layers_are_planned_best(factorization: Any, seed: int) -> None:
    """A real layer, gate and bias included, is as cheap as its best tree when every tree is lowered."""
    rng = random.Random(f"{factorization.kind} {seed}")
    layer = MuMoE(rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9), factorization, Gate("softmax", "none"))
    for objective in OBJECTIVES:
        planned = tnmoe.plan(layer, tokens=rng.randint(1, 9), objective=objective)
        tensors = len(planned.layer.contractions[-1].network.tensors)
        best = min(
            getattr(Plan(planned.layer, {**planned.paths, "y": ContractionPath(steps)}, planned.values), objective)
            for steps in every_tree(tensors)
        )
        assert getattr(planned, objective) == best, (layer, planned.values)


# ---- every planner ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("tensors", [1, 2, 3, 5, 7])
def test_every_planner_gives_a_valid_path(planner: str, tensors: int) -> None:
    """Valid, executed to the einsum's value, priced as by hand, and never cheaper than the exact planner's."""
    for seed in range(25):
        with case("valid", tensors, seed) as rng:
            network, sizes = random_network(rng, tensors, max_size=3)
            where = f"{planner}: {describe(network, sizes, seed)}"
            arrays = random_arrays(network, sizes, seed)
            planned = tnmoe.plan(network, sizes=sizes, objective="macs", planner=planner)
            (path,) = planned.paths.values()
            path.check(tensors)
            assert path.planner == planner
            assert path.exact == (planner == "subset_dp")
            np.testing.assert_array_equal(value(planned, arrays), einsum(network, arrays), where)
            oracle = Oracle(network, sizes)
            assert oracle.path(planned.path) == (planned.flops, planned.macs), where
            if tensors > 1:
                assert planned.macs >= oracle.path(subset_dp.plan(network, sizes, MACS).steps)[1], where


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(
    "expression",
    [
        "->",
        "a->a",
        "a->",
        "abc->cb",
        ",->",
        "a,->a",
        "a,b->ba",
        "ab,cd->",
        "ab,bc->ca",
        "a,a,a->",
        "a,a,a->a",
        "ab,cd,,e->dea",
        "ab,ab,cd,cd->ca",
    ],
)
def test_every_planner_on_odd_networks(planner: str, expression: str) -> None:
    """Scalars, one tensor, sums of one tensor, parts that share nothing, equal tensors."""
    network = Network.parse(expression)
    sizes = {i: 2 + k for k, i in enumerate(network.indices)}
    arrays = random_arrays(network, sizes, 0)
    for objective in OBJECTIVES:
        planned = tnmoe.plan(network, sizes=sizes, objective=objective, planner=planner)
        np.testing.assert_array_equal(value(planned, arrays), einsum(network, arrays))
        assert (planned.flops, planned.macs) == Oracle(network, sizes).path(planned.path)


@pytest.mark.parametrize("planner", PLANNERS)
def test_every_planner_with_the_output_in_any_order(planner: str) -> None:
    network, sizes = Network.parse("tabc,ad,tbe->tcde"), {"t": 2, "a": 3, "b": 2, "c": 1, "d": 4, "e": 3}
    arrays = random_arrays(network, sizes, 1)
    for output in itertools.permutations("tcde"):
        turned = Network(network.tensors, output)
        planned = tnmoe.plan(turned, sizes=sizes, planner=planner)
        assert planned.program.output.indices == output
        np.testing.assert_array_equal(value(planned, arrays), einsum(turned, arrays))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("planner", ["greedy", "cotengra", "search"])
@pytest.mark.parametrize("tensors", [13, 17])
def test_large_networks(planner: str, tensors: int, seed: int) -> None:
    network, sizes = random_network(random.Random(f"large {seed}"), tensors, max_size=2, most=3)
    arrays = random_arrays(network, sizes, seed)
    planned = tnmoe.plan(network, sizes=sizes, planner=planner)
    assert not planned.exact
    assert len(planned.path) == tensors - 1
    np.testing.assert_array_equal(value(planned, arrays), np.einsum(*_interleaved(network, arrays), optimize=True))
    assert (planned.flops, planned.macs) == Oracle(network, sizes).path(planned.path)


def _interleaved(network: Network, arrays: Mapping[str, Any]) -> list[Any]:
    """The arguments of `np.einsum` with numbered indices."""
    number = {i: k for k, i in enumerate(network.indices)}
    operands = [x for t in network.tensors for x in (arrays[t.name], [number[i] for i in t.indices])]
    return [*operands, [number[i] for i in network.output]]


def chain(tensors: int) -> tuple[Network, Sizes]:
    """A matrix chain, the plainest network of any length."""
    names = [f"i{k}" for k in range(tensors + 1)]
    network = Network(tuple(Tensor(f"m{k}", tuple(names[k : k + 2])) for k in range(tensors)), (names[0], names[-1]))
    return network, dict.fromkeys(names, 2)


def test_exact_planner_refuses_large_networks_with_a_remedy() -> None:
    network, sizes = chain(13)
    for plan in (lambda: subset_dp.plan(network, sizes), lambda: tnmoe.plan(network, sizes=sizes, planner="subset_dp")):
        with pytest.raises(PlanError, match=r"up to 12 tensors, this network has 13.*planner='search'"):
            plan()
    assert tnmoe.plan(chain(12)[0], sizes=chain(12)[1]).exact  # 12 is still taken


@pytest.mark.slow
def test_auto_searches_large_networks_and_says_so_without_cotengra(monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes = chain(13)
    assert "not proven optimal (search)" in str(tnmoe.plan(network, sizes=sizes))
    monkeypatch.setattr(cotengra, "INSTALLED", False)
    assert "not proven optimal (search without cotengra)" in str(tnmoe.plan(network, sizes=sizes))


@pytest.mark.parametrize("module", [cotengra, opt_einsum_planner], ids=["cotengra", "opt_einsum"])
def test_an_extra_that_is_missing_names_its_remedy(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(module, name, None)
    with pytest.raises(PlanError, match=rf"pip install 'tnmoe\[{name}\]'"):
        tnmoe.plan(Network.parse("ab,bc->ac"), sizes={"a": 2, "b": 2, "c": 2}, planner=name)


@pytest.mark.parametrize(
    ("path", "tensors", "pairs"),
    [
        ([(0, 1), (2, 3)], 3, ((0, 1), (2, 3))),
        ([(0,), (3, 1), (4, 2)], 3, ((0, 1), (3, 2))),  # tensor 0 is summed on its own, which lowering does anyway
        ([(1,), (0, 3), (2,), (5, 4)], 3, ((0, 1), (2, 3))),
        ([(2, 0, 1)], 3, ((2, 0), (3, 1))),
        ([(0, 1)], 3, ((0, 1), (2, 3))),  # what is left over is multiplied
        ([], 3, ((0, 1), (3, 2))),
        ([(0,)], 1, ()),
    ],
)
def test_paths_of_other_libraries_become_pairs(path: list[tuple[int, ...]], tensors: int, pairs: Steps) -> None:
    assert pairwise(path, tensors) == pairs
    ContractionPath(pairs).check(tensors)


def test_other_algorithms_of_the_extras() -> None:
    """Any optimizer of theirs may be passed on; what it returns is a valid path."""
    ours = {
        "opt_einsum": [opt_einsum_planner.plan, "algorithm", ["optimal", "greedy", "auto", "branch-2"]],
        "cotengra": [cotengra.plan, "optimizer", [peer.GreedyOptimizer(), peer.OptimalOptimizer(minimize="size")]],
    }
    for seed in range(10):
        with case("other", seed) as rng:
            network, sizes = random_network(rng, 5, max_size=3)
            arrays = random_arrays(network, sizes, seed)
            for plan, keyword, choices in ours.values():
                for choice in choices:
                    path = plan(network, sizes, **{keyword: choice})
                    path.check(5)
                    np.testing.assert_array_equal(
                        value(given_path(network, sizes, path.steps), arrays), einsum(network, arrays)
                    )


def test_cotengra_gets_letters_for_indices() -> None:
    """Its Rust core (cotengrust) takes indices of one character only, and is not always installed where tests run."""

    class Core:
        def ssa_path(self, inputs: Any, output: Any, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
            for index in itertools.chain(*inputs, output, sizes):
                if len(index) != 1:
                    raise ValueError("expected a string of length 1")
            assert sorted(sizes.values()) == [2, 3, 4]
            return [(0, 1)]

    network = Network((Tensor("x", ("t", "n1")), Tensor("w", ("n1", "rank"))), ("t", "rank"))
    assert cotengra.plan(network, {"t": 2, "n1": 3, "rank": 4}, optimizer=Core()).steps == ((0, 1),)


def test_unknown_objective_or_planner() -> None:
    network, sizes = chain(3)
    with pytest.raises(PlanError, match=r"unknown objective 'tokens'.*flops, macs"):
        tnmoe.plan(network, sizes=sizes, objective="tokens")
    with pytest.raises(PlanError, match=r"unknown planner 'best'.*auto, subset_dp, greedy, cotengra, opt_einsum"):
        tnmoe.plan(network, sizes=sizes, planner="best")
    for plan in (subset_dp.plan, greedy.plan):
        with pytest.raises(PlanError, match="'peak' is no sum over steps"):
            plan(network, sizes, PEAK)


@pytest.mark.parametrize("seed", range(10))
def test_planning_is_deterministic(seed: int) -> None:
    network, sizes = random_network(random.Random(seed), 7)
    for planner in ("subset_dp", "greedy"):
        once, again = (tnmoe.plan(network, sizes=sizes, planner=planner) for _ in range(2))
        assert once == again
        assert once.to_json() == again.to_json()


def test_tensors_may_have_any_names() -> None:
    """A tensor may be called what lowering would call an intermediate."""
    names = ("result_0", "network", "result_1", "result_1_network")
    terms = (("i", "j"), ("j", "k"), ("k", "l", "m"), ("l",))
    network = Network(tuple(Tensor(n, t) for n, t in zip(names, terms)), ("i",))
    sizes = dict.fromkeys("ijklm", 3)
    arrays = random_arrays(network, sizes, 0)
    for steps in every_tree(4):
        planned = given_path(network, sizes, steps)
        np.testing.assert_array_equal(value(planned, arrays), einsum(network, arrays))


# ---- paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "steps", "message"),
    [
        (2, (), "leaves 2 operands"),
        (3, ((0, 1),), "leaves 2 operands of 3, expected 1"),
        (2, ((0, 0),), r"step 0 contracts \(0, 0\)"),
        (2, ((0, 2),), r"step 0 contracts \(0, 2\).*\[0, 1\]"),
        (2, ((-1, 0),), r"step 0 contracts \(-1, 0\)"),
        (3, ((0, 1), (1, 3)), r"step 1 contracts \(1, 3\).*\[2, 3\]"),
        (3, ((0, 1), (2, 4)), "step 1"),
        (3, ((0, 3), (1, 2)), "step 0"),
        (2, ((0, 1), (2, 2)), "step 1"),
        (1, ((0, 1),), "step 0"),
        (1, ((0, 0),), "step 0"),
    ],
)
def test_bad_paths_are_refused(tensors: int, steps: Steps, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ContractionPath(steps).check(tensors)


def test_good_paths_are_accepted() -> None:
    ContractionPath(()).check(1)
    ContractionPath(((1, 0),)).check(2)
    for tensors in (2, 3, 4, 5):
        trees = list(every_tree(tensors))
        assert len(set(trees)) == math.prod(range(1, 2 * tensors - 2, 2))  # (2n - 3)!! trees
        for steps in trees:
            ContractionPath(steps).check(tensors)


def test_lowering_refuses_a_path_that_does_not_fit() -> None:
    network, sizes = chain(3)
    with pytest.raises(PlanError, match="leaves 2 operands"):
        _ = given_path(network, sizes, ((0, 1),)).program
    layer = network_layer(network, dict(sizes))
    with pytest.raises(PlanError, match="no path for 'result'"):
        _ = Plan(layer, {}, dict(sizes)).program


def test_the_path_of_a_plan_with_several_networks() -> None:
    planned = tnmoe.plan(MuMoE(4, 5, 3, CP(2)))
    with pytest.raises(PlanError, match=r"orders 2 networks; take one of paths\[logits, y\]"):
        _ = planned.path


# ---- plans as JSON ---------------------------------------------------------------------------------------------

DECLARATIONS: dict[str, tuple[Any, Mapping[str, int]]] = {
    "mumoe cp": (MuMoE(5, 6, 4, CP(3)), {}),
    "mumoe ring": (MuMoE(5, 6, (4, 3), TensorRing((2, 3, 2, 3)), Gate("softmax", "layer")), {}),
    "mumoe dense": (MuMoE(5, 6, 4, Dense(), Gate("sigmoid", "none"), bias=False), {}),
    "mumoe symbols": (MuMoE("d", "4*d + 1", ("N", 3), CP("R")), {"d": 5, "N": 4, "R": 2}),
    "mumoe taken symbol": (MuMoE("T", "I", 3, CP("T")), {"T": 5, "I": 4}),
    "block cp": (MuMoEBlock(5, 6, 5, (3, 2), CP(4), Gate("sparsemax", "batch"), input_norm=True), {}),
    "block ring": (MuMoEBlock(5, 6, 4, 4, TensorRing((2, 3, 2)), bias=False), {}),
    "mlp": (MLP(4, 5, 6, input_norm=True), {}),
    "mlp without bias": (MLP(4, "h", 6, bias=False), {"h": 3}),
    "linear": (Linear(4, 5), {}),
    "linear without bias": (Linear(4, 5, bias=False), {}),
    "dense moe": (DenseMoE(4, 5, 6, 3), {}),
    "sparse moe": (SparseMoE(4, 5, 6, 2), {}),
    "sparse moe hidden": (SparseMoE(4, 5, 6, 2, hidden=7, input_norm=True), {}),
}


def declared_plan(name: str) -> Plan:
    spec, sizes = DECLARATIONS[name]
    return tnmoe.plan(spec, tokens=7, sizes=sizes)


def assert_round_trip(planned: Plan) -> None:
    text = planned.to_json()
    again = Plan.from_json(text)
    assert again == planned
    assert again.program == planned.program
    assert (again.flops, again.macs) == (planned.flops, planned.macs)
    assert again.to_json() == text


@pytest.mark.parametrize("name", DECLARATIONS)
def test_plans_of_layers_survive_json(name: str) -> None:
    assert_round_trip(declared_plan(name))


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS)
def test_plans_of_networks_survive_json(planner: str) -> None:
    for seed in range(25):
        with case("json", seed) as rng:
            network, sizes = random_network(rng, 1 + seed % 6)
            assert_round_trip(tnmoe.plan(network, sizes=sizes, objective=OBJECTIVES[seed % 2], planner=planner))


@pytest.mark.parametrize(
    ("expression", "weights", "frozen"),
    [("or,or,or->r", "or__2", "or"), ("as,is,if->af", "is_", "if"), (",,a->a", "scalar_2", ""), ("a,a->", "", "a_2")],
)
def test_plans_of_networks_with_keywords_and_equal_terms_survive_json(
    expression: str, weights: str, frozen: str
) -> None:
    network = Network.parse(expression, weights=weights, frozen=frozen)
    assert_round_trip(tnmoe.plan(network, sizes=dict.fromkeys(network.indices, 3)))


NAMED = {
    "own names": Network((Tensor("x", ("t", "i")), Tensor("w", ("i", "r"), Role.WEIGHT)), ("t", "r")),
    "own names of data": Network((Tensor("x", ("t", "i")), Tensor("y", ("i", "r"))), ("t", "r")),
    "long indices": Network((Tensor("x", ("t", "i")), Tensor("w", ("i", "rank"), Role.WEIGHT)), ("t", "rank")),
    "long indices of data": Network((Tensor("x", ("tok", "inp")), Tensor("w", ("out", "tok"))), ("out", "inp")),
    "folded bias": folded("ti,ir->tr", "ti", "ir", "i"),
}


@pytest.mark.parametrize("name", NAMED)
def test_plans_of_named_networks_survive_json(name: str) -> None:
    """`Network(tensors, output)` allows any names and a folded bias; a plan that cannot be read back is lost."""
    network = NAMED[name]
    assert_round_trip(tnmoe.plan(network, sizes=dict.fromkeys(network.indices, 3)))


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every key and entry of nested JSON."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in entries:
        yield (*at, key)
        yield from places(child, (*at, key))


def changed(data: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> str:
    """`data` as JSON after `change(container, key)` at one place."""
    data = copy.deepcopy(data)
    node = data
    for key in at[:-1]:
        node = node[key]
    change(node, at[-1])
    return json.dumps(data)


JUNK = (None, True, 1, -1, 10**30, 1.5, math.nan, math.inf, "", "x", "a->", "9**9**9", [], [[1]], {}, {"a": []})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["network", "mumoe ring", "block cp", "sparse moe hidden", "mumoe symbols"])
def test_no_corruption_escapes_the_family_of_errors(name: str) -> None:
    """Every key dropped, renamed and replaced by junk: refused by a typed error, or read as some valid plan."""
    if name == "network":
        network = Network.parse("ab,bc,cd->ad", weights="bc", frozen="cd")
        planned = tnmoe.plan(network, sizes={"a": 2, "b": 3, "c": 4, "d": 5})
    else:
        planned = declared_plan(name)
    data = json.loads(planned.to_json())
    refused, escaped = 0, []

    def feed(text: str) -> None:
        nonlocal refused
        try:
            Plan.from_json(text)
        except (PlanError, DeclarationError):
            refused += 1
        except Exception as error:  # the point of the test: name what escapes
            escaped.append(f"{type(error).__name__}: {error} <- {' '.join(text.split())}")

    def rename(node: Any, key: Any) -> None:
        if isinstance(node, dict):
            node["another"] = node.pop(key)
        else:
            node.append(node[key])

    for place in places(data):
        feed(changed(data, place, lambda node, key: node.pop(key)))
        feed(changed(data, place, rename))
        for junk in JUNK:
            feed(changed(data, place, lambda node, key, junk=junk: node.__setitem__(key, junk)))
    assert not escaped, f"{len(escaped)} of them, e.g. {escaped[0]}"
    assert refused > 300


TOP = ("format", "declaration", "values", "objective", "input_gradients", "paths")


@pytest.mark.parametrize("key", TOP)
def test_a_plan_without_one_of_its_keys_is_refused(key: str) -> None:
    data = json.loads(declared_plan("mumoe ring").to_json())
    assert set(data) == set(TOP)
    with pytest.raises(PlanError):
        Plan.from_json(changed(data, (key,), lambda node, k: node.pop(k)))


RING = ("paths", "y", "steps")

REFUSED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "format": (("format",), "tnmoe-plan-2"),
    "format number": (("format",), 1),
    "format none": (("format",), None),
    "declaration list": (("declaration",), []),
    "declaration text": (("declaration",), "mumoe"),
    "kind": (("declaration", "kind"), "mumoo"),
    "kind list": (("declaration", "kind"), ["mumoe"]),
    "inputs zero": (("declaration", "inputs"), 0),
    "inputs float": (("declaration", "inputs"), 5.0),
    "inputs text": (("declaration", "inputs"), "import os"),
    "experts empty": (("declaration", "experts"), []),
    "ranks too few": (("declaration", "factorization", "ranks"), [2, 3, 2]),
    "ranks text": (("declaration", "factorization", "ranks"), "2323"),
    "factorization": (("declaration", "factorization"), "cp"),
    "factorization kind": (("declaration", "factorization", "kind"), "tensor_rong"),
    "gate": (("declaration", "gate"), ["softmax", "layer"]),
    "gate activation": (("declaration", "gate", "activation"), "hardmax"),
    "gate norm": (("declaration", "gate", "norm"), None),
    "bias": (("declaration", "bias"), 1),
    "unknown key": (("declaration", "colour"), "red"),
    "values list": (("values",), [7]),
    "value text": (("values", "T"), "7"),
    "value float": (("values", "T"), 7.0),
    "value bool": (("values", "T"), True),
    "value negative": (("values", "T"), -7),
    "value none": (("values", "T"), None),
    "value name": (("values", "import"), 3),
    "paths list": (("paths",), []),
    "paths none": (("paths",), None),
    "path list": (("paths", "y"), [[0, 1]]),
    "path none": (("paths", "y"), None),
    "steps none": (RING, None),
    "steps number": (RING, 3),
    "steps too few": (RING, [[0, 1]]),
    "steps empty": (RING, []),
    "step single": ((*RING, 0), [0]),
    "step triple": ((*RING, 0), [0, 1, 2]),
    "step number": ((*RING, 0), 0),
    "step none": ((*RING, 0), None),
    "operand beyond": ((*RING, 0, 0), 7),
    "operand far": ((*RING, 0, 0), 10**30),
    "operand negative": ((*RING, 0, 0), -1),
    "operand used": ((*RING, 1), "first"),
    "operand nan": ((*RING, 0, 0), math.nan),
    "operand word": ((*RING, 0, 0), "x"),
    "operand none": ((*RING, 0, 0), None),
    "operand list": ((*RING, 0, 0), [0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_plan_is_refused(case: str) -> None:
    data = json.loads(declared_plan("mumoe ring").to_json())
    at, junk = REFUSED[case]
    junk = data["paths"]["y"]["steps"][0] if junk == "first" else junk
    with pytest.raises((PlanError, DeclarationError)):
        Plan.from_json(changed(data, at, lambda node, key: node.__setitem__(key, junk)))


# What `to_json` never writes, and what would make a plan lie about itself or about its cost if it were read.
WRONG: dict[str, tuple[tuple[Any, ...], Any]] = {
    "operand infinite": ((*RING, 0, 0), math.inf),
    "operand fraction": ((*RING, 0, 0), 0.7),
    "operand bool": ((*RING, 0, 0), False),
    "operand text": ((*RING, 0, 0), "0"),
    "step text": ((*RING, 0), "03"),
    "exact text": (("paths", "y", "exact"), "false"),
    "exact none": (("paths", "y", "exact"), None),
    "planner none": (("paths", "y", "planner"), None),
    "planner list": (("paths", "y", "planner"), ["greedy"]),
    "objective unknown": (("objective",), "beauty"),
    "objective none": (("objective",), None),
    "value zero": (("values", "T"), 0),
    "value against the declaration": (("values", "I"), 99),
    "value of no symbol": (("values", "Q"), 3),
    "path of no network": (("paths", "z"), {"steps": [], "planner": "given", "exact": True}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_that_would_lie_is_refused(case: str) -> None:
    data = json.loads(declared_plan("mumoe ring").to_json())
    at, junk = WRONG[case]
    if case in ("operand fraction", "operand bool", "operand text", "step text"):
        assert data["paths"]["y"]["steps"][0] == [0, 3]  # so that, cut to an integer, it would be the same path
    with pytest.raises((PlanError, DeclarationError)):
        Plan.from_json(changed(data, at, lambda node, key: node.__setitem__(key, junk)))


@pytest.mark.parametrize("symbol", ["I", "O", "N1", "N2", "r1"])
def test_a_plan_without_a_declared_value_is_refused(symbol: str) -> None:
    """It would be read, and fail only when its cost is asked for."""
    data = json.loads(declared_plan("mumoe ring").to_json())
    with pytest.raises(PlanError, match=symbol):
        Plan.from_json(changed(data, ("values", symbol), lambda node, key: node.pop(key)))


NO_PLAN = {
    "empty": "",
    "blank": " ",
    "word": "plan",
    "open": "{",
    "list": "[]",
    "null": "null",
    "number": "3",
    "text": '"tnmoe-plan-1"',
    "format alone": '{"format": "tnmoe-plan-1"}',
    "python": "{'format': 'tnmoe-plan-1'}",
    "hollow": '{"format": "tnmoe-plan-1", "declaration": {}, "values": {}, "objective": "flops", "paths": {}}',
    "half a character": "\ud800",
    "zero": "\x00",
    "endless number": '{"format": ' + "1" * 5_000 + "}",
    "endless nesting": "[" * 200_000,
}


@pytest.mark.parametrize("case", NO_PLAN)
def test_text_that_is_no_plan_is_refused(case: str) -> None:
    with pytest.raises((PlanError, DeclarationError)):
        Plan.from_json(NO_PLAN[case])


def test_a_plan_cut_short_is_refused() -> None:
    text = declared_plan("mumoe cp").to_json()
    for end in range(0, len(text.rstrip()), 7):
        with pytest.raises(PlanError):
            Plan.from_json(text[:end])
