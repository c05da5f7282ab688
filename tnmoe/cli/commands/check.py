"""`tnmoe check`: emitted modules against their declarations."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.cli.grammar import Commands, add_format, planning_command
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import print_tables, with_progress
from tnmoe.cli.rows import emitted_rows, planned_rows
from tnmoe.measuring.check import check
from tnmoe.render.table import FORMATS, Table


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "check",
        "Compare the emitted module with dense einsum and torch's FLOP counter.",
        lambda given: run(given.what, PlanOptions.of(given), form=given.format),
    )
    add_format(sub, list(FORMATS))


def run(names: Sequence[str], options: PlanOptions, *, form: str) -> int:
    """Compare modules with their declarations; 1 if one differs.

    Args:
        names: presets and files.
        options: of their plans.
        form: one of `FORMATS`.
    """
    rows = planned_rows(names, options)
    reports = [(row.label, check(row.planned)) for row in with_progress(emitted_rows(rows), "checking")]
    cells = tuple((label, *line) for label, report in reports for line in report.table().rows)
    left = tuple(f"Not checked (cost only): {row.label}." for row in rows if not row.emitted)
    columns = (("layer", "layer"), *reports[0][1].table().columns)
    print_tables([Table("Emitted modules against their declarations", columns, cells, left)], form)
    return 0 if all(report.passed for _, report in reports) else 1
