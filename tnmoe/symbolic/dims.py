"""Dimensions: positive integers, or expressions in symbols that stand for positive integers.

Text never reaches `eval` or `sympify`: `parse_dim` is a recursive-descent parser of its own.
"""

from __future__ import annotations

import keyword
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias, cast

import sympy

from tnmoe.errors import CostError, DeclarationError, point_at

Dim: TypeAlias = int | sympy.Expr
"""A checked size."""

Size: TypeAlias = int | str | sympy.Expr
"""What a user may give as a size: text is parsed, e.g. `"4*d"`."""

_TOKEN = re.compile(r"\s*(?:(?P<int>\d+)|(?P<name>[^\W\d]\w*)|(?P<op>\*\*|//|[-+*()])|(?P<bad>\S))")


MAX_EXPONENT = 16
"""The largest exponent that `parse_dim` reads."""

LARGEST = 2**63 - 1
"""The largest size: what array libraries can index."""


def symbol(name: str, what: str = "dimension") -> sympy.Symbol:
    """The symbol `name`: a positive integer. The same name always gives an equal symbol.

    Raises:
        DeclarationError: naming `what`, if the name is no identifier.
    """
    return sympy.Symbol(check_name(name, what), positive=True, integer=True)


def check_name(name: object, what: str) -> str:
    """`name` if it is a Python identifier and no keyword, since names reach generated source.

    Raises:
        DeclarationError: if it is not.
    """
    if not isinstance(name, str):
        raise DeclarationError(f"{what} name must be text, got {name!r} ({type(name).__name__})")
    if not name.isidentifier() or not name.isascii():
        raise DeclarationError(
            f"{what} name {name!r} is not an identifier; use ASCII letters, digits and underscores, "
            f"not starting with a digit"
        )
    if keyword.iskeyword(name):
        raise DeclarationError(
            f"{what} name {name!r} is a Python keyword and would reach generated source; rename it, e.g. {name + '_'!r}"
        )
    if name.startswith("_"):
        raise DeclarationError(f"{what} name {name!r} starts with an underscore, as Python's own names do; drop it")
    return name


