"""Formulas over whole columns, against the formula at each row's sizes."""

from __future__ import annotations

import random

import pytest
import sympy

import tnmoe
from tnmoe.symbolic.columns import Columns, column

A, B = tnmoe.symbol("a"), tnmoe.symbol("b")

LARGE = [pytest.param(2**k, marks=pytest.mark.slow, id=f"2**{k}") for k in (20, 62)]


@pytest.mark.parametrize("top", [9, *LARGE])
@pytest.mark.parametrize(
    "formula",
    [
        A**3 * B - 7 * A + 2,
        sympy.Min(A, B, 5) * sympy.Max(A, 2),
        sympy.ceiling(sympy.log(A + B, 2)),
        sympy.ceiling(sympy.log(A, 2)) * B,
        sympy.ceiling(sympy.log(4 * A * B**2, 2)),
        sympy.floor(A / B),
        sympy.floor((4 * A + 1) / 3),
        sympy.ceiling(B / A),
        sympy.Piecewise((A, A <= B), (B - A, sympy.Ne(A, 7)), (sympy.floor(A / 2 - B / 4), True)),
        sympy.Piecewise((A * B, (A > 3) & (B >= A)), (1, (A < 3) | sympy.Eq(B, 5)), (0, True)),
        sympy.Integer(9),
    ],
    ids=str,
)
def test_every_operation_of_formulas_over_columns(formula: sympy.Expr, top: int) -> None:
    """Small sizes stay within 64 bits, large ones do not."""
    rng = random.Random(top)
    values = [(rng.randint(1, top), rng.randint(1, top)) for _ in range(40)]
    columns = Columns({"a": column(v for v, _ in values), "b": column(v for _, v in values)})
    assert [int(v) for v in columns.evaluate(formula)] == [int(formula.subs({A: x, B: y})) for x, y in values]


def test_what_has_no_column_or_is_no_integer() -> None:
    columns = Columns({"a": column([1, 2]), "b": column([3, 4])})
    with pytest.raises(tnmoe.CostError, match="c has no column; there are a, b"):
        columns.evaluate(tnmoe.symbol("c"))
    with pytest.raises(tnmoe.CostError, match="no integer operation"):
        columns.evaluate(sympy.sin(A))
