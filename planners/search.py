"""Planning beyond the exact planner: many greedy starts, each improved piece by piece by the exact planner.

Starts come from random greedy trees and, if it is installed, from cotengra; whatever they were found by, they are
compared and improved under the price that the plan reports. What is found is not proven to be the best.

Without a budget the search ends after a fixed amount of work, and the same network gives the same tree on every
machine. With one it goes on with further starts until the time is up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Set

from tnmoe.costing.objective import FLOPS, Objective
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planners import cotengra, random_greedy
from tnmoe.planners.effort import Effort, Progress
from tnmoe.planners.path_cache import kept_path
from tnmoe.planners.reconfigure import reconfigure
from tnmoe.planners.splits import Splits, Steps, path_of, splits_of

VERSION = 1
"""To be raised when the search comes to find other trees: what was kept before is then not found any more."""

_UNITS = 2_000_000
"""Work without a budget: a few seconds."""

_STARTS = 12
_PIECES = (6, 8, 10)
"""Operands of a piece: small ones first, which are quick; the largest for trees near the best (1.5 times as dear)."""
_IDLE = 3
"""Starts in a row that lead to nothing better, after which a search without a budget ends."""


def plan(
    network: Network,
    sizes: Mapping[str, int],
    objective: Objective = FLOPS,
    requires_grad: Set[str] = frozenset(),
    *,
    budget: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ContractionPath:
    """A good order of a large network.

    Args:
        network: any number of tensors.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps.
        requires_grad: names of the tensors that need a gradient, for the objectives about training.
        budget: seconds to search, about; None for a fixed amount of work.
        seed: of the random starts.
        progress: is told how far the search is.

    What is found is kept in the cache (`tnmoe.io.cache`), under the network's structure and all other arguments.

    Raises:
        PlanError: a budget that is no positive number, or an unknown objective.
    """
    effort = Effort(budget, _UNITS, progress)
    n = len(network.tensors)
    if n < 3:
        return ContractionPath(((0, 1),) if n == 2 else (), _name())
    depends = {"budget": budget, "seed": seed, "planner": _name(), "version": VERSION}

    def search() -> ContractionPath:
        return path_of(best(Steps(network, sizes, objective, requires_grad), effort, seed), n, _name())

    return kept_path("search", network, sizes, objective, requires_grad, depends, search)


def _name() -> str:
    return "search" if cotengra.INSTALLED else "search without cotengra"


def best(steps: Steps, effort: Effort, seed: int = 0) -> Splits:
    """The cheapest tree that is found within the effort."""
    cheapest: Splits | None = None
    idle = 0
    effort.tell()
    for start in _starts(steps, effort, seed):
        tree = start
        for most in _PIECES:
            if most == _PIECES[-1] and cheapest is not None and 2 * steps.total(tree) > 3 * steps.total(cheapest):
                break
            tree = reconfigure(steps, tree, most, effort)
        effort.tell()
        idle += 1
        if cheapest is None or steps.total(tree) < steps.total(cheapest):
            cheapest, idle = tree, 0
        if effort.over or (effort.budget is None and idle == _IDLE):
            break
    assert cheapest is not None
    return cheapest


def _starts(steps: Steps, effort: Effort, seed: int) -> Iterator[Splits]:
    """Trees to improve, without end: the cheapest at hand, the cheapest of other kinds, then greedy ones for ever."""
    rng = random.Random(seed)
    groups = [[random_greedy.tree(steps.network, steps.sizes, rng), *_noisy(steps, effort, rng)]]
    if cotengra.INSTALLED:
        groups.append([])
        for path in cotengra.candidates(steps.network, steps.sizes, seed):
            groups[-1].append(splits_of(path, len(steps.network.tensors)))
            if effort.late:
                break
    yield from sorted((min(group, key=steps.total) for group in groups), key=steps.total)
    while True:
        yield min(_noisy(steps, effort, rng), key=steps.total)


def _noisy(steps: Steps, effort: Effort, rng: random.Random) -> Iterator[Splits]:
    for _ in range(_STARTS):
        weight, temperature = rng.uniform(0.1, 2.0), 10 ** rng.uniform(-2, 0.5)
        yield random_greedy.tree(steps.network, steps.sizes, rng, weight, temperature)
        if effort.late:
            break
