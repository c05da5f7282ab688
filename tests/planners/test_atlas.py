"""The plan atlas holds every optimum, its proofs check, and the verifier rejects what was tampered with.

The optimum at concrete sizes comes from the concrete planner, priced through the program it lowers to; on small
boxes also from every tree at every point, priced by hand.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.networks import random_folded_network, random_network
from support.trees import Oracle, every_tree

import tnmoe
from tnmoe import Network, PlanError
from tnmoe.costing.objective import as_objective
from tnmoe.costing.prices import forward_price, price
from tnmoe.io import cache as disk
from tnmoe.ir.layer import Contraction
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Value
from tnmoe.lowering.lower import lower_network
from tnmoe.planners import subset_dp
from tnmoe.planners.atlas import multipliers, verifier
from tnmoe.planners.atlas.atlas import Atlas
from tnmoe.planners.atlas.diagram import lower_envelope
from tnmoe.planners.atlas.dominance import Domain
from tnmoe.planners.atlas.make import atlas
from tnmoe.planners.atlas.polynomial import Polynomial
from tnmoe.planners.atlas.symbolic_dp import MAX_TENSORS, Pricing, path_cost

NETWORKS = {
    "dense": "bn,nio,bi->bo",
    "cp": "bn,nr,bi,ir,or->bo",
    "cp 2": "bn,bm,nr,mr,bi,ir,or->bo",
    "tensor ring": "bn,anc,bi,cid,doa->bo",
    "tensor ring 2": "bn,bm,anc,cmd,bi,die,eoa->bo",
    "tensor train": "bn,na,bi,aic,co->bo",
    "tensor train 2": "bn,bm,na,amc,bi,cid,do->bo",
    "tucker": "bn,nx,bi,iy,oz,xyz->bo",
    "hierarchical tucker": "bn,nx,bi,iy,oz,xyt,tz->bo",
}
SMALL = ("dense", "cp", "tensor ring", "tensor train")
REALISTIC = {"b": (1, 65536), "n": (8, 4096), "m": (8, 4096), "i": (256, 16384), "o": (256, 16384)}


def network(name: str) -> Network:
    bare = Network.parse(NETWORKS[name])
    return Network.parse(NETWORKS[name], weights=[t.name for t in bare.tensors if "b" not in t.indices])


@cache
def made(name: str, bounds: str, seconds: float = 10.0) -> Atlas:
    net = network(name)
    if bounds == "realistic":
        return atlas(net, {i: REALISTIC.get(i, (8, 2048)) for i in net.indices}, seconds=seconds)
    return atlas(net, dict.fromkeys(net.indices, (2, None)), seconds=seconds)


def drawn(rng: random.Random, found: Atlas, reach: int = 5000) -> dict[str, int]:
    """Sizes within the bounds, even on a logarithmic scale."""
    sizes = {}
    for index, (low, high) in found.bounds.items():
        top = low * reach if high is None else high
        sizes[index] = min(top, max(low, round(low * (top / low) ** rng.random())))
    return sizes


def concrete(net: Network, sizes: dict[str, int], objective: str = "flops") -> int:
    """The optimum of the concrete planner, by the ops it lowers to."""
    minimised = as_objective(objective)
    path = subset_dp.plan(net, sizes, minimised)
    return price(lower_network(Contraction(Value("y", net.output), net), path), sizes, minimised)


# ---- polynomials -----------------------------------------------------------------------------------------------


def test_polynomials_add_multiply_and_print() -> None:
    b, n, r = (Polynomial.variable(i) for i in "bnr")
    cost = 2 * b * n * r + b * r
    assert str(cost) == "2·b·n·r + b·r"
    assert str(Polynomial()) == "0"
    assert str(Polynomial.of(3)) == "3"
    assert cost == r * b + n * 2 * r * b
    assert hash(cost) == hash(r * b + 2 * n * r * b)
    assert sum([cost, 1], start=0).at({"b": 3, "n": 5, "r": 7}) == 2 * 105 + 21 + 1
    assert cost.affine("n") == (b * r, 2 * b * r)
    assert cost.minus_common(b * r + 4 * b * n) == (r, Polynomial.of(2))
    assert Polynomial.from_list(json.loads(json.dumps(cost.to_list()))) == cost
    assert str(cost.to_sympy()) == "2*b*n*r + b*r"
    with pytest.raises(PlanError, match="squared"):
        b * (b + 1)
    with pytest.raises(PlanError, match="negative"):
        Polynomial({frozenset("b"): -1})


@pytest.mark.parametrize("objective", ["flops", "macs"])
@pytest.mark.parametrize("seed", range(20))
def test_the_polynomial_of_a_path_is_its_price(seed: int, objective: str) -> None:
    rng = random.Random(seed)
    make = random_folded_network if seed % 2 else random_network
    net, sizes = make(rng, rng.randint(2, 5))
    for _ in range(5):
        steps = rng.choice(list(every_tree(len(net.tensors))))
        path = ContractionPath(steps)
        ops = lower_network(Contraction(Value("y", net.output), net), path)
        assert path_cost(net, path, Pricing(objective)).at(sizes) == forward_price(ops, sizes, objective), (net, steps)


# ---- comparison ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [9, 2**20, 2**40, None])
def test_comparison_is_exact(top: int | None) -> None:
    """Against the definition, on polynomials that differ by little: the three arithmetics all decide by integers."""
    rng = random.Random(top)
    domain = Domain({i: (rng.randint(1, 4), top) for i in "abc"})

    def some() -> Polynomial:
        chosen = rng.sample([frozenset(s) for k in range(4) for s in itertools.combinations("abc", k)], 3)
        return Polynomial({m: rng.randint(1, 3) for m in chosen})

    given = [some() for _ in range(40)]
    given += [p + 1 for p in given[:10]]
    rows = domain.rows(given, domain.free)
    corners = [domain.corners(p, domain.free) for p in given]
    for k in range(len(given)):
        expected = [all(x >= y for x, y in zip(row, corners[k])) for row in corners]
        assert rows.above(rows[k : k + 1]).tolist() == expected
        assert rows.below(rows[k : k + 1]).tolist() == [all(x <= y for x, y in zip(r, corners[k])) for r in corners]
    least = [min(column) for column in zip(*corners)]
    assert [int(n) % 2**64 for n in rows.least().exact[0]] == [n % 2**64 for n in least]
    kept = set(rows.undominated().tolist())
    for k, row in enumerate(corners):
        smaller = [j for j, o in enumerate(corners) if all(x <= y for x, y in zip(o, row)) and o != row]
        assert (k in kept) == (not smaller and row not in corners[:k])
    if top is not None:  # the corners decide: no integer point says otherwise
        for p, q in itertools.product(range(8), repeat=2):
            sizes = {i: rng.randint(low, high or 99) for i, (low, high) in domain.bounds.items()}
            if all(x <= y for x, y in zip(corners[p], corners[q])):
                assert given[p].at(sizes) <= given[q].at(sizes)


# ---- atlas = concrete ------------------------------------------------------------------------------------------

POINTS = {"dense": 1000, "cp": 1000, "tensor ring": 1000, "tensor train": 1000, "tucker": 1000}


@pytest.mark.slow
@pytest.mark.parametrize("bounds", ["realistic", "two"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_cheapest_listed_order_is_the_concrete_optimum(name: str, bounds: str) -> None:
    found = made(name, bounds) if name in SMALL else made(name, bounds, 0.3)
    rng = random.Random(name + bounds)
    for _ in range(POINTS.get(name, 150)):
        sizes = drawn(rng, found)
        assert found.best(sizes).cost.at(sizes) == concrete(found.network, sizes), sizes


def test_the_cost_is_that_of_the_public_plan() -> None:
    found = made("tensor ring", "realistic")
    rng = random.Random(0)
    for _ in range(20):
        sizes = drawn(rng, found)
        assert found.best(sizes).cost.at(sizes) == tnmoe.plan(found.network, sizes=sizes).flops, sizes


@pytest.mark.parametrize("objective", ["flops", "macs"])
@pytest.mark.parametrize("seed", range(12))
def test_random_networks_by_every_tree_at_every_point(seed: int, objective: str) -> None:
    """Hyperedges, scalars, private indices, parts that share nothing: all trees, all sizes of a small box."""
    rng = random.Random(seed)
    net, _ = random_network(rng, rng.choice([2, 3, 3, 4]))
    bounds = {i: (low := rng.randint(1, 3), low + (k < 4)) for k, i in enumerate(net.indices)}
    found = atlas(net, bounds, objective, seconds=1)
    trees = list(every_tree(len(net.tensors)))
    listed = {o.cost for o in found.orders}
    for point in itertools.product(*(range(low, high + 1) for low, high in bounds.values())):
        sizes = dict(zip(bounds, point))
        oracle = Oracle(net, sizes)
        costs = [oracle.path(t)[objective == "macs"] for t in trees]
        assert found.best(sizes).cost.at(sizes) == min(costs)
        polynomials = {path_cost(net, ContractionPath(trees[k]), Pricing(objective)): c for k, c in enumerate(costs)}
        winners = [p for p, c in polynomials.items() if c == min(costs)]
        assert len(winners) > 1 or winners[0] in listed, "a tree that alone wins here is not listed"
    assert verifier.verify(json.loads(found.to_json()))[0] == len(found.orders)


@pytest.mark.parametrize("seed", range(8))
def test_folded_biases(seed: int) -> None:
    rng = random.Random(seed)
    net, _ = random_folded_network(rng, rng.randint(2, 5))
    found = atlas(net, dict.fromkeys(net.indices, (1, 50)), seconds=0.5)
    for _ in range(30):
        sizes = drawn(rng, found)
        assert found.best(sizes).cost.at(sizes) == concrete(net, sizes), sizes
    assert verifier.verify(json.loads(found.to_json()))[0] == len(found.orders)
    assert Atlas.from_json(found.to_json()) == found


def test_bounds_beyond_floats_and_machine_integers() -> None:
    """Vertices of 2**240 are compared in Python's integers."""
    net = network("tensor ring")
    found = atlas(net, dict.fromkeys(net.indices, (2, 2**30)), seconds=0.5)
    assert Domain(found.bounds).limit > 2**105
    rng = random.Random(0)
    for _ in range(50):
        sizes = drawn(rng, found)
        assert found.best(sizes).cost.at(sizes) == concrete(net, sizes), sizes


