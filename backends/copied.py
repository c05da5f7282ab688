"""Source of this package as emitted files have it."""

from __future__ import annotations

import re


def as_emitted(source: str) -> str:
    """The source without what only a type checker reads."""
    return re.sub(r"  # type: ignore\[.*\]", "", source).replace("ctx: Any", "ctx")
