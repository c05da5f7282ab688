"""When one order is cheaper than another, as text: an exact inequality, solved for one size where that is simple."""

from __future__ import annotations

import math
from fractions import Fraction

from tnmoe.planners.atlas.polynomial import Polynomial


def condition(cost: Polynomial, base: Polynomial, index: str) -> str:
    """cost < base, solved for `index` where one division does it."""
    left, right = cost.minus_common(base)
    (p, q), (r, s) = left.affine(index), right.affine(index)
    zero = Polynomial()
    if r == zero and p != zero and s != zero:  # p + q x < s x
        return f"{index} > {_quotient(p, s, q)}" + ("" if q == zero else f", and never where {s} ≤ {q}")
    if p == zero and r != zero and q != zero:  # q x < r + s x
        return f"{index} < {_quotient(r, q, s)}" + ("" if s == zero else f", and always where {q} ≤ {s}")
    return f"{left} < {right}"


def _quotient(above: Polynomial, below: Polynomial, less: Polynomial) -> str:
    if not less.terms and below == 1:
        return str(above)
    divisor = str(below) + "".join(f" - {part}" for part in str(less).split(" + ") if less.terms)
    return " / ".join(f"({p})" if "·" in p or " " in p else p for p in (str(above), divisor))


def rounded_up(factor: Fraction | float) -> str:
    """A factor with three decimals, rounded up, since it bounds."""
    return f"{math.ceil(factor * 1000) / 1000:g}"
