"""How a parameter starts. Scales are formulas in the layer's symbols, so they hold for every size; once bound, a scale
is a number, and `formula` says where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from tnmoe.symbolic.dims import Dim

Scale = float | Dim


@dataclass(frozen=True, slots=True)
class Zeros:
    """All zero."""


@dataclass(frozen=True, slots=True)
class Ones:
    """All one."""


@dataclass(frozen=True, slots=True)
class Normal:
    """Independent normal entries."""

    mean: Scale
    std: Scale


@dataclass(frozen=True, slots=True)
class Uniform:
    """Independent entries, uniform on ±bound; their variance is bound²/3."""

    bound: Scale
    formula: str = ""


@dataclass(frozen=True, slots=True)
class DiagonalNormal:
    """A rectangular diagonal over the indices `rows` and `cols`, with N(1, 1) on it, for each other index."""

    rows: str
    cols: str


@dataclass(frozen=True, slots=True)
class SharedUniform:
    """One draw shared along `indices`, plus an independent draw per entry, both uniform on ±bound."""

    indices: tuple[str, ...]
    bound: Scale
    formula: str = ""


Init = Zeros | Ones | Normal | Uniform | DiagonalNormal | SharedUniform


def bind_init(init: Init, values: Mapping[str, int]) -> Init:
    """`init` with every scale a number, under `values` by symbol name."""

    def number(formula: Scale) -> float:
        formula = sympy.sympify(formula)
        return float(formula.xreplace({s: sympy.Integer(values[str(s)]) for s in formula.free_symbols}))

    match init:
        case Normal(mean, std):
            return Normal(number(mean), number(std))
        case Uniform(bound):
            return Uniform(number(bound), str(bound))
        case SharedUniform(indices, bound):
            return SharedUniform(indices, number(bound), str(bound))
        case _:
            return init
