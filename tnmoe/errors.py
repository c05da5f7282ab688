"""The one family of errors. Every message says what, where, expected against got, and the remedy."""

import difflib
from collections.abc import Iterable
from typing import Never, NoReturn


class TnmoeError(Exception):
    """Base of every error that tnmoe raises on purpose."""


class DeclarationError(TnmoeError):
    """A layer, network, dimension or name was declared wrongly."""


class PlanError(TnmoeError):
    """A contraction path cannot be found, or does not fit its network."""


class ProgramError(TnmoeError):
    """A program breaks an invariant of the IR; always a bug in a pass, never the user's fault."""


class CostError(TnmoeError):
    """A figure cannot be computed, e.g. a size has no value or an op has no formula."""


class EmitError(TnmoeError):
    """A program cannot be written as source."""


class FileError(TnmoeError):
    """A file cannot be read or written."""


class RankWarning(UserWarning):
    """A declared rank is larger than what the other axes can use."""


def no_rule(op: Never, rule: str) -> NoReturn:
    """The end of a `match` over all ops: the type checker proves that none comes here, and one that does raises.

    Raises:
        CostError: always.
    """
    raise CostError(f"op {type(op).__name__} has no rule for {rule}; the type checker names the places that need one")


def point_at(text: str, start: int, length: int = 1) -> str:
    """`text` with carets under `length` characters from `start`, indented to stand below a message."""
    return f"  {text}\n  {' ' * start}{'^' * max(1, length)}"


def unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """A message that `given` is none of `allowed`, with the closest of them."""
    names = list(allowed)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"unknown {what} {given!r}{hint} allowed: {', '.join(names)}"
