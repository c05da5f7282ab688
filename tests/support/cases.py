"""Cases drawn from seeds, so that a failure says which of them it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def seeds(count: int, quick: int) -> list[Any]:
    """Seeds 0 … count - 1, one a test; from `quick` on they are slow."""
    return [pytest.param(seed, marks=[pytest.mark.slow] if seed >= quick else []) for seed in range(count)]


def blocks(count: int, of: int, quick: int = 0) -> list[Any]:
    """Seeds 0 … count - 1 in ranges of `of`, one range a test; from the range `quick` on they are slow.

    For cases that take a few milliseconds, and for claims on how many of them there are of a kind.
    """
    return [
        pytest.param(
            range(start, min(start + of, count)),
            id=f"{start}-{min(start + of, count) - 1}",
            marks=[pytest.mark.slow] if start >= of * quick else [],
        )
        for start in range(0, count, of)
    ]


@contextmanager
def case(*names: object) -> Iterator[random.Random]:
    """One case of a loop: a generator whose seed is these names, which whatever fails inside then says."""
    seed = " ".join(map(str, names))
    try:
        yield random.Random(seed)
    except BaseException as error:
        error.add_note(f"case {seed!r}")
        raise
