"""Contraction trees as the split of every subset of tensors that they make, and the exact price of each step.

The operands of a step, as far as its price goes, depend on the two subsets of tensors alone, whatever tree they stand
in. So prices are remembered by pairs of subsets (bit masks), and planners that compare many trees of one network
price each step once, by `lower_step` and `Prices` as all planners do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set

from tnmoe.costing.objective import Objective
from tnmoe.costing.prices import Prices
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath, Tree
from tnmoe.lowering.lower import Operand, leaf_operands, lower_step

Splits = dict[int, tuple[int, int]]
"""The two parts of every subset that a tree makes; the last one is of all tensors."""


class Steps:
    """The steps that trees of one network are made of.

    Args:
        network: any number of tensors.
        sizes: an integer for every index.
        objective: what is minimised, a sum over steps.
        requires_grad: names of the tensors that need a gradient, for the objectives about training.
    """

    def __init__(
        self, network: Network, sizes: Mapping[str, int], objective: Objective, requires_grad: Set[str] = frozenset()
    ) -> None:
        self.network, self.sizes, self.objective = network, sizes, objective
        self.prices = Prices(network, sizes, objective, requires_grad)
        self.full = (1 << len(network.tensors)) - 1
        self.operand: dict[int, Operand] = {1 << k: leaf for k, leaf in enumerate(leaf_operands(network))}
        self._outside = {
            i: -1 if i in network.output else sum(1 << k for k, t in enumerate(network.tensors) if i in t.indices)
            for i in network.indices
        }
        self._known: dict[tuple[int, int], int] = {}

    def kept(self, subset: int) -> frozenset[str]:
        """Indices that the output or a tensor outside the subset needs."""
        return frozenset([i for i, holders in self._outside.items() if holders & ~subset])

    def price(self, left: int, right: int) -> int:
        """The price of the step that joins two subsets whose own steps were priced before."""
        key = (left, right) if left < right else (right, left)
        if key not in self._known:
            lhs, rhs, subset = self.operand[key[0]], self.operand[key[1]], left | right
            ops, result = lower_step(lhs, rhs, self.kept(subset), f"_{subset}")
            self.operand.setdefault(subset, result)
            self._known[key] = self.prices.of(ops)
            self.prices.follow(ops)
        return self._known[key]

    def total(self, splits: Splits, top: int | None = None) -> int:
        """The price of a tree, or of the part of it that makes the subset `top`."""
        return sum([self.price(*splits[subset]) for subset in upwards(splits, self.full if top is None else top)])

    def elements(self, subset: int) -> int:
        """Elements of the result of a subset whose step was priced before."""
        return math.prod([self.sizes[i] for i in self.operand[subset].main.indices])


def upwards(splits: Splits, top: int) -> Iterator[int]:
    """The subsets of the tree below `top` that are made by a step, parts first."""
    made, open_ = [], [top]
    while open_:
        subset = open_.pop()
        if subset in splits:
            made.append(subset)
            open_ += splits[subset]
    return reversed(made)


def splits_of(path: ContractionPath, tensors: int) -> Splits:
    """The tree of a path."""
    mask = [1 << k for k in range(tensors)]
    splits: Splits = {}
    for i, j in path.steps:
        splits[mask[i] | mask[j]] = mask[i], mask[j]
        mask.append(mask[i] | mask[j])
    return splits


def path_of(splits: Splits, tensors: int, planner: str) -> ContractionPath:
    """The path of a tree."""
    trees: dict[int, Tree] = {1 << k: k for k in range(tensors)}
    full = (1 << tensors) - 1
    for subset in upwards(splits, full):
        left, right = splits[subset]
        trees[subset] = trees[left], trees[right]
    return ContractionPath.from_tree(trees[full], tensors, planner)
