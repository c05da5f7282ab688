"""Greedy planning for networks beyond the exact planner: always the pair whose step is cheapest for its gain."""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import combinations

from tnmoe.costing.objective import FLOPS, Objective
from tnmoe.costing.prices import Prices
from tnmoe.ir.dataflow import elements
from tnmoe.ir.network import Network
from tnmoe.ir.ops import Op
from tnmoe.ir.path import ContractionPath
from tnmoe.lowering.lower import Operand, leaf_operands, lower_step


def plan(
    network: Network, sizes: Mapping[str, int], objective: Objective = FLOPS, requires_grad: Set[str] = frozenset()
) -> ContractionPath:
    """Contract the pair with the smallest growth in size, and of those the one with the cheapest step.

    Args:
        network: any number of tensors.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps; it decides between pairs of equal growth.
        requires_grad: names of the tensors that need a gradient, for the objectives about training.

    Raises:
        PlanError: if the objective is unknown.
    """
    prices = Prices(network, sizes, objective, requires_grad)
    live: dict[int, Operand] = dict(enumerate(leaf_operands(network)))
    inside = {k: frozenset([k]) for k in live}
    steps: list[tuple[int, int]] = []
    # What a pair costs depends on nothing but the pair, so each is lowered once: O(n²) steps.
    options: dict[tuple[int, int], tuple[tuple[int, int], tuple[Op, ...], Operand]] = {}

    def consider(i: int, j: int) -> None:
        ops, result = lower_step(live[i], live[j], network.kept(inside[i] | inside[j]), f"_{i}_{j}")
        growth = _size(result, sizes) - _size(live[i], sizes) - _size(live[j], sizes)
        options[i, j] = (growth, prices.of(ops)), ops, result

    for i, j in combinations(live, 2):
        consider(i, j)
    while len(live) > 1:
        i, j = min(options, key=lambda pair: (options[pair][0], pair))
        _, ops, result = options[i, j]
        prices.follow(ops)
        new = len(network.tensors) + len(steps)
        steps.append((i, j))
        inside[new] = inside.pop(i) | inside.pop(j)
        del live[i], live[j]
        options = {pair: option for pair, option in options.items() if not {i, j} & set(pair)}
        live[new] = result
        for k in list(live)[:-1]:
            consider(k, new)
    return ContractionPath(tuple(steps), "greedy")


def _size(operand: Operand, sizes: Mapping[str, int]) -> int:
    total = elements(operand.main.indices, sizes)
    assert isinstance(total, int)
    return total
