"""The worst factor that is lost by keeping one order over a box of sizes, exactly.

f · (cheapest) - (kept) is multilinear, so it is non-negative on the whole box if and only if it is in every corner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from tnmoe.planners.atlas.dominance import Domain


class Regret(NamedTuple):
    """The worst factor lost by keeping one order, and where. Both are exact, not the result of a search.

    Attributes:
        factor: cost of the order over the cheapest cost; `math.inf` if it grows without bound.
        sizes: where it is lost; `math.inf` for an open index means that the factor is approached as the index grows.
    """

    factor: Fraction | float
    sizes: Mapping[str, int | float]


def worst(own: Sequence[int], least: Sequence[int], domain: Domain) -> Regret:
    """The largest ratio of corner numbers, and the sizes of that corner."""
    most: Fraction | float = Fraction(0)
    place = 0
    for k, (cost, optimum) in enumerate(zip(own, least, strict=True)):
        factor = Fraction(cost, optimum) if optimum else math.inf if cost else Fraction(0)
        if factor > most:
            most, place = factor, k
    sizes: dict[str, int | float] = {i: low for i, (low, _) in domain.bounds.items()}
    for k, index in enumerate(domain.free):
        if place >> k & 1:
            high = domain.bounds[index][1]
            sizes[index] = math.inf if high is None else high
    return Regret(most, sizes)
