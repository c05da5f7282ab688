"""The front of orders and recomputation, against every tree with every choice, and against published figures."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
from support.all_trees import all_trees
from support.cases import blocks, case, seeds
from support.networks import random_network
from support.training import Oracle

import tnmoe
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role
from tnmoe.planners import pareto
from tnmoe.presets.registry import PRESETS


class Choices(Oracle):
    """Prices of a tree with a set of recomputed intermediates, by the definition; shares no code with the package."""

    def price(self, path: ContractionPath, again: frozenset[int]) -> dict[str, int] | None:
        """Values of the objectives, or None if something is recomputed that nobody reads.

        An intermediate is needed backwards if its partner needs a gradient, or if its own product is recomputed
        into something needed. Then it is saved, unless it is recomputed itself: at the price of its step once more.
        """
        n = len(self.terms)
        groups = [frozenset([k]) for k in range(n)]
        parent: dict[int, tuple[int, int]] = {}
        for k, (i, j) in enumerate(path.steps):
            groups.append(groups[i] | groups[j])
            parent[i], parent[j] = (n + k, j), (n + k, i)
        flops = training = saved = 0
        needed: dict[int, bool] = {}
        for k in range(len(groups) - 2, -1, -1):  # parents first
            above, partner = parent[k]
            needed[k] = any(self.needs[m] for m in groups[partner]) or (above in again and needed.get(above, False))
        for k, (i, j) in enumerate(path.steps):
            step_saved, step_training = self.step(groups[i], groups[j])
            forward = self.forward(groups[i], groups[j])
            flops += forward
            training += step_training
            # What `step` counts as saved besides its operands: leaves that were summed beforehand.
            inner = step_saved - sum(
                self.volume(self.kept(groups[a])) * any(self.needs[m] for m in groups[b])
                for a, b in ((i, j), (j, i))
                if a >= n
            )
            saved += inner
            mine = n + k
            if mine in again:
                if not needed.get(mine, False):
                    return None
                training += forward
            elif needed.get(mine, False):
                saved += self.volume(self.kept(groups[mine]))
        return {"flops": flops, "training": training, "saved": saved, "peak": self.peak(path)}

    def forward(self, left: frozenset[int], right: frozenset[int]) -> int:
        """FLOPs of one step."""
        silent = Oracle.__new__(Oracle)
        silent.__dict__ = {**self.__dict__, "needs": [False] * len(self.terms)}
        return silent.step(left, right)[1]

    def peak(self, path: ContractionPath) -> int:
        """Most elements alive at once, over both orders of the parts of every step, by simulation."""
        n = len(self.terms)

        @cache
        def group(k: int) -> frozenset[int]:
            return frozenset([k]) if k < n else frozenset().union(*(group(p) for p in path.steps[k - n]))

        def size(k: int) -> int:
            return 0 if k < n else self.volume(self.kept(group(k)))

        def written(k: int) -> int:
            """The result, and copies of leaves that are summed beforehand."""
            i, j = path.steps[k - n]
            result, total = self.kept(group(k)), size(k)
            for a, b in ((i, j), (j, i)):
                indices = self.kept(group(a))
                reduced = frozenset(x for x in indices if x in result or x in self.kept(group(b)))
                total += self.volume(reduced) if reduced != indices else 0
            return total

        inner = [n + k for k in range(len(path.steps))]
        best = None
        for swaps in itertools.product((False, True), repeat=len(inner)):
            order: list[int] = []

            def visit(k: int, swaps=swaps, order=order) -> None:
                if k >= n:
                    for part in path.steps[k - n][:: -1 if swaps[k - n] else 1]:
                        visit(part)
                    order.append(k)

            visit(n + len(path.steps) - 1)
            live = most = 0
            for k in order:
                most = max(most, live + written(k))
                live += size(k) - sum(size(p) for p in path.steps[k - n])
            best = most if best is None else min(best, most)
        assert best is not None
        return best


def minimal(points: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {p for p in points if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)}


@pytest.mark.parametrize("block", blocks(60, of=12))
@pytest.mark.parametrize(
    ("objectives", "recompute"),
    [
        (("training", "saved"), True),
        (("training", "saved"), False),
        (("flops", "peak"), False),
        (("training", "saved", "peak"), True),
        (("flops",), True),
    ],
)
def test_front_is_that_of_every_tree_and_choice(objectives: tuple[str, ...], recompute: bool, block: range) -> None:
    """Random networks of 3 to 5 tensors: the values of the front, no more and no less."""
    largest = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 3, max_size=6)
            data = [t.name for t in network.tensors if t.role is Role.DATA]
            requires_grad = {t.name for t in network.tensors if t.role is Role.WEIGHT} | {
                d for d in data if rng.random() < 0.5
            }
            oracle = Choices(network, sizes, requires_grad)
            n = len(network.tensors)
            inner = range(n, 2 * n - 2)
            points = set()
            for path in all_trees(n):
                for count in range(len(inner) + 1 if recompute else 1):
                    for again in itertools.combinations(inner, count):
                        price = oracle.price(path, frozenset(again))
                        if price is not None:
                            points.add(tuple(price[o] for o in objectives))
            found = pareto.plan(network, sizes, objectives, requires_grad, recompute=recompute)
            values = {tuple(t.values[o] for o in objectives) for t in found}
            assert values == minimal(points), str(network)
            assert len(values) == len(found)
            largest = max(largest, len(found))
            for tradeoff in found:
                tradeoff.path.check(n)
    assert largest > (1 if len(objectives) > 1 else 0)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # MiB saved, and more FLOPs of training in per cent (4096 tokens, the up-projection)
        ("gpt2-cp", [(26.1, 0.0), (17.4, 0.004), (8.7, 2.1), (0.0, 8.3)]),
        ("gpt2-tr", [(18.9, 0.0), (9.6, 0.03), (0.25, 6.7)]),
    ],
)
def test_published_fronts(name: str, published: list[tuple[float, float]]) -> None:
    found = tnmoe.pareto(PRESETS[name].spec, network="hidden", tokens=4096)
    least = min(t.values["training"] for t in found)
    points = [(4 * t.values["saved"] / 2**20, 100 * (t.values["training"] / least - 1)) for t in found]
    for mebibytes, percent in published:
        assert any(abs(m - mebibytes) < 0.06 and abs(p - percent) < 0.06 for m, p in points), (mebibytes, points)


def test_limits_name_the_least_there_is() -> None:
    net = Network.parse("bn,nr,bi,ir,ro->bo", weights="nr ir ro")
    sizes = {"b": 64, "n": 8, "r": 16, "i": 32, "o": 24}
    every = tnmoe.pareto(net, sizes=sizes)
    within = tnmoe.pareto(net, sizes=sizes, saved_limit=1500)
    assert {tuple(t.values.items()) for t in within} == {
        tuple(t.values.items()) for t in every if t.values["saved"] <= 1500
    }
    least = min(t.values["saved"] for t in tnmoe.pareto(net, sizes=sizes, recompute=False))
    with pytest.raises(tnmoe.PlanError, match=f"the least is {least:,}"):
        tnmoe.pareto(net, sizes=sizes, recompute=False, saved_limit=least - 1)
    peaks = [t.values["peak"] for t in tnmoe.pareto(net, sizes=sizes, objectives=["flops", "peak"])]
    with pytest.raises(tnmoe.PlanError, match="no order has peak"):
        tnmoe.pareto(net, sizes=sizes, peak_limit=min(peaks) - 1)


@pytest.mark.parametrize("seed", seeds(30, 4))
def test_the_cheapest_point_is_the_plans(seed: int) -> None:
    """Both ends of the front are what the single objectives find."""
    network, sizes = random_network(random.Random(seed), 4 + seed % 3)
    front = tnmoe.pareto(network, sizes=sizes, recompute=False)
    training = tnmoe.plan(network, sizes=sizes, objective="training")
    saved = tnmoe.plan(network, sizes=sizes, objective="saved")
    oracle = Oracle(network, sizes, {t.name for t in network.tensors if t.role is not Role.FROZEN})
    assert front[0].values["training"] == training.training_flops
    assert front[-1].values["saved"] == oracle.of_path(saved.paths["result"])[0]


def test_faults() -> None:
    block = tnmoe.MuMoEBlock(4, 5, 6, 3, tnmoe.CP(2))
    with pytest.raises(tnmoe.PlanError, match="network= one of hidden, y"):
        tnmoe.pareto(block)
    with pytest.raises(tnmoe.PlanError, match="unknown network 'z'"):
        tnmoe.pareto(block, network="z")
    with pytest.raises(tnmoe.PlanError, match="did you mean 'saved'"):
        tnmoe.pareto(block, network="y", objectives=["save"])
    with pytest.raises(tnmoe.PlanError, match="up to 9 tensors"):
        tnmoe.pareto(tnmoe.MuMoE(4, 5, (2, 2, 2, 2), tnmoe.CP(2)))