@pytest.mark.slow
def test_calls_are_data_steps_that_many_times() -> None:
    """T calls share what the weights alone make: the price of T · (steps on data) + (steps on weights)."""
    net = network("hierarchical tucker")
    sizes = {"b": 1, "n": 256, "x": 64, "i": 768, "y": 256, "o": 3072, "z": 256, "t": 64}
    for calls in (1, 83, 84, 10_000):
        found = atlas(net, sizes, calls=calls)
        best = min(folded_price(net, sizes, steps, calls) for steps in every_tree(7))
        assert found.orders[0].cost.at(sizes) == best
        assert len(found.orders) == 1
    frozen = atlas(net, sizes, calls=10**9, frozen=[t.name for t in net.tensors])
    assert frozen.orders[0].cost.at(sizes) == concrete(net, sizes), "without data nothing is repeated"


def folded_price(net: Network, sizes: dict[str, int], steps: Any, calls: int) -> int:
    oracle = Oracle(net, sizes)
    live = {k: (leaf, "b" in leaf) for k, leaf in enumerate(oracle.leaves)}
    total = 0
    for k, (i, j) in enumerate(steps):
        (a, x), (b, y) = live.pop(i), live.pop(j)
        needed = frozenset(net.output).union(*(leaf for leaf, _ in live.values()))
        flops, _, result = oracle.step(a, b, needed)
        live[len(oracle.leaves) + k] = (result, x or y)
        total += flops * (calls if x or y else 1)
    return total


