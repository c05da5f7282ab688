"""Formulas in the form that reads best are the formulas they were."""

from __future__ import annotations

import sympy

import tnmoe
from tnmoe.symbolic.formulas import simplify


def test_simplify_keeps_the_value() -> None:
    a, b, c = (tnmoe.symbol(n) for n in "abc")
    for formula in (a * b + a * c + a, a * b * c + 2 * b * c + 7, a, sympy.Integer(3), a**2 * b + a * b**2):
        assert sympy.expand(simplify(formula) - formula) == 0
