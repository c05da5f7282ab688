"""Exact planning for memory: the least peak of one network's intermediates, and the cheapest order within a limit.

What is alive between two steps depends only on which tensors have been contracted into which groups, so a search over
the partitions of the tensors sees every tree in every order of its steps; also those that begin one part, turn to
another and come back, which evaluating part after part misses (Liu, 1987, "An application of generalized tree
pebbling"). The least peak is a bottleneck shortest path. The cheapest order within a limit is a shortest path by A*,
whose bound on what is left is exact where the limit does not matter: the price of the cheapest tree, less those of the
cheapest trees of the groups there are. n tensors have Bell(n) partitions: 4,140 for 8, 21,147 for 9.

All figures count elements. Copies that an odd order of axes needs are not seen.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import combinations

from tnmoe.costing.objective import Objective
from tnmoe.costing.prices import Prices
from tnmoe.errors import PlanError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.network import Network
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.path import ContractionPath
from tnmoe.lowering.fuse_bias import fused
from tnmoe.lowering.lower import Operand, leaf_operands, lower_step

MAX_TENSORS = 9

NAME = "peak"
"""What its paths say of who made them."""

State = tuple[int, ...]
"""The groups that the tensors have been contracted into, as sorted bit masks."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Contracting two groups: elements that it needs beyond those that are alive before it, and its price."""

    room: int
    price: int


class Space:
    """The partitions of one network, and the steps between them.

    Args:
        network: up to 9 tensors.
        sizes: an integer for every index.
        objective: what a step costs; a price of the forward pass.
        dying: names of the tensors whose memory is released after they are read; all others stay.

    Raises:
        PlanError: more than 9 tensors, or an objective that is about training or folding.
    """

    def __init__(self, network: Network, sizes: Mapping[str, int], objective: Objective, dying: Set[str]) -> None:
        n = len(network.tensors)
        if n > MAX_TENSORS:
            raise PlanError(f"memory is planned for up to {MAX_TENSORS} tensors, this network has {n}")
        self.network, self.sizes = network, sizes
        self.prices = Prices(network, sizes, objective)
        if not objective.names <= {"flops", "macs"}:
            raise PlanError(f"memory is planned with a price of the forward pass, not with {str(objective)!r}")
        self.full = (1 << n) - 1
        self.start: State = tuple(1 << k for k in range(n))
        self._stays = network.leaf_names - set(dying)
        self._operand: dict[int, Operand] = {1 << k: leaf for k, leaf in enumerate(leaf_operands(network))}
        self._held: dict[int, dict[str, int]] = {group: self._holds(o) for group, o in self._operand.items()}
        self._alive: dict[int, int] = {}
        self._steps: dict[tuple[int, int], _Step] = {}
        self._least: dict[int, int] = dict.fromkeys(self.start, 0)

    def alive(self, group: int) -> int:
        """Elements that a group holds once it is contracted."""
        if group not in self._alive:
            self._operand_of(group)
            self._alive[group] = sum(self._held[group].values())
        return self._alive[group]

    def step(self, left: int, right: int) -> _Step:
        """The step that contracts two groups."""
        key = (left, right) if left < right else (right, left)
        if key not in self._steps:
            lhs, rhs = (self._operand_of(group) for group in key)
            inside = [k for k in range(len(self.network.tensors)) if (left | right) >> k & 1]
            ops, result = lower_step(lhs, rhs, self.network.kept(inside), f"_{left | right}")
            ops = fused(ops, frozenset(v.name for v in (result.main, result.extra) if v is not None))
            if left | right not in self._operand:
                self._operand[left | right] = result
                self._held[left | right] = self._holds(result)
            alive = self._held[key[0]] | self._held[key[1]]
            self._steps[key] = _Step(self._room(ops, alive, self._holds(result)), self.prices.of(ops))
        return self._steps[key]

    def moves(self, state: State) -> Iterator[tuple[State, int, int, int]]:
        """Every step from a state: the state it leads to, its two groups, and the peak while it runs."""
        alive = sum(self.alive(group) for group in state)
        for left, right in combinations(state, 2):
            rest = tuple(sorted((*(g for g in state if g not in (left, right)), left | right)))
            yield rest, left, right, alive + self.step(left, right).room

    def least_price(self, group: int) -> int:
        """The price of the cheapest tree of a group, whatever it holds."""
        if group not in self._least:
            rest = part = group & (group - 1)
            best = None
            while part:
                other = group ^ part
                price = self.least_price(part) + self.least_price(other) + self.step(part, other).price
                best = price if best is None else min(best, price)
                part = (part - 1) & rest
            assert best is not None
            self._least[group] = best
        return self._least[group]

    def _operand_of(self, group: int) -> Operand:
        if group not in self._operand:
            self.step(group & -group, group ^ (group & -group))
        return self._operand[group]

    def _holds(self, operand: Operand) -> dict[str, int]:
        parts = [v for v in (operand.main, operand.extra) if v is not None]
        return {v.name: self._count(v.indices) for v in parts if v.name not in self._stays}

    def _room(self, ops: tuple[Op, ...], alive: Mapping[str, int], after: Mapping[str, int]) -> int:
        """The most elements beyond `alive` while the ops run, each value released after its last use."""
        last = {v.name: k for k, op in enumerate(ops) for v in operands(op)}
        held, most = dict(alive), 0
        for k, op in enumerate(ops):
            for name in [n for n in held if last.get(n, -1) < k and n not in after]:
                del held[name]
            held[op.out.name] = self._count(op.out.indices)
            most = max(most, sum(held.values()))
        return most - sum(alive.values())

    def _count(self, indices: tuple[str, ...]) -> int:
        return int(elements(indices, self.sizes))