# ---- closure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", ["realistic", "two"])
@pytest.mark.parametrize("name", SMALL)
def test_small_atlases_are_closed(name: str, bounds: str) -> None:
    found = made(name, bounds)
    assert found.closed
    assert found.gap == ""
    for order in found.orders:
        assert order.witness is not None
        sizes = dict(order.witness)
        assert order.cost.at(sizes) == concrete(found.network, sizes)
        assert [o for o in found.orders if o.cost.at(sizes) <= order.cost.at(sizes)] == [order]


def test_counts_of_orders() -> None:
    """With all sizes from 2 without an upper bound."""
    assert [len(made(name, "two").orders) for name in SMALL] == [3, 6, 19, 15]


def test_without_scipy_the_gap_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("cp")
    monkeypatch.setattr(multipliers, "INSTALLED", False)
    found = atlas(net, dict.fromkeys(net.indices, (2, None)), seconds=2)
    assert (len(found.orders), len(found.undecided)) == (13, 7)
    assert not found.closed
    assert "7 of 13 orders are undecided" in found.gap
    assert found.gap in str(found)
    assert verifier.verify(json.loads(found.to_json())) == (13, 6)
    with pytest.raises(PlanError, match="undecided"):
        atlas(net, dict.fromkeys(net.indices, (2, None)), seconds=1, close=True)


