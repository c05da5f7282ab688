"""Where one layer becomes cheaper than another: the difference of two formulas, solved exactly in one symbol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import sympy

from tnmoe.analysis.open_sizes import open_sizes
from tnmoe.errors import CostError, DeclarationError, unknown
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import DEFAULT_TOKENS, Planable
from tnmoe.reports.cost_report import CostReport
from tnmoe.symbolic.dims import symbol as symbol_of
from tnmoe.symbolic.dims import symbol_names
from tnmoe.symbolic.formulas import simplify
from tnmoe.symbolic.integer_ranges import Range, integer_ranges

TYPICAL = 64
"""Value of a symbol without one while an order is planned; it never enters the figures."""


@dataclass(frozen=True)
class Crossover:
    """Where `a` has less of a figure than `b`.

    Attributes:
        a, b: what is compared.
        figure: by what.
        symbol: the symbol that was solved for.
        difference: the figure of `a` minus that of `b`.
        condition: holds, over positive sizes, exactly where the difference is negative.
        ranges: the integers from 1 at which it is negative, if nothing but `symbol` is open.
        equal: those at which it is zero, likewise.
    """

    a: str
    b: str
    figure: str
    symbol: sympy.Symbol
    difference: sympy.Expr
    condition: sympy.Basic
    ranges: tuple[Range, ...] | None = None
    equal: tuple[Range, ...] | None = None

    def __str__(self) -> str:
        claim = f"{self.a} needs fewer {self.figure.replace('_', ' ')} than {self.b}"
        if self.ranges is None:
            return f"{claim} {self._iff}"
        where = " or ".join(_range_text(str(self.symbol), r) for r in self.ranges)
        if self.ranges == ((1, None),):
            return f"{claim} always"
        text = f"{claim} iff {where}" if self.ranges else f"{claim} never"
        equal = " or ".join(_range_text(str(self.symbol), r) for r in self.equal or ())
        return f"{text}; as many iff {equal}" if equal else text

    @property
    def _iff(self) -> str:
        if self.condition in (sympy.true, sympy.false):
            return "always" if self.condition == sympy.true else "never"
        return f"iff {self.condition}"

    def to_latex(self) -> str:
        """The condition, or the integer ranges, in LaTeX."""
        if self.ranges is None:
            return str(sympy.latex(self.condition))
        name = sympy.latex(self.symbol)
        parts = [
            rf"{name} \geq {low}" if high is None else rf"{low} \leq {name} \leq {high}" for low, high in self.ranges
        ]
        return r" \lor ".join(parts) if parts else r"\bot"


def crossover(
    a: Planable | Plan,
    b: Planable | Plan,
    figure: str,
    symbol: str,
    *,
    tokens: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Crossover:
    """Solve `figure of a < figure of b` for one size, exactly.

    Symbols that have a value, declared or in `sizes`, are replaced by it; the token count by `tokens` if that is given.
    If only `symbol` is left, the answer is the integers from 1 on, each end of a range verified by substitution; rows
    padded to blocks and logarithms are no obstacle then (`tnmoe.symbolic.integer_ranges`). Else it is a condition in
    all symbols that are left, solved for `symbol` where the signs of its coefficients are known.

    Args:
        a, b: declarations, layers, networks or plans; what is no plan is planned by its defaults.
        figure: one whose formula is a polynomial in the symbol, e.g. "parameters", "macs", "matmul_flops".
        symbol: name of a size of either, e.g. "N", "R", "T", or of a field that declares one, e.g. "experts", "rank".
        tokens: rows of the input.
        sizes: values of further symbols.

    Raises:
        DeclarationError: neither has that size.
        CostError: no such figure, or one that is no polynomial in the symbol while others are open.
    """
    given = dict(sizes or {})
    (first, name_a), (second, name_b) = (_formula(w, figure, symbol, tokens, given) for w in (a, b))
    unknown_symbol = symbol_of(symbol)
    known = symbol_names([first, second])
    if symbol not in known and not _has(a, symbol) and not _has(b, symbol):
        raise DeclarationError(unknown("size to solve for", symbol, sorted(known)))
    difference = sympy.expand(first - second)
    if name_a == name_b:
        name_a, name_b = f"the first {name_a}", f"the second {name_b}"
    if difference.free_symbols <= {unknown_symbol}:
        ranges, equal = integer_ranges(difference, unknown_symbol)
        less: sympy.Basic = sympy.Lt(difference, 0)
        return Crossover(name_a, name_b, figure, unknown_symbol, difference, less, ranges, equal)
    if not difference.is_polynomial(unknown_symbol):
        others = ", ".join(sorted(symbol_names([difference]) - {symbol}))
        raise CostError(
            f"{figure} is no polynomial in {symbol}: {simplify(difference)}; give {others} a value each, and the "
            f"integers at which it is less are found"
        )
    condition = _condition(difference, unknown_symbol)
    return Crossover(name_a, name_b, figure, unknown_symbol, simplify(difference), condition)


def _has(what: Planable | Plan, name: str) -> bool:
    return name in symbol_names(open_sizes(what, [name], optional=True).sizes.values())


def _formula(
    what: Planable | Plan, figure: str, name: str, tokens: int | None, sizes: Mapping[str, int]
) -> tuple[sympy.Expr, str]:
    """The figure in the symbols that are left open, and the layer's name."""
    layer = open_sizes(what, [name], optional=True)
    values = {k: v for k, v in {**layer.values, **sizes}.items() if k in symbol_names(layer.sizes.values())}
    if layer.batched and tokens is not None:
        values[layer.token_symbol] = tokens
    values.pop(name, None)
    if isinstance(what, Plan):
        planned = what
    else:
        rows = values.get(layer.token_symbol, DEFAULT_TOKENS) if layer.batched else DEFAULT_TOKENS
        open_symbols = layer.free_symbols - ({layer.token_symbol} if layer.batched else set())
        planned = plan(layer, tokens=rows, sizes={k: values.get(k, TYPICAL) for k in open_symbols})
    formula = sympy.sympify(CostReport.of(planned).expression(figure))
    return formula.subs({symbol_of(k): v for k, v in values.items()}), layer.name


