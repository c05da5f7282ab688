"""Exact planning while sizes are unknown: dynamic programming over subsets of tensors, on cost polynomials.

As with known sizes, what a subset costs depends on the subset alone; but instead of one cheapest order, each subset
keeps every order that no other is below everywhere on the bounds. A dominated part can be replaced in any order
that uses it without making that order dearer anywhere, so what is kept for the whole network holds a cheapest order
for every size within the bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from tnmoe.costing.objective import ForwardPrice
from tnmoe.costing.prices import forward_price
from tnmoe.errors import PlanError
from tnmoe.ir.layer import Contraction
from tnmoe.ir.network import Network
from tnmoe.ir.ops import Op
from tnmoe.ir.path import ContractionPath, Tree
from tnmoe.ir.value import Value
from tnmoe.lowering.lower import Operand, leaf_operands, lower_network, lower_step
from tnmoe.planners.atlas.dominance import Domain, Rows, join
from tnmoe.planners.atlas.polynomial import Polynomial

MAX_TENSORS = 11

MOST_WORK = 2 * 10**10
"""Pairs of corner numbers that may be compared: about half a minute."""

_BATCH = 4_000_000
"""Corner numbers that are added at a time, to bound memory."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """What a step costs: a price, and how often a step that no data reaches is paid for.

    Attributes:
        objective: "flops" or "macs".
        calls: a step below which there is data is paid this often, all others once.
        constant: names of the tensors that do not change between calls.
    """

    objective: ForwardPrice
    calls: int = 1
    constant: frozenset[str] = frozenset()

    def step(self, ops: tuple[Op, ...], network: Network, subset: int) -> Polynomial:
        """The cost of the ops that join a subset (a bit mask) of the tensors."""
        sizes = {i: Polynomial.variable(i) for i in network.indices}
        # The price adds and multiplies sizes and nothing else, which polynomials do as well.
        cost = Polynomial.of(forward_price(ops, cast(Mapping[str, int], sizes), self.objective))
        data = any(subset >> k & 1 and t.name not in self.constant for k, t in enumerate(network.tensors))
        return cost * (self.calls if data else 1)


@dataclass(frozen=True, slots=True)
class Kept:
    """An undominated order of a subset.

    Attributes:
        cost: of the whole order.
        split: the two parts as (subset, place in its list), data (low) part first; None for a leaf.
    """

    cost: Polynomial
    split: tuple[tuple[int, int], tuple[int, int]] | None = None


def path_cost(network: Network, path: ContractionPath, pricing: Pricing) -> Polynomial:
    """The cost polynomial of any order.

    Raises:
        PlanError: if the path does not fit the network.
    """
    n = len(network.tensors)
    path.check(n)
    if n == 1:
        return pricing.step(lower_network(Contraction(Value("_", network.output), network), path), network, 1)
    live = dict(enumerate(leaf_operands(network)))
    masks = {k: 1 << k for k in range(n)}
    total = Polynomial()
    for k, (i, j) in enumerate(path.steps):
        subset = masks[n + k] = masks[i] | masks[j]
        ops, live[n + k] = lower_step(
            live[i], live[j], network.kept([k for k in range(len(network.tensors)) if subset >> k & 1]), "_"
        )
        total += pricing.step(ops, network, subset)
    return total


def candidates(network: Network, domain: Domain, pricing: Pricing, most: int = MOST_WORK) -> dict[int, list[Kept]]:
    """The undominated orders of every subset (a bit mask) of at most 11 tensors.

    Raises:
        PlanError: if there are more tensors, or finding the orders would take more than `most` comparisons.
    """
    n = len(network.tensors)
    if n > MAX_TENSORS:
        raise PlanError(f"an atlas takes up to {MAX_TENSORS} tensors, this network has {n}; plan it at concrete sizes")
    if n == 1:
        return {1: [Kept(path_cost(network, ContractionPath(()), pricing))]}
    search = _Search(network, domain, pricing, most)
    for subset in range(1, 1 << n):
        if subset & (subset - 1):
            search.solve(subset)
    return search.kept


def path_of(kept: Mapping[int, list[Kept]], subset: int, place: int, tensors: int) -> ContractionPath:
    """The order behind one entry of `candidates`."""

    def nested(subset: int, place: int) -> Tree:
        split = kept[subset][place].split
        if split is None:
            return subset.bit_length() - 1
        left, right = split
        return nested(*left), nested(*right)

    return ContractionPath.from_tree(nested(subset, place), tensors, "atlas")


@dataclass(frozen=True, slots=True)
class _Split:
    left: int
    right: int
    cost: Polynomial
    step: Rows
    least: Rows


class _Search:
    """The tables of the dynamic program."""

    def __init__(self, network: Network, domain: Domain, pricing: Pricing, most: int) -> None:
        self.network, self.domain, self.pricing, self.most = network, domain, pricing, most
        self.work = 0
        self.kept: dict[int, list[Kept]] = {}
        self.rows: dict[int, Rows] = {}
        self.least: dict[int, Rows] = {}
        self.indices: dict[int, tuple[str, ...]] = {}
        self.operand: dict[int, Operand] = {}
        self.known: dict[object, tuple[Polynomial, Operand]] = {}
        for k, operand in enumerate(leaf_operands(network)):
            self.operand[1 << k] = operand
            self.indices[1 << k] = tuple(i for i in domain.free if i in network.tensors[k].indices)
            self._store(1 << k, [Kept(Polynomial())], domain.rows([Polynomial()], self.indices[1 << k]))

    def _store(self, subset: int, kept: list[Kept], rows: Rows) -> None:
        self.kept[subset], self.rows[subset], self.least[subset] = kept, rows, rows.least()

    def solve(self, subset: int) -> None:
        """Fill in a subset whose parts are all known."""
        low = subset & -subset
        held = set(self.indices[low]) | set(self.indices[subset ^ low])
        indices = self.indices[subset] = tuple(i for i in self.domain.free if i in held)
        splits = self._splits(subset)
        best: Rows | None = None
        origin: list[tuple[_Split, int, int]] = []
        for split in splits:
            if best is not None and _any_below(best, split.least):
                continue
            left = self._part(split.left, indices)
            right = self._part(split.right, indices)
            few = np.arange(len(left))
            if best is not None and len(left) > 1:
                floor = left + self._least(split.right, indices) + split.step
                few = np.array([k for k in few if not _any_below(best, floor[k : k + 1])], dtype=np.intp)
            block = max(1, _BATCH // (len(right) * right.approx.shape[1]))
            for start in range(0, len(few), block):
                chosen = few[start : start + block]
                pairs = [(int(i), j) for i in chosen for j in range(len(right))]
                i, j = (np.array([p[side] for p in pairs]) for side in (0, 1))
                rows = left[i] + right[j] + split.step
                new = [(split, a, b) for a, b in pairs]
                self._spend(subset, len(rows) * (len(rows) if best is None else len(best)) * rows.approx.shape[1])
                if best is not None:
                    fresh = [k for k in range(len(rows)) if not _any_below(best, rows[k : k + 1])]
                    rows, new = rows[fresh], [new[k] for k in fresh]
                survivors = rows.undominated()
                rows, new = rows[survivors], [new[k] for k in survivors]
                if best is None:
                    best, origin = rows, new
                elif new:
                    still = np.ones(len(best), dtype=bool)
                    for k in range(len(rows)):
                        still &= ~best.above(rows[k : k + 1])
                    origin = [o for o, s in zip(origin, still, strict=True) if s] + new
                    best = join([best[still], rows])
        assert best is not None
        kept = []
        for split, i_, j_ in origin:
            cost = split.cost + self.kept[split.left][i_].cost + self.kept[split.right][j_].cost
            kept.append(Kept(cost, ((split.left, i_), (split.right, j_))))
        self._store(subset, kept, best)

    def _spend(self, subset: int, work: int) -> None:
        """Count work; raise where there is too much of it."""
        self.work += work
        if self.work > self.most:
            raise PlanError(
                f"too many orders may be optimal within these bounds: the first {subset.bit_count()} of "
                f"{len(self.network.tensors)} tensors alone have {max(map(len, self.kept.values())):,} or more, and "
                f"{self.most:,} comparisons are allowed (most=); raise the lower bounds, fix sizes that are known, or "
                f"plan at concrete sizes"
            )

    def _splits(self, subset: int) -> list[_Split]:
        """Every way to part a subset in two, the most promising first."""
        indices = self.indices[subset]
        keep = self.network.kept([k for k in range(len(self.network.tensors)) if subset >> k & 1])
        rest = subset & (subset - 1)  # all but the lowest tensor, so each split is met once
        splits = []
        vectors: dict[Polynomial, Rows] = {}
        part = rest
        while part:
            left, right = subset ^ part, part
            cost, self.operand[subset] = self._step(left, right, keep)
            if cost not in vectors:
                vectors[cost] = self.domain.rows([cost], indices)
            step = vectors[cost]
            splits.append(
                _Split(left, right, cost, step, step + self._least(left, indices) + self._least(right, indices))
            )
            part = (part - 1) & rest
        splits.sort(key=lambda s: float(np.log1p(s.least.approx).sum()))
        return splits

    def _step(self, left: int, right: int, keep: frozenset[str]) -> tuple[Polynomial, Operand]:
        lhs, rhs, subset = self.operand[left], self.operand[right], left | right
        key = (_shape(lhs), _shape(rhs), subset)
        if key not in self.known:
            ops, result = lower_step(lhs, rhs, keep, "_")
            self.known[key] = self.pricing.step(ops, self.network, subset), result
        return self.known[key]

    def _part(self, subset: int, indices: tuple[str, ...]) -> Rows:
        return self.domain.widen(self.rows[subset], self.indices[subset], indices)

    def _least(self, subset: int, indices: tuple[str, ...]) -> Rows:
        return self.domain.widen(self.least[subset], self.indices[subset], indices)


def _any_below(rows: Rows, other: Rows) -> bool:
    """Is one of the rows below or equal to `other` (one row) in every corner?"""
    return bool(rows.below(other).any())


def _shape(operand: Operand) -> object:
    extra = operand.extra.indices if operand.extra is not None else None
    return operand.main.indices, operand.folded, extra
