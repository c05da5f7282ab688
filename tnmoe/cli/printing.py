"""Tables for a terminal, text for a pipe, files whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable
from rich.text import Text

from tnmoe.io import files
from tnmoe.render.table import Cell, Table, grouped

T = TypeVar("T")

DATA_FORMATS = ("csv", "json")
"""What programs read: exact numbers, and one document however many layers there are."""


def deliver(text: str, output: str | None) -> None:
    """Print text, or write it to a file and say so."""
    if output is None:
        print(text, end="")
    else:
        path = files.save(text, output)
        print(f"wrote {path} ({grouped(len(text.splitlines()))} lines)")


def one_document(tables: Sequence[Table]) -> Table:
    """The rows of all tables, which have the same columns."""
    return replace(tables[0], rows=tuple(row for table in tables for row in table.rows))


def print_tables(tables: list[Table], form: str) -> None:
    """Print tables; in a terminal they are fitted to its width."""
    if form == "text" and sys.stdout.isatty():
        console = Console()
        for table in tables:
            for shown in fitted(table, console.width):
                console.print(shown)
    else:
        print("\n\n".join(table.render(form) for table in tables))


def fitted(table: Table, width: int) -> list[RichTable]:
    """The table for a terminal. Numbers are never broken: if they do not fit side by side, rows become columns."""
    numeric = [table.numeric(k) for k in range(len(table.columns))]
    widths = [
        max([len(heading) if right else 12, *(len(grouped(row[k])) if right else 0 for row in table.rows)])
        for k, ((_, heading), right) in enumerate(zip(table.columns, numeric, strict=True))
    ]
    if sum(widths) + 2 * len(widths) <= width or not all(numeric[1:]):
        return [_part(table, numeric, table.columns, table.rows)]
    # Each row's numbers below its label, as many rows at a time as fit.
    head = max(len(heading) for _, heading in table.columns)
    column = max(len(grouped(cell)) for row in table.rows for cell in row[1:])
    step = max(1, (width - head - 2) // (column + 2))
    parts = []
    for start in range(0, len(table.rows), step):
        chunk = table.rows[start : start + step]
        columns = (table.columns[0], *((str(k), str(row[0])) for k, row in enumerate(chunk)))
        rows = tuple((heading, *(row[k] for row in chunk)) for k, (_, heading) in enumerate(table.columns) if k)
        parts.append(_part(table, [False] + [True] * len(chunk), columns, rows, last=start + step >= len(table.rows)))
    return parts


def _part(
    table: Table,
    numeric: Sequence[bool],
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[Cell]],
    *,
    last: bool = True,
) -> RichTable:
    # As `Text`, for in plain strings rich takes "[t i]" for markup and hides it.
    caption = Text("\n".join(table.notes)) if last and table.notes else None
    shown = RichTable(
        title=Text(table.title),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for k, ((_, heading), right) in enumerate(zip(columns, numeric, strict=True)):
        least = max((len(grouped(row[k])) for row in rows), default=0) if right else None
        justify: Literal["left", "right"] = "right" if right else "left"
        shown.add_column(Text(heading), justify=justify, overflow="fold", min_width=least)
    for row in rows:
        shown.add_row(*(Text(grouped(cell)) for cell in row))
    return shown


def with_progress(items: Sequence[T], doing: str) -> Iterable[T]:
    """A progress bar on the terminal's error stream, gone when it is done."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal or len(items) < 2)
