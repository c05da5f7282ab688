"""Sizes at which one polynomial is strictly the smallest of several: sampling, then hill climbing, then proof.

Points are drawn on a logarithmic scale in several shapes, rounded to integers and compared in floats; what looks
like a winner is checked in exact integers. Seeded, so the same polynomials give the same witnesses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.planners.atlas.dominance import Domain
from tnmoe.planners.atlas.polynomial import Polynomial

Sizes = dict[str, int]

_BATCH = 2000
_REACH = 2**40
"""How far above its lower bound an open index is searched; sizes stay exact in floats."""


def wins(place: int, costs: Sequence[Polynomial], sizes: Sizes) -> bool:
    """Is `costs[place]` strictly the smallest at these sizes?"""
    own = costs[place].at(sizes)
    return all(k == place or cost.at(sizes) > own for k, cost in enumerate(costs))


class WitnessSearch:
    """Searches among given costs over a domain."""

    def __init__(self, costs: Sequence[Polynomial], domain: Domain, seed: int = 0) -> None:
        self.costs, self.domain = costs, domain
        self.rng = np.random.default_rng(seed)
        self.indices = list(domain.bounds)
        pairs = domain.bounds.values()
        self.low = np.array([low for low, _ in pairs], dtype=np.float64)
        self.high = np.array([low * _REACH if high is None else high for low, high in pairs], dtype=np.float64)
        monomials = sorted({m for c in costs for m in c.terms}, key=sorted)
        self.exponents = np.array([[i in m for m in monomials] for i in self.indices], dtype=np.float64)
        self.coefficients = np.array([[c.terms.get(m, 0) for c in costs] for m in monomials], dtype=np.float64)

    def sample(self, targets: Collection[int], rounds: int) -> dict[int, Sizes]:
        """Witnesses for those of `targets` that win at a drawn point."""
        witnesses: dict[int, Sizes] = {}
        for k in range(rounds):
            points = self._draw(_BATCH, k % 6)
            winner = self._values(points).argmin(1)
            for place in sorted(set(winner.tolist()) & set(targets) - set(witnesses)):
                for point in points[winner == place][:5]:
                    sizes = self._sizes(point)
                    if wins(place, self.costs, sizes):
                        witnesses[place] = sizes
                        break
            if len(witnesses) == len(targets):
                break
        return witnesses

    def climb(self, place: int, steps: int = 60) -> Sizes | None:
        """A witness for one cost, by climbing towards the points where it is the smallest by the widest ratio."""
        points = np.concatenate([self._draw(300, shape) for shape in range(6)])
        margin = self._margin(points, place)
        best = np.argsort(-margin, kind="stable")[:8]
        points, margin = points[best], margin[best]
        reach = 1.0
        for _ in range(steps):
            moved = self.rng.random((len(points), 12, len(self.indices))) < 0.4
            move = self.rng.normal(size=moved.shape) * reach * moved
            tried = self._round(np.exp(np.log(points)[:, None, :] + move)).reshape(-1, len(self.indices))
            margins = self._margin(tried, place).reshape(len(points), -1)
            choice = margins.argmax(1)
            rows = np.arange(len(points))
            better = margins[rows, choice] > margin
            points[better] = tried.reshape(len(points), -1, len(self.indices))[rows, choice][better]
            margin[better] = margins[rows, choice][better]
            if not better.any():
                reach *= 0.7
            top = int(margin.argmax())
            if margin[top] > 0 and wins(place, self.costs, self._sizes(points[top])):
                return self._sizes(points[top])
        return None

    def nearest(self, place: int, count: int) -> list[int]:
        """The other costs that are the smallest where `place` comes closest to winning, most frequent first."""
        points = np.concatenate([self._draw(_BATCH, shape) for shape in range(6)])
        values = self._values(points)
        values[:, place], own = np.inf, values[:, place].copy()
        close = np.argsort(own / values.min(1), kind="stable")[: len(points) // 4]
        seen = np.bincount(values[close].argmin(1), minlength=len(self.costs))
        return [int(k) for k in np.argsort(-seen, kind="stable")[:count] if k != place and seen[k]]

    def _draw(self, count: int, shape: int) -> NDArray[np.float64]:
        u: NDArray[Any] = self.rng.random((count, len(self.indices)))
        match shape:
            case 1:  # mostly small
                u = u**3
            case 2:  # some at their lower bound
                u = np.where(self.rng.random(u.shape) < 0.5, 0.0, u)
            case 3:  # of similar size
                u = u * self.rng.random((count, 1))
            case 4:  # corners of the box
                u = (u < 0.5) * 1.0
            case 5:  # some at a bound
                u = np.where(self.rng.random(u.shape) < 0.5, (u < 0.5) * 1.0, u)
        return self._round(np.exp(np.log(self.low) + u * np.log(self.high / self.low)))

    def _round(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.clip(np.rint(points), self.low, self.high))

    def _values(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.exp(np.log(points) @ self.exponents) @ self.coefficients)

    def _margin(self, points: NDArray[np.float64], place: int) -> NDArray[np.float64]:
        values = np.log(self._values(points))
        own = values[:, place].copy()
        values[:, place] = math.inf
        return np.asarray(values.min(1) - own)

    def _sizes(self, point: NDArray[np.float64]) -> Sizes:
        return {index: int(size) for index, size in zip(self.indices, point, strict=True)}
