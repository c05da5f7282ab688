"""The cheapest few orders, by dynamic programming over subsets that keeps several trees for each.

Exact like `subset_dp`, and slower, since nothing can be left out by a bound. It answers how much better the best
order is than the next, and gives candidates to those who measure.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Set
from dataclasses import dataclass

from tnmoe.costing.objective import FLOPS, Objective
from tnmoe.costing.prices import Prices
from tnmoe.errors import PlanError
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath, Tree
from tnmoe.lowering.lower import Operand, leaf_operands, lower_step

MAX_TENSORS = 10


@dataclass(frozen=True, slots=True)
class Ranked:
    """An order and its price under the objective."""

    price: int
    path: ContractionPath


@dataclass(frozen=True, slots=True)
class _Tree:
    """One way to contract a subset: its split, and which of the trees of either part it takes."""

    price: int
    left: tuple[int, int] | None = None
    right: tuple[int, int] | None = None


def plan(
    network: Network,
    sizes: Mapping[str, int],
    objective: Objective = FLOPS,
    requires_grad: Set[str] = frozenset(),
    count: int = 2,
) -> tuple[Ranked, ...]:
    """The `count` cheapest trees (or all, if there are fewer), the cheapest first.

    Args:
        network: up to 10 tensors.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps.
        requires_grad: names of the tensors that need a gradient, for the objectives about training.
        count: how many; trees that differ only in the order of their operands are one.

    Raises:
        PlanError: if there are more than 10 tensors, or the objective is unknown.
    """
    prices = Prices(network, sizes, objective, requires_grad)
    n = len(network.tensors)
    if n > MAX_TENSORS:
        raise PlanError(f"ranking takes up to {MAX_TENSORS} tensors, this network has {n}; take the best order alone")
    full = (1 << n) - 1
    operand: dict[int, Operand] = {1 << k: leaf for k, leaf in enumerate(leaf_operands(network))}
    trees: dict[int, list[_Tree]] = {1 << k: [_Tree(0)] for k in range(n)}
    for subset in range(1, full + 1):
        if subset in trees:
            continue
        keep = network.kept([k for k in range(n) if subset >> k & 1])
        ways: list[_Tree] = []
        rest = subset & (subset - 1)
        part = rest
        while part:
            other = subset ^ part
            ops, operand[subset] = lower_step(operand[other], operand[part], keep, f"_{subset}")
            step = prices.of(ops)
            ways += [
                _Tree(left.price + right.price + step, (other, i), (part, j))
                for i, left in enumerate(trees[other])
                for j, right in enumerate(trees[part][: count // (i + 1)])  # the rest has enough below it
            ]
            part = (part - 1) & rest
        prices.follow(ops)
        trees[subset] = heapq.nsmallest(count, ways, key=lambda tree: tree.price)
    return tuple(
        Ranked(tree.price, ContractionPath.from_tree(_nested(trees, full, tree), n, "ranked", exact=k == 0))
        for k, tree in enumerate(trees[full])
    )


def _nested(trees: Mapping[int, list[_Tree]], subset: int, tree: _Tree) -> Tree:
    if tree.left is None or tree.right is None:
        return subset.bit_length() - 1
    (left, i), (right, j) = tree.left, tree.right
    return _nested(trees, left, trees[left][i]), _nested(trees, right, trees[right][j])
