"""Greedy trees by sizes alone, with noise: many different starts for a search, in milliseconds each.

The score of a pair is the growth that its product means, size(ab) - weight · (size(a) + size(b)), on a signed
logarithmic scale; a temperature adds Gumbel noise, so that pairs are drawn with Boltzmann's probabilities (as
cotengra's random greedy does; J. Gray and S. Kourtis, Quantum 5, 410, 2021). Without noise it is the classical greedy.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping

from tnmoe.ir.network import Network
from tnmoe.planners.splits import Splits


def tree(
    network: Network, sizes: Mapping[str, int], rng: random.Random, weight: float = 1.0, temperature: float = 0.0
) -> Splits:
    """One tree; the same `rng` gives the same.

    Args:
        network: any number of tensors.
        sizes: an integer for every index.
        rng: the source of the noise.
        weight: how much the disappearance of the operands counts.
        temperature: of the noise; 0 for none.
    """
    return _Greedy(network, sizes, rng, weight, temperature).run()


class _Greedy:
    def __init__(
        self, network: Network, sizes: Mapping[str, int], rng: random.Random, weight: float, temperature: float
    ) -> None:
        self.rng, self.weight, self.temperature = rng, weight, temperature
        self.log = {i: math.log2(sizes[i]) for i in network.indices}
        self.outside = dict.fromkeys(network.indices, 0)
        self.held: dict[int, frozenset[str]] = {}
        self.holders: dict[str, set[int]] = {i: set() for i in network.indices}
        for k, t in enumerate(network.tensors):
            for i in t.indices:
                self.outside[i] |= 1 << k
            self._hold(1 << k, frozenset(t.indices))
        for i in network.output:
            self.outside[i] = -1

    def run(self) -> Splits:
        splits: Splits = {}
        heap: list[tuple[float, int, int]] = []
        for subset in list(self.held):
            self._offer(heap, subset, above=subset)
        while len(self.held) > 1:
            while heap:
                _, a, b = heapq.heappop(heap)
                if a in self.held and b in self.held:
                    break
            else:  # parts that share nothing: the smallest first
                a, b = sorted(self.held, key=lambda s: (self._size(self.held[s]), s))[:2]
            joined = self._joined(a, b)
            for old in (a, b):
                for i in self.held.pop(old):
                    self.holders[i].discard(old)
            splits[a | b] = a, b
            self._hold(a | b, joined)
            self._offer(heap, a | b)
        return splits

    def _hold(self, subset: int, indices: frozenset[str]) -> None:
        self.held[subset] = indices
        for i in indices:
            self.holders[i].add(subset)

    def _joined(self, a: int, b: int) -> frozenset[str]:
        return frozenset([i for i in self.held[a] | self.held[b] if self.outside[i] & ~(a | b)])

    def _offer(self, heap: list[tuple[float, int, int]], subset: int, above: int = 0) -> None:
        """Score the pairs with all that share an index; of those only with larger masks, if `above` is given."""
        near = sorted({other for i in self.held[subset] for other in self.holders[i]} - {subset})
        for other in near:
            if other > above:
                heapq.heappush(heap, (self._score(subset, other), subset, other))

    def _size(self, indices: frozenset[str]) -> float:
        return math.fsum(self.log[i] for i in indices)

    def _score(self, a: int, b: int) -> float:
        out, left, right = self._size(self._joined(a, b)), self._size(self.held[a]), self._size(self.held[b])
        top = max(out, left, right)  # differences of huge numbers, in units of the largest
        growth = 2 ** (out - top) - self.weight * (2 ** (left - top) + 2 ** (right - top))
        score = math.copysign(math.log2(abs(growth)) + top, growth) if growth else 0.0
        if self.temperature:
            score += self.temperature * math.log(-math.log(self.rng.random() or 0.5))
        return score