def least_peak(space: Space) -> int:
    """The least peak that any tree, in any order of its steps, can have."""
    if len(space.start) == 1:
        return _single(space)
    queue = [(0, len(space.start), space.start)]
    done: set[State] = set()
    while True:
        peak, groups, state = heapq.heappop(queue)
        if groups == 1:
            return peak
        if state in done:
            continue
        done.add(state)
        for rest, _, _, during in space.moves(state):
            if rest not in done:
                heapq.heappush(queue, (max(peak, during), groups - 1, rest))


def cheapest(space: Space, limit: int) -> ContractionPath | None:
    """The cheapest order whose peak is at most `limit`, in the order of steps that meets it; None if none does."""
    if len(space.start) == 1:
        return ContractionPath((), NAME, exact=True) if _single(space) <= limit else None
    price: dict[State, int] = {space.start: 0}
    via: dict[State, tuple[State, int, int]] = {}
    queue = [(0, len(space.start), space.start)]
    done: set[State] = set()
    while queue:
        _, groups, state = heapq.heappop(queue)
        if groups == 1:
            return _path(space, via, state)
        if state in done:
            continue
        done.add(state)
        for rest, left, right, during in space.moves(state):
            if during > limit or rest in done:
                continue
            total = price[state] + space.step(left, right).price
            if rest not in price or total < price[rest]:
                price[rest], via[rest] = total, (state, left, right)
                bound = total - sum(space.least_price(group) for group in rest)
                heapq.heappush(queue, (bound, groups - 1, rest))
    return None


def _single(space: Space) -> int:
    """A single tensor is summed or copied beside itself."""
    (tensor,) = space.network.tensors
    return space.alive(1) + int(elements(tuple(i for i in tensor.indices if i in space.network.output), space.sizes))


def _path(space: Space, via: Mapping[State, tuple[State, int, int]], end: State) -> ContractionPath:
    pairs: list[tuple[int, int]] = []
    while end in via:
        end, left, right = via[end]
        pairs.append((left, right))
    name = {group: k for k, group in enumerate(space.start)}
    steps: list[tuple[int, int]] = []
    for left, right in reversed(pairs):
        steps.append((name[left], name[right]))
        name[left | right] = len(space.start) + len(steps) - 1
    return ContractionPath(tuple(steps), NAME, exact=True)
