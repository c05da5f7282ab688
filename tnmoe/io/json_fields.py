"""JSON read strictly: each value knows where it stands, and what is wrong with it is said by that place.

A reader of a file asks each field for what it must be: `field.integer(1)`, `field.items()`, `field.keys("steps",
"planner")`. Whatever the file holds, the answer is of that type, or the reader's own error says what was expected and
what is there.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tnmoe.errors import TnmoeError, unknown

T = TypeVar("T")
Name = TypeVar("Name", bound=str)

SMALLEST, LARGEST = 1e-30, 1e30
"""Bounds of measured numbers: quotients of any two are finite, and nothing real comes near them."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3
"""Of a wrong value in a message its beginning, however long it is and however deep it nests."""


@dataclass(frozen=True, slots=True)
class Field:
    """A value of a document.

    Attributes:
        value: what `json` makes of it.
        document: what it is part of, for messages, e.g. "a plan".
        error: what is raised if something is wrong.
        path: where it stands, e.g. "paths.y.steps[0]"; empty for the document itself.
    """

    value: Any
    document: str
    error: type[TnmoeError]
    path: str = ""

    @property
    def where(self) -> str:
        """The place in words, e.g. "paths.y.steps[0] of a plan"."""
        return f"{self.path} of {self.document}" if self.path else self.document

    def fault(self, wanted: str) -> TnmoeError:
        """The error that says what this field must be, and what it is."""
        return self.error(f"{self.where} must be {wanted}, got {_SHORT.repr(self.value)}")

    # ---- what holds others -----------------------------------------------------------------------------------

    def keys(self, *required: str, optional: Sequence[str] = ()) -> dict[str, Field]:
        """The entries of an object that has exactly these keys; optional ones that it lacks are null.

        Raises:
            TnmoeError: of the type `error`, as all methods.
        """
        allowed = (*required, *optional)
        entries = self.entries(f"an object with {', '.join(allowed)}")
        lacking = [key for key in required if key not in entries]
        if lacking:
            raise self.error(f"{self.where} lacks {lacking[0]!r}; its keys are {', '.join(allowed)}")
        surplus = [key for key in entries if key not in allowed]
        if surplus:
            raise self.error(f"{self.where}: {unknown('key', surplus[0], allowed)}")
        return {key: entries.get(key, self._at(None, key)) for key in allowed}

    def some_keys(self, allowed: Iterable[str]) -> dict[str, Field]:
        """The entries of an object that has one or more of these keys."""
        names = list(allowed)
        entries = self.entries(wanted := f"an object with some of {', '.join(names)}")
        if not entries or not set(entries) <= set(names):
            raise self.fault(wanted)
        return entries

    def entries(self, wanted: str = "an object") -> dict[str, Field]:
        """The entries of an object, whatever its keys."""
        if not isinstance(self.value, dict):
            raise self.fault(wanted)
        return {key: self._at(value, key) for key, value in self.value.items()}

    def items(self, count: int | None = None, of: str = "items") -> list[Field]:
        """The items of a list, of so many if `count` says."""
        if not isinstance(self.value, list) or (count is not None and len(self.value) != count):
            raise self.fault(f"a list of {'' if count is None else f'{count:,} '}{of}")
        path = self.path
        return [Field(value, self.document, self.error, f"{path}[{k}]") for k, value in enumerate(self.value)]

    def maybe(self, read: Callable[[Field], T]) -> T | None:
        """What `read` makes of it, or None for null."""
        return None if self.value is None else read(self)

    # ---- what is a value itself ------------------------------------------------------------------------------

    def text(self) -> str:
        """A text."""
        if not isinstance(self.value, str):
            raise self.fault("text")
        return self.value

    def words(self) -> str:
        """A text that is not blank."""
        if not self.text().strip():
            raise self.fault("text that says something")
        return self.text()

    def choice(self, allowed: Sequence[Name]) -> Name:
        """One of some texts."""
        chosen = [name for name in allowed if name == self.value]
        if not chosen:
            raise self.fault(f"one of {', '.join(allowed)}")
        return chosen[0]

    def texts(self, allowed: Iterable[str] | None = None) -> tuple[str, ...]:
        """A list of texts; of different ones among `allowed`, if that is given."""
        names = tuple(item.text() for item in self.items(of="texts"))
        if allowed is not None:
            known = list(allowed)
            if len(set(names)) != len(names) or not set(names) <= set(known):
                raise self.fault(f"some of {', '.join(known) or 'nothing'}")
        return names

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.fault("true or false")
        return self.value

    def integer(self, low: int | None = None, high: int | None = None) -> int:
        """An integer within bounds; a number with a decimal point is none."""
        fits = type(self.value) is int and (low is None or low <= self.value) and (high is None or self.value <= high)
        if not fits:
            bounds = "" if low is None else f" from {low:,}" + ("" if high is None else f" to {high:,}")
            raise self.fault(f"an integer{bounds}")
        value: int = self.value
        return value

    def number(self, *, zero: bool = False) -> float:
        """A positive number between `SMALLEST` and `LARGEST`, or zero where that is allowed."""
        value = self.value
        if type(value) not in (int, float) or not (SMALLEST < value < LARGEST or (zero and value == 0)):
            raise self.fault("a number from 0" if zero else "a positive number")
        return float(value)

    def _at(self, value: Any, key: str) -> Field:
        name = key if len(key) <= 80 else _SHORT.repr(key)
        return Field(value, self.document, self.error, f"{self.path}.{name}" if self.path else name)


def read_json(text: str, document: str, format: str, error: type[TnmoeError]) -> Field:
    """The object in a file of this project, without its key "format".

    Args:
        text: of the file.
        document: what the file is, for messages, e.g. "a plan".
        format: that it must have under "format".
        error: to raise, here and by the fields: the text is no JSON (or has a number of thousands of digits, a key
            twice, or nests too deep), or is no object of that format.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as reason:
        raise error(f"{document} must be JSON: {reason}") from None
    if not isinstance(data, dict) or data.pop("format", None) != format:
        raise error(f'{document} must be a JSON object with "format": "{format}"')
    return Field(data, document, error)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these entries; `ValueError` for a key that stands twice, of which `json` would take the last."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_SHORT.repr(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return data
