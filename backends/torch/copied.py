"""Source of `tnmoe.backends.runtime` as emitted files have it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tnmoe.backends import runtime


@cache
def runtime_source(name: str) -> str:
    """The text of a file of `tnmoe.backends.runtime`, e.g. `activations`."""
    return (Path(runtime.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")


def as_emitted(source: str) -> str:
    """The source without what only a type checker reads."""
    return re.sub(r"  # type: ignore\[.*\]", "", source).replace("ctx: Any", "ctx")
