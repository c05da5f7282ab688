"""Lines of emitted source: wrapped at the width, indented, commented with the indices of results."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100
"""Longest line of an emitted file."""


def axes_comment(indices: Sequence[str]) -> str:
    """The indices of a result, as the comment behind its statement."""
    return f"  # {' '.join(indices)}" if indices else ""


def indented(lines: Sequence[str]) -> list[str]:
    """Lines of a method's body."""
    return [f"        {line}" if line else "" for line in lines]


def nested(lines: Sequence[str]) -> list[str]:
    """Lines of an inner block."""
    return [f"    {line}" if line else "" for line in lines]


def broken(line: str, comment: str = "", margin: int = 8) -> list[str]:
    """A statement that is too long, broken as formatters break it: inside its last brackets, if it ends with them.

    It will be indented by `margin`.
    """
    if len(line) + len(comment) + margin <= WIDTH:
        return [line + comment]
    target, equals, value = line.partition(" = ")
    if equals and not value.endswith(")"):
        return [f"{target} = (", f"    {value}", f"){comment}"]
    if not line.endswith(")"):
        return [line + comment]
    depth, start, commas = 0, len(line), []
    while start == len(line) or depth:
        start -= 1
        depth += {")": 1, "(": -1}.get(line[start], 0)
        if depth == 1 and line[start] == ",":
            commas.append(start)
    inside = line[start + 1 : -1]
    if len(inside) + 4 + margin <= WIDTH:
        return [line[: start + 1], f"    {inside}", f"){comment}"]
    ends = [*reversed(commas), len(line) - 1]
    begins = [start + 1, *(c + 1 for c in reversed(commas))]
    return [line[: start + 1], *(f"    {line[i:j].strip()}," for i, j in zip(begins, ends, strict=True)), f"){comment}"]


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def wrapped(start: str, names: Sequence[str], end: str, *, parenthesised: bool = False, margin: int = 0) -> list[str]:
    """`start`, the names with commas, `end`; in lines of at most the width, inside brackets where it is too long."""
    listed = f"({names[0]},)" if parenthesised and len(names) == 1 else ", ".join(names)
    single = f"{start}{listed}{end}"
    if len(single) + margin <= WIDTH:
        return [single]
    pad = " " * (len(start) - len(start.lstrip()))
    opening, closing = (start + "(", ")" + end) if parenthesised else (start, end)
    inside = f"{pad}    {', '.join(names)}"
    if len(inside) + margin <= WIDTH and not parenthesised:
        return [opening, inside, pad + closing]
    return [opening, *(f"{pad}    {name}," for name in names), pad + closing]


def docstring(lines: Sequence[str], indent: int) -> list[str]:
    """A docstring of these lines, each wrapped to the width; what has line breaks of its own is laid out already."""
    pad = " " * indent
    clean = [
        part.replace("\\", "\\\\").replace('"""', "'''")
        for k, line in enumerate(lines)
        for part in (line.split("\n") if "\n" in line else _wrapped(line, WIDTH - indent - (0 if k else 6)))
    ]
    if len(clean) == 1:
        return [f'{pad}"""{clean[0]}"""']
    return [f'{pad}"""{clean[0]}', *((pad + line).rstrip() for line in clean[1:]), f'{pad}"""']


def _wrapped(line: str, width: int) -> list[str]:
    margin = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, width, subsequent_indent=f"{margin}    ") or [""]
