"""Where a formula is negative or zero, against each integer by itself."""

from __future__ import annotations

import random

import pytest
import sympy

import tnmoe
from tnmoe.symbolic.columns import Columns, column
from tnmoe.symbolic.integer_ranges import integer_ranges


# Seeds whose formula changes its sign.
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3, 4, 5, 6, 8))])
def test_ranges_of_formulas_by_brute_force(seed: int) -> None:
    """Random sums of floors, ceilings, cases and logarithms, against each integer by itself."""
    x, rng = tnmoe.symbol("x"), random.Random(seed)
    a, b, c, d, e = (rng.randint(1, 9) for _ in range(5))
    m, p = rng.randint(2, 4), rng.randint(2, 4)
    formula = a * x**2 - 40 * b * x + 100 * c + rng.choice((-1, 1)) * d * m * sympy.ceiling((e * x + 1) / m)
    formula += 30 * sympy.Piecewise((c - x, x <= 5 * p), (sympy.floor(x / p) - c, True))
    formula -= 50 * d * sympy.ceiling(sympy.log(x) / sympy.log(2)) if seed % 4 == 0 else 0
    negative, zero = integer_ranges(formula, x)
    assert any(high for _, high in negative)
    for at, value in enumerate(Columns({"x": column(range(1, 400))}).evaluate(formula), start=1):
        for kind, holds in ((negative, value < 0), (zero, value == 0)):
            assert any(low <= at and (high is None or at <= high) for low, high in kind) == holds, (formula, at)


def test_signs_that_never_settle_are_an_error() -> None:
    x = tnmoe.symbol("x")
    with pytest.raises(tnmoe.CostError, match="depends on x modulo 2 from"):
        integer_ranges(2 * sympy.floor(x / 2) - x, x)
    with pytest.raises(tnmoe.CostError, match="no polynomial in x"):
        integer_ranges(sympy.sqrt(x) - 3, x)