def _range_text(name: str, sizes: Range) -> str:
    low, high = sizes
    if high is None:
        return f"{name} ≥ {low:,}"
    if low == high:
        return f"{name} = {low:,}"
    return f"{name} ≤ {high:,}" if low == 1 else f"{low:,} ≤ {name} ≤ {high:,}"


# ---- several symbols -----------------------------------------------------------------------------------------


def _condition(difference: sympy.Expr, unknown_symbol: sympy.Symbol) -> sympy.Basic:
    """A relation that holds iff the difference is negative, all symbols being positive."""
    if difference == 0:
        return sympy.false
    rest = sympy.Integer(1)
    constant, factors = sympy.factor_list(difference)
    sign = 1 if constant > 0 else -1
    for factor, power in factors:
        known = _sign(factor)
        if known is None:
            if power % 2 == 0 and power:
                return _sided(difference)  # a square may vanish: left as it is
            rest *= factor
        elif power % 2:
            sign *= known
    if rest == 1:
        return sympy.true if sign < 0 else sympy.false
    return _solved(sympy.expand(sign * rest), unknown_symbol)


def _sign(formula: sympy.Expr) -> int | None:
    """1 or -1 if every term has that sign, with positive symbols; else None."""
    signs = {1 if term.as_coeff_Mul()[0] > 0 else -1 for term in sympy.Add.make_args(sympy.expand(formula))}
    return signs.pop() if len(signs) == 1 and formula != 0 else None


def _solved(negative: sympy.Expr, unknown_symbol: sympy.Symbol) -> sympy.Basic:
    """`negative < 0` with the unknown alone on one side, where the signs of the coefficients say how."""
    coefficients = sympy.Poly(negative, unknown_symbol).all_coeffs()
    signs = [0 if c == 0 else _sign(c) for c in coefficients]
    if len(coefficients) == 2 and signs[0]:
        slope, offset = coefficients
        bound = _quotient(-offset, slope)
        return sympy.Lt(unknown_symbol, bound) if signs[0] > 0 else sympy.Gt(unknown_symbol, bound)
    if len(coefficients) == 3 and signs[0] and signs[2] and signs[0] == -signs[2]:
        square, slope, offset = coefficients  # of opposite signs: exactly one positive root
        root = (-slope + signs[0] * sympy.sqrt(sympy.expand(slope**2 - 4 * square * offset))) / (2 * square)
        bound = sympy.simplify(root)
        return sympy.Lt(unknown_symbol, bound) if signs[0] > 0 else sympy.Gt(unknown_symbol, bound)
    return _sided(negative)


def _quotient(above: sympy.Expr, below: sympy.Expr) -> sympy.Expr:
    """A reduced fraction, nested as formulas are."""
    numerator, denominator = sympy.fraction(sympy.cancel(above / below))
    return cast(sympy.Expr, simplify(numerator) / simplify(denominator))


def _sided(negative: sympy.Expr) -> sympy.Basic:
    """`negative < 0` without minus signs: positive terms on the left, the others on the right."""
    terms = sympy.Add.make_args(sympy.expand(negative))
    left = sympy.Add(*(t for t in terms if t.as_coeff_Mul()[0] > 0))
    right = sympy.Add(*(-t for t in terms if t.as_coeff_Mul()[0] < 0))
    return sympy.Lt(simplify(left), simplify(right))
