"""`tnmoe table`: layers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tnmoe.cli.grammar import DEVICES, Commands, add_dtype, add_format, planning_command
from tnmoe.cli.inputs import read_device
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import DATA_FORMATS, one_document, print_tables, with_progress
from tnmoe.cli.rows import Row, titled_rows
from tnmoe.costing.objective import TIME
from tnmoe.render.table import FORMATS, Table
from tnmoe.reports.calls import cost, memory
from tnmoe.reports.cost_report import COMPARED, CostReport, comparison
from tnmoe.reports.figures import FIGURES
from tnmoe.timing.device import Device
from tnmoe.timing.predict import predict


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "table",
        "Print one row of figures for each layer.",
        lambda given: run(
            given.what,
            PlanOptions.of(given, own_profile=True),
            form=given.format,
            dtype=given.dtype,
            profile=given.profile,
            with_memory=given.memory,
            columns=given.columns,
            sort=given.sort,
            si=given.si,
        ),
        own_profile=True,
    )
    add_format(sub, list(FORMATS))
    add_dtype(sub, "for bytes; ")
    sub.add_argument("--profile", metavar="DEVICE|FILE", help=f"a column of predicted times: {DEVICES}")
    sub.add_argument("--memory", action="store_true", help="columns of what is saved for backward, and of the peaks")
    sub.add_argument(
        "--columns",
        metavar="KEY,…",
        help=f"figures, in this order (default: {','.join(COMPARED)}); of {', '.join(FIGURES)}; ideal_flops "
        "and the like are what would be left without work in vain (csv and json have them if asked for)",
    )
    sub.add_argument("--sort", metavar="KEY", help="rows by a column, e.g. flops; -KEY from the largest: --sort=-flops")
    sub.add_argument("--si", action="store_true", help="numbers in k, M, G, … (csv and json stay exact)")


def run(
    names: Sequence[str],
    options: PlanOptions,
    *,
    form: str,
    dtype: str,
    profile: str | None,
    with_memory: bool,
    columns: str | None,
    sort: str | None,
    si: bool,
) -> int:
    """Print layers side by side.

    Args:
        names: presets and files.
        options: of their plans.
        form: one of `FORMATS`.
        dtype: for bytes and times.
        profile: a device or a file, for a column of predicted times; not where plans are chosen by them already.
        with_memory: add what is saved for the backward pass, and the peaks.
        columns: figures by name, with commas between.
        sort: the column to sort by, with a minus from the largest.
        si: numbers with prefixes.
    """
    device = None if profile is None or options.objective == TIME else read_device(profile)
    figures = COMPARED if columns is None else [key.strip() for key in columns.split(",")]
    tables = []
    for title, rows in titled_rows(names, options):
        reports = {row.label: cost(row.planned, dtype=dtype) for row in with_progress(rows, "costing")}
        table = comparison(reports, f"{title}, {dtype}", figures=figures, beside=form not in DATA_FORMATS)
        table = _with_memory(table, rows, dtype) if with_memory else table
        tables.append(table if device is None else _with_times(table, reports.values(), device, dtype))
    if form in DATA_FORMATS:
        tables = [one_document(tables)]
    elif si:
        tables = [table.si() for table in tables]
    print_tables(tables if sort is None else [table.sorted(sort) for table in tables], form)
    return 0


def _with_memory(table: Table, rows: Sequence[Row], dtype: str) -> Table:
    """The table with columns of what is saved for the backward pass, and of both peaks."""
    reports = [memory(row.planned, dtype=dtype) for row in rows]
    named = (("saved_bytes", "saved bytes"), ("inference_peak", "peak of inference"), ("training_peak", "of training"))
    added = tuple(column for column in named if column not in table.columns)
    cells = tuple((*row, *(getattr(m, key) for key, _ in added)) for row, m in zip(table.rows, reports, strict=True))
    notes = dict.fromkeys(note for report in reports for note in report.summary().notes)
    return replace(table, columns=(*table.columns, *added), rows=cells, notes=(*table.notes, *notes))


def _with_times(table: Table, reports: Iterable[CostReport], device: Device, dtype: str) -> Table:
    """The table with a column of the predicted time of one forward pass of each layer."""
    predictions = [predict(report.bound, device, dtype) for report in reports]
    rows = tuple((*row, round(1e6 * p.seconds, 1)) for row, p in zip(table.rows, predictions, strict=True))
    columns = (*table.columns, ("predicted_microseconds", "predicted µs"))
    notes = dict.fromkeys(note for p in predictions for note in p.notes)
    return replace(table, columns=columns, rows=rows, notes=(*table.notes, *notes))