def as_dim(value: object, what: str) -> Dim:
    """A dimension from an int, a text expression such as `"4*d"`, or a sympy expression.

    Args:
        value: the size. Text goes through `parse_dim`.
        what: what it is the size of, for the error message.

    Raises:
        DeclarationError: if it is not a positive size.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | str | sympy.Expr):
        raise DeclarationError(f"{what} must be a positive integer or a symbol, got {value!r} ({type(value).__name__})")
    if isinstance(value, numbers.Integral):
        value = int(value)  # NumPy's integers are Integral, but not int
    if isinstance(value, str):
        value = parse_dim(value, what)
    if isinstance(value, sympy.Expr):
        if value.is_Integer:
            value = int(value)
        else:
            # Re-make foreign symbols (sympy.Symbol("N") has no assumptions) so that equal names are equal.
            swap = {s: symbol(str(s), f"{what}: symbol") for s in value.free_symbols}
            formula: sympy.Expr = value.xreplace(swap)
            if not formula.is_integer or not formula.free_symbols:
                raise DeclarationError(f"{what} must be an integer expression, got {formula}")
            if formula.is_nonpositive:
                raise DeclarationError(f"{what} must be positive, got {formula}, which never is")
            if _exceeds(formula):  # it could be written, but not read again
                raise DeclarationError(f"{what} has a number larger than 2**63 - 1 in it: {formula}")
            return formula
    if value > LARGEST:
        raise DeclarationError(f"{what} must be at most 2**63 - 1, got a number of {value.bit_length()} bits")
    if value < 1:
        shown = value if value > -LARGEST else "a large negative number"
        raise DeclarationError(f"{what} must be at least 1, got {shown}")
    return value


def parse_dim(text: str, what: str = "dimension") -> Dim:
    """Parse `+ - * // **`, parentheses, integers and names, e.g. `"2*(d + 1)"`.

    Raises:
        DeclarationError: with a caret under what cannot be read.
    """
    if len(text) > 200:
        raise DeclarationError(f"{what}: an expression of {len(text)} characters is too long for a size")
    tokens: list[tuple[str, str, int]] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        assert match is not None
        assert match.lastgroup is not None
        tokens.append((match.lastgroup, match.group(match.lastgroup), match.start(match.lastgroup)))
        position = match.end()
    tokens.append(("end", "", len(stripped)))
    cursor = 0

    def fail(reason: str, at: tuple[str, str, int]) -> DeclarationError:
        return DeclarationError(
            f"{what}: cannot read {text!r} as a size: {reason}\n{point_at(text, at[2], len(at[1]))}\n"
            f"allowed: integers, names, + - * // ** and parentheses"
        )

    def bounded(result: sympy.Expr, at: tuple[str, str, int]) -> sympy.Expr:
        if _exceeds(result):
            raise fail("larger than 2**63 - 1", at)
        return result

    def take(*operators: str) -> str | None:
        nonlocal cursor
        kind, value, _ = tokens[cursor]
        if kind == "op" and value in operators:
            cursor += 1
            return value
        return None

    def total() -> sympy.Expr:
        result = product()
        while operator := take("+", "-"):
            at, term = tokens[cursor], product()
            result = bounded(result + term if operator == "+" else result - term, at)
        return result

    def product() -> sympy.Expr:
        result = power()
        while operator := take("*", "//"):
            factor = power()
            if operator == "//" and factor == 0:
                raise fail("division by zero", tokens[cursor - 1])
            quotient = operator == "//"
            result = bounded(sympy.floor(result / factor) if quotient else result * factor, tokens[cursor - 1])
        return result

    def power() -> sympy.Expr:
        base = atom()
        if take("**"):
            at = tokens[cursor]
            exponent = atom()
            if not exponent.is_Integer or not 0 <= int(exponent) <= MAX_EXPONENT:
                raise fail(f"an exponent must be an integer from 0 to {MAX_EXPONENT}", at)
            if base.is_Integer and int(abs(base)).bit_length() * int(exponent) > 80:
                raise fail("larger than 2**63 - 1", at)
            return bounded(base**exponent, at)
        return base

    def atom() -> sympy.Expr:
        nonlocal cursor
        if take("-"):
            return -power()
        if take("("):
            result = total()
            if not take(")"):
                raise fail("expected ')'", tokens[cursor])
            return result
        kind, value, _ = at = tokens[cursor]
        cursor += 1
        if kind == "int":
            return bounded(sympy.Integer(value), at)
        if kind == "name":
            if tokens[cursor][1] == "(":
                raise fail("calls are not allowed", at)
            return symbol(value, f"{what}: symbol")
        raise fail("unexpected end" if kind == "end" else f"unexpected {value!r}", at)

    result = total()
    if tokens[cursor][0] != "end":
        raise fail(f"unexpected {tokens[cursor][1]!r}", tokens[cursor])
    return int(result) if result.is_Integer else result


def _exceeds(formula: sympy.Expr) -> bool:
    """Whether a formula has an integer in it, once what is constant is worked out, that no size may have."""
    return any(max(abs(n.p), n.q) > LARGEST for n in formula.atoms(sympy.Rational))


def dim_text(dim: Dim) -> int | str:
    """A dimension as it stands in a file; `parse_dim` reads it back."""
    return dim if isinstance(dim, int) else _text(dim)


def _text(formula: sympy.Expr) -> str:
    """`formula` in the grammar of `parse_dim`."""
    match formula:
        case sympy.Symbol() | sympy.Integer():
            return str(formula)
        case sympy.Add():
            return " + ".join(_text(term) for term in formula.as_ordered_terms())
        case sympy.Mul():
            return "*".join(f"({_text(factor)})" if factor.args else _text(factor) for factor in formula.args)
        case sympy.Pow():
            whole, rest = divmod(int(formula.exp), MAX_EXPONENT)
            powers = [MAX_EXPONENT] * whole + ([rest] if rest else [])
            return "*".join(f"({_text(formula.base)})**{power}" for power in powers)
        case sympy.floor():
            above, below = formula.args[0].as_numer_denom()
            return f"({_text(above)})//({_text(below)})"
    raise DeclarationError(f"{formula} cannot be written as a size; use + - * // **")


def symbol_names(dims: Iterable[Dim]) -> frozenset[str]:
    """Names of every symbol in `dims`."""
    return frozenset(str(s) for d in dims if isinstance(d, sympy.Expr) for s in d.free_symbols)


def evaluate(dim: Dim, values: Mapping[str, int], what: str = "size") -> int:
    """The integer that `dim` is under `values` (symbol name to integer).

    Raises:
        CostError: if a symbol has no value, or the result is negative or not an integer.
    """
    if isinstance(dim, int):
        return dim
    missing = sorted(symbol_names([dim]) - set(values))
    if missing:
        given = ", ".join(f'"{name}": …' for name in missing)
        raise CostError(f"{what} {dim} has no value: pass sizes={{{given}}}")
    result = dim.xreplace({s: sympy.Integer(values[str(s)]) for s in dim.free_symbols})
    if not result.is_Integer or result < 1:
        raise CostError(f"{what} {dim} is {result}, which is not a size; change the values")
    return int(result)


def ceil_log2(dim: Dim) -> Dim:
    """⌈log2 dim⌉, exact for integers."""
    if isinstance(dim, int):
        return (dim - 1).bit_length()
    return cast(sympy.Expr, sympy.ceiling(sympy.log(dim, 2)))
