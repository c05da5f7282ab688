"""Every contraction tree of a network, and what one costs, by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tnmoe import (
    Network,
    Plan,
    Role,
    Tensor,
)
from tnmoe.backends.numpy.execute import execute
from tnmoe.ir.network import FoldedBias

Indices = frozenset[str]

Steps = tuple[tuple[int, int], ...]


# ---- the oracle ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Prices by hand: (flops, macs) of a step, of a path, and of the best order, without a folded bias."""

    network: Network
    sizes: Mapping[str, int]

    @property
    def leaves(self) -> list[Indices]:
        return [frozenset(t.indices) for t in self.network.tensors]

    def volume(self, indices: Indices) -> int:
        return math.prod([self.sizes[i] for i in indices])

    def step(self, a: Indices, b: Indices, needed: Indices) -> tuple[int, int, Indices]:
        """Flops, macs and result of one step; `needed` are the indices of the output and of all other operands."""
        alone = 0
        for one, other in ((a, b), (b, a)):
            if one - other - needed:  # a private index is summed out first: one addition per entry
                alone += self.volume(one)
        joint = (a & b) | ((a | b) & needed)
        macs = self.volume(joint)
        return alone + (macs if joint <= needed else 2 * macs), macs, joint & needed

    def alone(self) -> tuple[int, int]:
        """A single tensor is at most summed."""
        (leaf,) = self.leaves
        return (self.volume(leaf) if leaf - set(self.network.output) else 0), 0

    def path(self, steps: Steps) -> tuple[int, int]:
        """Flops and macs of a path; what a step keeps is read off the operands that are then alive."""
        if not steps:
            return self.alone()
        live = dict(enumerate(self.leaves))
        flops = macs = 0
        for k, (i, j) in enumerate(steps):
            a, b = live.pop(i), live.pop(j)
            f, m, live[len(self.leaves) + k] = self.step(a, b, frozenset(self.network.output).union(*live.values()))
            flops, macs = flops + f, macs + m
        assert len(live) == 1
        return flops, macs

    def enumerated(self) -> tuple[int, int]:
        """The least flops and the least macs over every order of pairwise contractions, one after the other."""
        output = frozenset(self.network.output)
        best = [math.inf, math.inf]

        def descend(live: list[Indices], flops: int, macs: int) -> None:
            if len(live) == 1:
                best[:] = min(best[0], flops), min(best[1], macs)
                return
            for i, j in itertools.combinations(range(len(live)), 2):
                rest = live[:i] + live[i + 1 : j] + live[j + 1 :]
                f, m, result = self.step(live[i], live[j], output.union(*rest))
                descend([*rest, result], flops + f, macs + m)

        descend(self.leaves, 0, 0)
        return int(best[0]), int(best[1])

    def optimum(self) -> tuple[int, int]:
        """The least flops and the least macs, each over all trees; subsets are remembered to be fast."""
        everything = frozenset(range(len(self.leaves)))
        memo: dict[frozenset[int], tuple[int, int, Indices]] = {
            frozenset([k]): (0, 0, leaf) for k, leaf in enumerate(self.leaves)
        }

        def solve(subset: frozenset[int]) -> tuple[int, int, Indices]:
            if subset not in memo:
                outside = (self.leaves[k] for k in everything - subset)
                needed = frozenset(self.network.output).union(*outside)
                first, *others = sorted(subset)
                options = []
                for size in range(len(others)):
                    for chosen in itertools.combinations(others, size):
                        left = frozenset([first, *chosen])
                        (lf, lm, a), (rf, rm, b) = solve(left), solve(subset - left)
                        f, m, result = self.step(a, b, needed)
                        options.append((lf + rf + f, lm + rm + m, result))
                memo[subset] = min(o[0] for o in options), min(o[1] for o in options), options[0][2]
            return memo[subset]

        flops, macs, _ = solve(everything)
        return flops, macs


def every_tree(tensors: int) -> Iterator[Steps]:
    """SSA steps of every binary tree over so many leaves, each tree once: (2n - 3)!! of them."""

    def trees(leaves: tuple[int, ...]) -> Iterator[Any]:
        if len(leaves) == 1:
            yield leaves[0]
            return
        first, *rest = leaves
        for mask in range(2 ** len(rest) - 1):
            left = (first, *(x for k, x in enumerate(rest) if mask >> k & 1))
            right = tuple(x for x in rest if x not in left)
            yield from itertools.product(trees(left), trees(right))

    for tree in trees(tuple(range(tensors))):
        steps: list[tuple[int, int]] = []

        def contract(node: Any, steps: list[tuple[int, int]] = steps) -> int:
            if isinstance(node, int):
                return node
            i, j = (contract(child) for child in node)
            steps.append((i, j))
            return tensors + len(steps) - 1

        contract(tree)
        yield tuple(steps)


def value(planned: Plan, arrays: Mapping[str, Any]) -> Any:
    """What the lowered program computes, in NumPy, from arrays with axes as declared (weights are stored otherwise)."""
    (node,) = planned.layer.contractions
    stored = {
        leaf.name: np.einsum(arrays[leaf.name], *_axes(node.network.tensor(leaf.name).indices, leaf.indices))
        for leaf in planned.program.leaves
    }
    return execute(planned.program, stored)[planned.program.output.name]


def _axes(declared: tuple[str, ...], stored: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Axes of an array as numbers, for `np.einsum` to bring one order into the other."""
    return [*range(len(declared))], [declared.index(i) for i in stored]


def folded(expression: str, data: str, weight: str, index: str) -> Network:
    """An expression whose terms `data` and `weight` fold a bias over `index`."""
    network = Network.parse(expression, weights=weight)
    rest = tuple(i for i in network.tensor(weight).indices if i != index)
    return Network(network.tensors, network.output, FoldedBias(index, data, weight, Tensor("bias", rest, Role.WEIGHT)))
