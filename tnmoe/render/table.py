"""Tables: one data structure, and its text, Markdown, LaTeX, HTML, CSV and JSON forms."""

from __future__ import annotations

import csv
import html
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from tnmoe.errors import TnmoeError, unknown

Cell = int | float | str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of numbers and text.

    Attributes:
        title: what it shows.
        columns: (key, heading); keys are those of the JSON form.
        rows: cells in column order.
        notes: conventions, printed below.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def render(self, form: str) -> str:
        """The table as "text", "markdown", "latex", "html", "csv" or "json"; it ends without a newline."""
        if form not in FORMATS:
            raise TnmoeError(f"unknown format {form!r}; there are {', '.join(FORMATS)}")
        return FORMATS[form](self)

    def records(self) -> list[dict[str, Cell]]:
        """One mapping per row, by column key."""
        return [{key: cell for (key, _), cell in zip(self.columns, row, strict=True)} for row in self.rows]

    def numeric(self, column: int) -> bool:
        """True if the column holds numbers, to be aligned on the right."""
        return any(isinstance(row[column], int | float) for row in self.rows)

    def column(self, key: str) -> int:
        """Position of a column.

        Raises:
            TnmoeError: with the keys there are.
        """
        keys = [k for k, _ in self.columns]
        if key not in keys:
            raise TnmoeError(unknown("column", key, keys))
        return keys.index(key)

    def sorted(self, key: str) -> Table:
        """The rows in ascending order of a column; of "-key" in descending order. Equal ones stay as they are.

        Raises:
            TnmoeError: no such column.
        """
        place, numeric = self.column(key.removeprefix("-")), self.numeric(self.column(key.removeprefix("-")))
        known = [row for row in self.rows if not numeric or not isinstance(row[place], str)]
        rest = [row for row in self.rows if row not in known]
        ordered = sorted(known, key=lambda row: row[place], reverse=key.startswith("-"))
        return replace(self, rows=(*ordered, *rest))

    def si(self) -> Table:
        """Large numbers in thousands, millions …, one SI prefix a column so that decimals align and rows compare."""
        columns, cells = list(self.columns), [list(row) for row in self.rows]
        for k, (key, heading) in enumerate(self.columns):
            sizes = [abs(c) for row in self.rows if isinstance(c := row[k], int | float) and c]
            power = min(len(_PREFIXES) - 1, (len(str(int(min(sizes)))) - 1) // 3) if sizes else 0
            if power:
                columns[k] = (key, f"{heading} ({_PREFIXES[power]})")
                for row in cells:
                    if not isinstance(number := row[k], str):
                        row[k] = round(number / 1000**power, 2)
        return replace(self, columns=tuple(columns), rows=tuple(map(tuple, cells)))

    def __str__(self) -> str:
        return to_text(self)

    def __rich__(self) -> Text:
        return Text(str(self))

    def _repr_html_(self) -> str:
        return to_html(self)

    def _repr_latex_(self) -> str:
        return to_latex(self)


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float, unit: str = "") -> str:
    """A number with an SI prefix, e.g. 4.75 M, or 56 GFLOP with a unit."""
    power = next((k for k in range(len(_PREFIXES) - 1, 0, -1) if abs(value) >= 1000**k), 0)
    return f"{value / 1000**power:.3g} {_PREFIXES[power]}{unit}".rstrip()


def grouped(cell: Cell) -> str:
    """A number with its thousands set apart, e.g. 4,754,008, other than integers with two decimals; text as it is."""
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:,.2f}"


def to_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    cells = [[grouped(c) for c in row] for row in table.rows]
    headings = [h for _, h in table.columns]
    widths = [max(len(row[k]) for row in [headings, *cells]) for k in range(len(headings))]
    right = [table.numeric(k) for k in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * w for w in widths)
    notes = [part for note in table.notes for part in textwrap.wrap(note, max(80, len(rule)))]
    return "\n".join([table.title, "", line(headings), rule, *map(line, cells), *([""] if notes else []), *notes])


def to_markdown(table: Table) -> str:
    """A pipe table, with the title above and the notes below."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in row) + " |"

    rule = ["---:" if table.numeric(k) else "---" for k in range(len(table.columns))]
    body = [line([h for _, h in table.columns]), line(rule)]
    body += [line([grouped(c) for c in row]) for row in table.rows]
    return "\n".join([f"**{table.title}**", "", *body, *(["", *table.notes] if table.notes else [])])


def to_latex(table: Table) -> str:
    """A booktabs table; it needs `\\usepackage{booktabs}`."""
    align = "".join("r" if table.numeric(k) else "l" for k in range(len(table.columns)))

    def cell(c: Cell) -> str:
        return _escape(c) if isinstance(c, str) else grouped(c).replace(",", "{,}")

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(table.title)}}}", rf"\begin{{tabular}}{{{align}}}"]
    lines += [r"\toprule", " & ".join(_escape(h) for _, h in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(map(cell, row)) + r" \\" for row in table.rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        lines += ["", r"\smallskip", r"{\footnotesize " + _escape(" ".join(table.notes)) + "}"]
    return "\n".join([*lines, r"\end{table}"])


def _escape(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "→": r"$\rightarrow$",
        "·": r"$\cdot$",
        "×": r"$\times$",
        "Σ": r"$\Sigma$",
        "Π": r"$\Pi$",
        "μ": r"$\mu$",
    }
    return "".join(special.get(c, c) for c in text)


def to_html(table: Table) -> str:
    """A table element with its caption above and its notes below; colours and fonts are the page's."""

    def line(tag: str, row: Sequence[str]) -> str:
        cells = (
            f'<{tag} style="text-align:{"right" if r else "left"};white-space:nowrap">{html.escape(c)}</{tag}>'
            for c, r in zip(row, right, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    right = [table.numeric(k) for k in range(len(table.columns))]
    lines = ['<div style="overflow-x:auto">', "<table>"]
    lines += [f'<caption style="text-align:left;font-weight:bold">{html.escape(table.title)}</caption>']
    lines += ["<thead>", line("th", [h for _, h in table.columns]), "</thead>", "<tbody>"]
    lines += [line("td", [grouped(c) for c in row]) for row in table.rows]
    lines += ["</tbody>", "</table>"]
    lines += [f'<p style="font-size:85%">{html.escape(note)}</p>' for note in table.notes]
    return "\n".join([*lines, "</div>"])


def to_csv(table: Table) -> str:
    """Column keys, then one line a row; integers without separators."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([key for key, _ in table.columns])
    writer.writerows(table.rows)
    return buffer.getvalue().rstrip("\n")


def to_json(table: Table) -> str:
    """A JSON list with an object for each row."""
    return json.dumps(table.records(), indent=2, ensure_ascii=False)


FORMATS: dict[str, Callable[[Table], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "latex": to_latex,
    "html": to_html,
    "csv": to_csv,
    "json": to_json,
}
