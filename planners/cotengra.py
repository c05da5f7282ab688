"""Orders by cotengra (an extra), for networks that are too large for the exact planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import Any

from tnmoe.costing.objective import MACS, Objective
from tnmoe.errors import PlanError
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planners.pairs import pairwise

try:
    import cotengra
except ImportError:  # it is an extra
    cotengra = None

INSTALLED = cotengra is not None

_CANDIDATES = 8


def plan(
    network: Network,
    sizes: Mapping[str, int],
    objective: Objective = MACS,
    requires_grad: Set[str] = frozenset(),
    optimizer: Any = None,
) -> ContractionPath:
    """The path cotengra finds; it minimises its own count, one operation per product, whatever the objective.

    Args:
        network: a folded bias is planned as if its index had the size of the data alone.
        sizes: an integer for every index.
        objective, requires_grad: recorded by the caller; cotengra's own count is used.
        optimizer: a cotengra optimizer, by default its exact one up to 12 tensors and random greedy above.

    Raises:
        PlanError: if cotengra is not installed.
    """
    if cotengra is None:
        raise PlanError("cotengra is not installed; pip install 'tnmoe[cotengra]'")
    if len(network.tensors) == 1:
        return ContractionPath((), "cotengra")
    if optimizer is None:
        if len(network.tensors) <= 12:
            optimizer = cotengra.OptimalOptimizer(minimize="flops", search_outer=True, simplify=False)
        else:
            optimizer = _random_greedy(128, 0)
    # Its compiled core takes single letters alone; and it misprices an index of one tensor alone, which is summed
    # before anything else in every order.
    letter = {index: cotengra.get_symbol(k) for k, index in enumerate(network.indices)}
    count = Counter(i for t in network.tensors for i in t.indices)
    needed = {i for i in network.indices if count[i] > 1 or i in network.output}
    inputs = [tuple(letter[i] for i in t.indices if i in needed) for t in network.tensors]
    ssa = optimizer.ssa_path(inputs, tuple(letter[i] for i in network.output), {letter[i]: sizes[i] for i in needed})
    return ContractionPath(pairwise(ssa, len(inputs)), "cotengra")


def candidates(network: Network, sizes: Mapping[str, int], seed: int = 0) -> Iterator[ContractionPath]:
    """Some good orders, to be priced by the caller: the best of a few trials each, and last the one `plan` gives.

    Raises:
        PlanError: if cotengra is not installed.
    """
    for k in range(_CANDIDATES):
        yield plan(network, sizes, optimizer=_random_greedy(4, 1 + seed * _CANDIDATES + k))
    yield plan(network, sizes)


def _random_greedy(trials: int, seed: int) -> Any:
    # In this thread alone: it is seeded, and few trials do not pay for workers.
    return cotengra.RandomGreedyOptimizer(max_repeats=trials, seed=seed, parallel=False)