# ---- the verifier ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bounds", ["realistic", "two"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_verifier_accepts(name: str, bounds: str) -> None:
    found = made(name, bounds) if name in SMALL else made(name, bounds, 0.3)
    orders, witnessed = verifier.verify(json.loads(found.to_json()))
    assert (orders, witnessed) == (len(found.orders), len(found.orders) - len(found.undecided))


def test_the_verifier_stands_alone(tmp_path: Path) -> None:
    """A copy of the file, without the package on the path and in isolated mode."""
    script, good, bad = tmp_path / "verify.py", tmp_path / "good.json", tmp_path / "bad.json"
    script.write_text(Path(verifier.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    text = made("cp", "two").to_json()
    good.write_text(text, encoding="utf-8")
    bad.write_text(text.replace('"flops"', '"macs"'), encoding="utf-8")
    command = [sys.executable, "-I", "-S", str(script)]
    right = subprocess.run([*command, str(good)], capture_output=True, text=True, check=False)
    assert (right.returncode, "proven. 6 orders" in right.stdout) == (0, True)
    wrong = subprocess.run([*command, str(good), str(bad)], capture_output=True, text=True, check=False)
    assert (wrong.returncode, "rejected" in wrong.stdout) == (1, True)
    assert subprocess.run([*command, str(script)], capture_output=True, check=False).returncode == 1
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def _first_out(data: Any) -> Any:
    return next(p for p in data["certificate"]["out"] if len(p["weights"]) > 1)


def _biggest(data: Any) -> Any:
    kept = data["certificate"]["kept"]
    return kept[max(kept, key=lambda s: len(kept[s]))]


def _dropped_order(data: Any) -> None:
    data["orders"].pop(0)


def _scaled_weight(data: Any) -> None:
    _first_out(data)["weights"][0][2] *= 10**9


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "format": lambda d: d.update(format="tnmoe-atlas-2"),
    "objective": lambda d: d.update(objective="macs"),
    "calls": lambda d: d.update(calls=2),
    "constants": lambda d: d.update(constant=[], calls=3),
    "order dropped": _dropped_order,
    "all orders dropped": lambda d: d.update(orders=[]),
    "order's coefficient": lambda d: d["orders"][0]["cost"][0].__setitem__(0, d["orders"][0]["cost"][0][0] + 1),
    "order's monomial": lambda d: d["orders"][0]["cost"].pop(),
    "order's steps swapped": lambda d: d["orders"][0].update(steps=d["orders"][1]["steps"]),
    "order's step repeated": lambda d: d["orders"][0]["steps"].__setitem__(1, d["orders"][0]["steps"][0]),
    "order cut short": lambda d: d["orders"][0]["steps"].pop(),
    "witness of another order": lambda d: d["orders"][0].update(witness=d["orders"][1]["witness"]),
    "witness out of bounds": lambda d: d["orders"][0]["witness"].update(b=1),
    "witness without a size": lambda d: d["orders"][0]["witness"].pop("b"),
    "witness removed": lambda d: d["orders"][0].update(witness=None),
    "closed denied": lambda d: d.update(closed=False),
    "lower bound widened": lambda d: d["bounds"].update({i: [1, None] for i in d["bounds"]}),
    "one lower bound widened": lambda d: d["bounds"].update(r=[1, None]),
    "bound of no index": lambda d: d["bounds"].update(q=[2, None]),
    "bound missing": lambda d: d["bounds"].pop("b"),
    "bound reversed": lambda d: d["bounds"].update(b=[5, 4]),
    "multiplier scaled": _scaled_weight,
    "multiplier negative": lambda d: _first_out(d)["weights"][0].__setitem__(2, -1),
    "multiplier zero": lambda d: _first_out(d)["weights"][0].__setitem__(2, 0),
    "multiplier fractional": lambda d: _first_out(d)["weights"][0].__setitem__(2, 0.5),
    "multiplier dropped": lambda d: _first_out(d)["weights"].pop(),
    "multipliers gone": lambda d: _first_out(d).update(weights=[]),
    "multiplier of another order": lambda d: [w.__setitem__(0, 0) for w in _first_out(d)["weights"]],
    "multiplier of no order": lambda d: _first_out(d)["weights"][0].__setitem__(0, 99),
    "multiplier's degree": lambda d: _first_out(d).update(degree=[]),
    "proof dropped": lambda d: d["certificate"]["out"].pop(),
    "proof of another cost": lambda d: _first_out(d).update(cost=d["orders"][0]["cost"]),
    "kept cost dropped": lambda d: _biggest(d).pop(),
    "kept cost raised": lambda d: _biggest(d)[0][0].__setitem__(0, _biggest(d)[0][0][0] + 1),
    "kept cost nothing": lambda d: _biggest(d).__setitem__(0, []),
    "kept list emptied": lambda d: d["certificate"]["kept"].__setitem__("3", []),
    "kept list dropped": lambda d: d["certificate"]["kept"].pop("3"),
    "leaf below nothing": lambda d: d["certificate"]["kept"].update({"1": []}),
    "network's tensor dropped": lambda d: d["network"]["tensors"].pop(),
    "network's index renamed": lambda d: d["network"]["tensors"][0].update(indices=["b", "r"]),
    "network's output": lambda d: d["network"].update(output=["b"]),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_the_verifier_rejects(case: str) -> None:
    data = json.loads(made("cp", "two").to_json())
    assert verifier.verify(data) == (6, 6)
    changed = copy.deepcopy(data)
    MUTATIONS[case](changed)
    assert changed != data
    with pytest.raises((verifier.Rejected, KeyError, TypeError)):
        verifier.verify(changed)


def test_every_kept_cost_is_needed_or_the_proof_stands() -> None:
    """Any one kept cost of any subset of the ring removed: rejected, since its order is then covered by nothing."""
    data = json.loads(made("tensor ring", "two").to_json())
    for subset, costs in data["certificate"]["kept"].items():
        for k in range(len(costs)):
            changed = copy.deepcopy(data)
            changed["certificate"]["kept"][subset].pop(k)
            with pytest.raises(verifier.Rejected):
                verifier.verify(changed)


# ---- questions -------------------------------------------------------------------------------------------------


def test_tensor_ring_fuses_expert_and_input_core_above_31_7_tokens() -> None:
    """By hand, a c d n i o = 4 32 64 4 768 1000: per token 2(acd + acn + ado + cdi) = 3,675,136 unfused; fused
    2·acdin = 50,331,648 once and 2(adin + adn + ado) = 2,086,912 a token: 31.69 tokens, and 1.761 in the limit."""
    fixed = {"a": 4, "c": 32, "d": 64, "n": 4, "i": 768, "o": 1000}
    found = atlas(network("tensor ring"), {"b": (1, 65536), **fixed})
    unfused, fused = found.best({"b": 1, **fixed}), found.best({"b": 65536, **fixed})
    assert unfused.tree == "((bn · anc) · (bi · cid)) · doa"
    assert fused.tree == "(bn · ((anc · cid) · bi)) · doa"
    diagram = found.along("b", fixed)
    assert diagram.breakpoints == (Fraction(50_331_648, 3_675_136 - 2_086_912),)
    assert [s.tree for s in diagram.segments] == [unfused.tree, fused.tree]
    assert round(float(diagram.breakpoints[0]), 1) == 31.7
    formula = found.threshold(unfused, fused, "b")
    assert formula.subs({s: fixed[str(s)] for s in formula.free_symbols}) == diagram.breakpoints[0]
    factor, sizes = atlas(network("tensor ring"), {"b": (1, None), **fixed}).regret(unfused)
    assert factor == Fraction(3_675_136, 2_086_912)
    assert round(float(factor), 2) == 1.76
    assert sizes == {"b": math.inf, **fixed}


def test_hierarchical_tucker_folds_after_83_tokens() -> None:
    """n i o = 256 768 3072, ranks 64 and 256: folding oz·tz costs 2·t·z·o = 100,663,296 once."""
    fixed = {"n": 256, "x": 64, "i": 768, "y": 256, "o": 3072, "z": 256, "t": 64}
    found = atlas(network("hierarchical tucker"), {"b": (1, 65536), **fixed})
    diagram = found.along("b", fixed)
    (threshold,) = diagram.breakpoints
    assert math.floor(threshold) == 83
    per_token = [found.orders[s.place].cost.affine("b")[1].at(fixed) for s in diagram.segments]
    assert [round(flops / 1e6, 2) for flops in per_token] == [4.14, 2.92]
    assert "oz · tz" in diagram.segments[1].tree
    for calls, expected in ((83, False), (84, True)):
        once = atlas(network("hierarchical tucker"), {"b": 1, **fixed}, calls=calls).orders[0]
        assert ("oz · tz" in once.tree) is expected


def test_cp_within_realistic_sizes() -> None:
    """Nearly always the order of the reference; only with the fewest experts and the largest ranks does it pay to
    multiply the factors out, and never by a factor of 2."""
    found = made("cp", "realistic")
    base = found.steadiest()
    assert len(found.orders) == 4
    assert base.cost == Polynomial.from_list(
        [[2, ["b", "i", "r"]], [2, ["b", "n", "r"]], [2, ["b", "o", "r"]], [1, ["b", "r"]]]
    )
    factor, sizes = found.regret(base)
    assert 1.9 < factor < 2
    assert sizes == {"b": 65536, "n": 8, "r": 2048, "i": 256, "o": 256}
    one = atlas(found.network, {**found.bounds, "n": (16, 4096)})
    assert [o.cost for o in one.orders] == [base.cost]
    assert "One order wins everywhere" in str(one)


@pytest.mark.parametrize("name", SMALL)
def test_regret_is_the_worst_and_attained(name: str) -> None:
    found = made(name, "realistic")
    rng = random.Random(name)
    for order in found.orders:
        factor, sizes = found.regret(order.path)
        at = {i: int(s) for i, s in sizes.items()}
        assert Fraction(order.cost.at(at), found.best(at).cost.at(at)) == factor
        for _ in range(30):
            point = drawn(rng, found)
            assert Fraction(order.cost.at(point), found.best(point).cost.at(point)) <= factor, point
    assert made(name, "two").regret(found.orders[0]).factor >= 1


@pytest.mark.parametrize(
    "name", ["tensor ring", "tensor train", pytest.param("hierarchical tucker", marks=pytest.mark.slow)]
)
def test_diagrams_are_the_lower_envelope(name: str) -> None:
    found = made(name, "realistic") if name in SMALL else made(name, "realistic", 0.3)
    rng = random.Random(name)
    for _ in range(20):
        at = drawn(rng, found)
        index = rng.choice(sorted(at))
        diagram = found.along(index, at)
        ends = [(s.start, s.end) for s in diagram.segments]
        assert ends[0][0] == found.bounds[index][0]
        assert ends[-1][1] == found.bounds[index][1]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
        for segment in diagram.segments:
            assert segment.end is not None
            for size in {math.ceil(segment.start), math.floor(segment.end)}:
                if segment.start <= size <= segment.end:
                    sizes = {**at, index: size}
                    assert found.orders[segment.place].cost.at(sizes) == concrete(found.network, sizes), sizes
        for a, b in itertools.pairwise(diagram.segments):
            formula = found.threshold(found.orders[a.place], found.orders[b.place], index)
            assert formula.subs({s: at[str(s)] for s in formula.free_symbols}) == a.end, at


def test_lower_envelope_of_ties_and_equal_lines() -> None:
    assert lower_envelope([(0, 2), (0, 2), (10, 1), (20, 0), (30, 0)], 1, None) == [(1, 10, 0), (10, None, 3)]
    assert lower_envelope([(0, 1), (5, 0)], 5, 5) == [(5, 5, 1)]


def test_regions_name_a_token_threshold() -> None:
    fixed = {"a": 4, "c": 32, "d": 64, "n": 4, "i": 768, "o": 1000}
    found = atlas(network("tensor ring"), {"b": (1, 65536), **fixed})
    (region,) = found.regions(found.best({"b": 1, **fixed}))
    assert region.condition.startswith("b > (a·c·d·i·n) / (")
    assert region.condition in str(found) or found.steadiest() == region.order


@pytest.mark.parametrize("seed", range(6))
def test_conditions_say_when_an_order_is_cheaper(seed: int) -> None:
    """The text is read back by hand and compared with the costs at random sizes."""
    found = made(SMALL[seed % 4], "realistic")
    rng = random.Random(seed)
    base = rng.choice(found.orders)
    for order, condition in found.regions(base):
        for _ in range(10):
            sizes = drawn(rng, found)
            assert holds(condition, sizes) == (order.cost.at(sizes) < base.cost.at(sizes)), condition


def holds(condition: str, sizes: dict[str, int]) -> bool:
    main, _, guard = condition.partition(", and ")
    if guard:
        when, _, text = guard.partition(" where ")
        left, right = (term_sum(side, sizes) for side in text.split(" ≤ "))
        if left <= right:
            return when == "always"
    relation = ">" if " > " in main else "<"
    left, right = (ratio(side, sizes) for side in main.split(f" {relation} "))
    return left > right if relation == ">" else left < right


def ratio(text: str, sizes: dict[str, int]) -> Fraction:
    above, _, below = text.partition(" / ")
    return term_sum(above.strip("()"), sizes) / (term_sum(below.strip("()"), sizes) if below else 1)


def term_sum(text: str, sizes: dict[str, int]) -> Fraction:
    total = 0
    for term in text.replace(" - ", " + -1·").split(" + "):
        total += math.prod(sizes[f] if f in sizes else int(f) for f in term.split("·"))
    return Fraction(total)


# ---- files and bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_json_gives_the_atlas_back(name: str) -> None:
    found = made(name, "realistic")
    again = Atlas.from_json(found.to_json())
    assert again == found
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize("case", ["order's coefficient", "witness of another order", "format", "bound missing"])
def test_a_damaged_atlas_is_not_read(case: str) -> None:
    data = json.loads(made("cp", "two").to_json())
    MUTATIONS[case](data)
    with pytest.raises(PlanError):
        Atlas.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "tnmoe-atlas-1"}', "[" * 100_000, "null"])
def test_text_that_is_no_atlas_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Atlas.from_json(text)


def test_a_single_tensor() -> None:
    found = atlas(Network.parse("ab->a"), {"a": (1, 9), "b": 4})
    assert found.closed
    assert str(found.orders[0].cost) == "a·b"
    assert verifier.verify(json.loads(found.to_json())) == (1, 1)


CP = {"n": (8, 64), "r": (2, None), "i": 9, "o": 9}
FAULTS: dict[str, tuple[Any, str]] = {
    "reversed": ({**CP, "b": (5, 4)}, "'b' are empty: 5 is above 4"),
    "zero": ({**CP, "b": (0, 4)}, "at least 1, got 0"),
    "text": ({**CP, "b": "1-4"}, "one integer or"),
    "float": ({**CP, "b": (1, 4.0)}, "one integer or"),
    "bool": ({**CP, "b": (True, 4)}, "one integer or"),
    "missing": (CP, "'b' has no bounds"),
    "unknown": ({**CP, "b": 1, "q": 2}, "'q', which is no index"),
    "no mapping": ([1, 2], "must be a mapping"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faulty_bounds_are_refused(case: str) -> None:
    bounds, message = FAULTS[case]
    with pytest.raises(PlanError, match=message):
        atlas(network("cp"), bounds)


def test_questions_outside_the_bounds_are_refused() -> None:
    found = made("cp", "realistic")
    inside = {"b": 1, "n": 8, "r": 8, "i": 256, "o": 256}
    with pytest.raises(PlanError, match=r"b = 65537 is outside its bounds, 1 to 65536; .* plan at these sizes"):
        found.best({**inside, "b": 65537})
    with pytest.raises(PlanError, match="'b' has no size"):
        found.best({k: v for k, v in inside.items() if k != "b"})
    with pytest.raises(PlanError, match="no index 'q'"):
        found.best({**inside, "q": 1})
    with pytest.raises(PlanError, match="no index 'q'"):
        found.along("q", inside)
    with pytest.raises(PlanError, match="r = 4096 is outside"):
        found.along("b", {**inside, "r": 4096})
    with pytest.raises(PlanError, match="leave those of the atlas"):
        found.regret(found.orders[0], {"b": (1, None)})
    with pytest.raises(PlanError, match="does not decide"):
        found.threshold(found.orders[0], found.orders[0], "b")


@pytest.mark.parametrize("calls", [0, -1, True, 1.5, "2"])
def test_faulty_calls_are_refused(calls: Any) -> None:
    with pytest.raises(PlanError, match="calls"):
        atlas(network("dense"), dict.fromkeys("bnio", 2), calls=calls)


def test_more_than_eleven_tensors_are_refused() -> None:
    net = Network.parse(",".join("ab" for _ in range(MAX_TENSORS + 1)) + "->a")
    with pytest.raises(PlanError, match="up to 11 tensors"):
        atlas(net, {"a": 2, "b": 2})


HIERARCHY = "bn,bm,nx,mw,xwv,bi,iy,oz,yzt,vs,st->bo"
"""Hierarchical Tucker {{n, m}, {i, o}} with two levels of experts and a matrix at the root: 11 tensors."""


def test_too_many_orders_are_refused_and_not_waited_for() -> None:
    """The same bounds and cap are refused on every machine; the message says what may be done."""
    net = Network.parse(HIERARCHY)
    with pytest.raises(PlanError, match=r"tensors alone have .*20,000,000 comparisons.*raise the lower bounds"):
        atlas(net, dict.fromkeys(net.indices, (1, None)), most=20_000_000)


@pytest.mark.slow
def test_ten_tensors_of_known_ranks() -> None:
    """Only the tokens are unknown: a certified list, checked by the verifier and at concrete sizes."""
    net = Network.parse("bn,bm,nx,mw,xwv,bi,iy,oz,yzt,vt->bo")
    sizes = dict(zip("bnmxwvioyzt", (2, 16, 8, 4, 4, 6, 64, 96, 16, 16, 6)))
    found = atlas(net, {**sizes, "b": (1, 4096)}, seconds=1)
    rng = random.Random(0)
    for _ in range(8):
        at = drawn(rng, found)
        assert found.best(at).cost.at(at) == concrete(net, at), at
    assert verifier.verify(json.loads(found.to_json()))[0] == len(found.orders)


# ---- cache -----------------------------------------------------------------------------------------------------


def renamed(net: Network, names: dict[str, str]) -> Network:
    tensors = [tnmoe.Tensor(f"x{k}", tuple(names[i] for i in t.indices), t.role) for k, t in enumerate(net.tensors)]
    return Network(tuple(tensors), tuple(names[i] for i in net.output))


def test_an_atlas_is_kept_under_its_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path))
    monkeypatch.setattr("tnmoe.planners.atlas.make._WORTH_KEEPING", 0.0)
    net = network("tensor ring")
    bounds = {i: REALISTIC.get(i, (8, 2048)) for i in net.indices}
    first = atlas(net, bounds, seconds=2)
    assert len(list((tmp_path / "entries").iterdir())) == 1

    def never(*_: Any) -> Any:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr("tnmoe.planners.atlas.make._made", never)
        assert atlas(net, bounds, seconds=2) == first
        names = {i: f"{i}{i}" for i in net.indices}
        other = atlas(renamed(net, names), {names[i]: b for i, b in bounds.items()}, seconds=2)
        assert len(other.orders) == len(first.orders)
        assert other.orders[0].tree == "((x0 · x1) · (x2 · x3)) · x4"
        assert verifier.verify(json.loads(other.to_json())) == verifier.verify(json.loads(first.to_json()))
        for changed in (
            lambda: atlas(net, {**bounds, "b": (1, 65537)}, seconds=2),
            lambda: atlas(net, bounds, "macs", seconds=2),
            lambda: atlas(net, bounds, seconds=2, calls=3),
            lambda: atlas(net, bounds, seconds=2, frozen=["bn"]),
            lambda: atlas(net, bounds, seconds=3),
            lambda: atlas(network("tensor train"), dict.fromkeys("bnaico", (8, 9)), seconds=2),
        ):
            with pytest.raises(AssertionError, match="made again"):
                changed()
    (entry,) = (tmp_path / "entries").iterdir()
    damaged = disk.get(entry.stem)
    assert damaged is not None
    damaged["orders"][0]["cost"][0][0] += 1  # an order that does not cost what is written is found out
    disk.put(entry.stem, damaged)
    assert atlas(net, bounds, seconds=2) == first
    assert disk.get(entry.stem) != damaged
