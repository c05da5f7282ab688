"""Constraints on figures as a user writes them: `parameters <= 5*10**6`, `64 <= max_rank < I`. Text is never run."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tnmoe.errors import DeclarationError, point_at
from tnmoe.symbolic.columns import Column, Columns
from tnmoe.symbolic.dims import Dim, parse_dim, symbol_names

_COMPARISON = re.compile(r"<=|>=|==|!=|<|>|=")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A chain of comparisons, all of which must hold.

    Attributes:
        text: as it was written.
        sides: expressions in names of columns.
        comparisons: one between each two sides.
    """

    text: str
    sides: tuple[Dim, ...]
    comparisons: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names that it compares."""
        return symbol_names(self.sides)

    def holds(self, columns: Columns) -> Column:
        """True in each row that satisfies it."""
        values = [columns.evaluate(side) for side in self.sides]
        held = np.ones(columns.length, dtype=bool)
        for comparison, left, right in zip(self.comparisons, values, values[1:], strict=False):
            held &= _COMPARE[comparison](left, right).astype(bool)
        return held


def parse_constraint(text: object) -> Constraint:
    """A constraint from text: sizes as in `parse_dim`, compared by `<= >= < > == !=`.

    Raises:
        DeclarationError: with a caret under the fault.
    """
    if not isinstance(text, str):
        raise DeclarationError(f"a constraint must be text such as 'parameters <= 5*10**6', got {text!r}")
    comparisons = list(_COMPARISON.finditer(text))
    single = [m for m in comparisons if m.group() == "="]
    if single:
        raise DeclarationError(f"write == for equality\n{point_at(text, single[0].start())}")
    if not comparisons:
        raise DeclarationError(f"a constraint needs one of <= >= < > == !=\n{point_at(text, len(text))}")
    cuts = [0, *(k for m in comparisons for k in m.span()), len(text)]
    sides = tuple(
        parse_dim(text[start:end], f"constraint {text!r}") for start, end in zip(cuts[::2], cuts[1::2], strict=True)
    )
    return Constraint(text, sides, tuple(m.group() for m in comparisons))
