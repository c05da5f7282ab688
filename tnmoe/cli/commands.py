"""What each command does; it returns the exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tnmoe.analysis.explain import explain
from tnmoe.analysis.fit_ranks import fit_ranks
from tnmoe.analysis.fit_table import published
from tnmoe.charts.html_report import html_report
from tnmoe.cli.inputs import Row, named_rows, parse_layout, parse_sizes, read_as, report_of
from tnmoe.cli.printing import deliver, print_tables, with_progress
from tnmoe.emission.emit import emit
from tnmoe.errors import DeclarationError, FileError
from tnmoe.io import files
from tnmoe.layers import toml
from tnmoe.measuring.calibrate import calibrate
from tnmoe.measuring.check import check
from tnmoe.measuring.measured import measured
from tnmoe.measuring.tune import tune
from tnmoe.presets import registry
from tnmoe.render.table import Table
from tnmoe.reports.calls import memory
from tnmoe.reports.cost_report import COMPARED, CostReport, comparison
from tnmoe.timing.datasheet import datasheet, datasheet_names
from tnmoe.timing.device_profile import DeviceProfile, default_path
from tnmoe.timing.predict import Device, predict
from tnmoe.timing.predict_training import predict_training


def run_table(options: argparse.Namespace) -> int:
    """Print layers side by side."""
    tables = []
    profile = None if options.profile is None or options.objective == "time" else _device(options.profile)
    figures = COMPARED if options.columns is None else [key.strip() for key in options.columns.split(",")]
    data = options.format in ("csv", "json")
    for what in options.what:
        title, rows = named_rows(what, options)
        reports = {row.label: report_of(row, options) for row in with_progress(rows, "costing")}
        table = comparison(reports, f"{title}, {options.dtype}", figures=figures, beside=not data)
        table = table if not options.memory else _with_memory(table, rows, options.dtype)
        tables.append(table if profile is None else _with_times(table, reports.values(), profile, options.dtype))
    if data:  # one document
        tables = [replace(tables[0], rows=tuple(row for t in tables for row in t.rows))]
    elif options.si:
        tables = [table.si() for table in tables]
    print_tables(tables if options.sort is None else [table.sorted(options.sort) for table in tables], options.format)
    return 0


def _with_memory(table: Table, rows: Sequence[Row], dtype: str) -> Table:
    """The table with columns of what is saved for the backward pass, and of both peaks."""
    found = [memory(row.planned, dtype=dtype) for row in rows]
    named = (("saved_bytes", "saved bytes"), ("inference_peak", "peak of inference"), ("training_peak", "of training"))
    added = tuple(column for column in named if column not in table.columns)
    cells = tuple((*row, *(getattr(m, key) for key, _ in added)) for row, m in zip(table.rows, found, strict=True))
    notes = dict.fromkeys(note for m in found for note in m.summary().notes)
    return replace(table, columns=(*table.columns, *added), rows=cells, notes=(*table.notes, *notes))


def _with_times(table: Table, reports: Iterable[CostReport], profile: Device, dtype: str) -> Table:
    """The table with a column of the predicted time of one forward pass of each layer."""
    predictions = [predict(report.bound, profile, dtype) for report in reports]
    rows = tuple((*row, round(1e6 * p.seconds, 1)) for row, p in zip(table.rows, predictions, strict=True))
    columns = (*table.columns, ("predicted_microseconds", "predicted µs"))
    notes = dict.fromkeys(note for p in predictions for note in p.notes)
    return replace(table, columns=columns, rows=rows, notes=(*table.notes, *notes))


def run_plan(options: argparse.Namespace) -> int:
    """Print or write plans."""
    plans = [row.planned for what in options.what for row in named_rows(what, options)[1]]
    if options.format == "json":
        texts = [p.to_json() for p in plans]
        deliver((texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]") + "\n", options.output)
    elif options.output is not None:
        texts = [f"{p}\n\n{explain(p)}" if options.explain else str(p) for p in plans]
        deliver("\n\n".join(texts) + "\n", options.output)
    else:
        for k, p in enumerate(plans):
            print("\n" if k else "", end="")
            print_tables([p.table()], "text")
            if options.explain:
                print(f"\n{explain(p)}")
    return 0


def run_cost(options: argparse.Namespace) -> int:
    """Print a view of the cost of each layer."""
    tables: list[Table] = []
    if options.measure and options.profile is None:
        raise DeclarationError("--measure goes with --profile FILE, a calibration of this machine")
    profile = None if options.profile is None else _device(options.profile)
    for what in options.what:
        for row in named_rows(what, options)[1]:
            report = report_of(row, options)
            if profile is not None:
                tables += _times(row, profile, options)
                continue
            if options.memory:
                found = memory(row.planned, dtype=options.dtype)
                tables += [found.timeline()] if options.format in ("csv", "json") else found.tables()
                continue
            tables.append(_view(report, options))
    if len(tables) > 1 and options.format in ("csv", "json"):  # one document, which then says which layer a row is of
        labels = [t.title for t in tables]
        rows = tuple((label, *row) for label, t in zip(labels, tables, strict=True) for row in t.rows)
        tables = [replace(tables[0], columns=(("layer", "layer"), *tables[0].columns), rows=rows)]
    print_tables(tables, options.format)
    return 0


def _device(name: str) -> Device:
    """A device that comes with the package, or the one of a file."""
    known = name in datasheet_names() or not (os.path.exists(name) or os.sep in name or "." in name)
    return datasheet(name) if known else read_as(name, DeviceProfile.from_json)


def _times(row: Row, profile: Device, options: argparse.Namespace) -> Sequence[Table]:
    """Predicted times of a row, with measured ones beside them if asked for; of training, too, in prose formats."""
    plan = row.planned
    if options.measure:
        return [measured(plan, profile, options.dtype).table(row.label)]
    own, flavour = plan.adjoint, plan.flavour
    found = [predict(plan.executed, profile, options.dtype, adjoint=own, flavour=flavour).table(row.label)]
    if options.format not in ("csv", "json"):
        training = predict_training(
            plan.bound, profile, options.dtype, inputs=plan.input_gradients, adjoint=own, flavour=flavour
        )
        found += [] if training is None else [training.table(row.label)]
    return found


def _view(report: CostReport, options: argparse.Namespace) -> Table:
    if options.training:
        return report.training(options.training)
    chosen = {"steps": report.steps, "backward": report.backward, "formulas": report.symbolic}
    return next((view for name, view in chosen.items() if getattr(options, name)), report.parts)()


def run_emit(options: argparse.Namespace) -> int:
    """Print or write a module for each layer."""
    rows = [row for what in options.what for row in named_rows(what, options)[1]]
    chosen = [row for row in rows if row.emitted]
    if not chosen:
        raise DeclarationError(f"{rows[0].label} is only costed; declare the layer in a file to build it")
    if options.name is not None and len(chosen) > 1:
        raise DeclarationError(f"--name goes with one layer, this names {len(chosen)}; choose one row, e.g. gpt2-cp")
    names = options.name if options.name is not None else _unique([row.planned.layer.name for row in chosen])
    source = emit([row.planned for row in chosen], name=names)
    deliver(source, options.output)
    if options.output:
        for row in rows:
            if not row.emitted:
                print(f"left out: {row.label} (cost only)")
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Print or write an HTML page."""
    rows = [row for what in options.what for row in named_rows(what, options)[1]]
    profile = None if options.profile is None else _device(options.profile)
    page = html_report([row.planned for row in rows], options.title, [row.label for row in rows], profile)
    deliver(page, options.output)
    return 0


def run_fit(options: argparse.Namespace) -> int:
    """Print the ranks that a budget allows."""
    tables = []
    for what in options.what:
        if what in registry.FAMILIES:
            tables.append(published(what, nearest=options.nearest))
            continue
        fitted = fit_ranks(
            toml.load(what).layer,
            parameters=options.parameters,
            flops=options.flops,
            bytes=options.bytes,
            at_least=parse_sizes(options.at_least, "--at-least"),
            at_most=parse_sizes(options.at_most, "--at-most"),
            nearest=options.nearest,
            tokens=options.tokens,
            dtype=options.dtype,
        )
        tables.append(fitted.table())
    if options.format in ("csv", "json") and len({t.columns for t in tables}) == 1:  # one document
        tables = [replace(tables[0], rows=tuple(row for t in tables for row in t.rows))]
    print_tables(tables, options.format)
    return 0


def run_tune(options: argparse.Namespace) -> int:
    """Measure the cheapest orders of one layer, and the ways to emit them; what the options say is not varied."""
    rows = [row for what in options.what for row in named_rows(what, options)[1] if row.emitted]
    if len(rows) != 1:
        raise DeclarationError(f"tune takes one layer that can be emitted, this names {len(rows)}; e.g. gpt2-cp")
    tuned = tune(
        rows[0].planned,
        device=options.device,
        dtype=options.dtype,
        training=options.training,
        count=options.count,
        layouts=[parse_layout(options.layout)] if options.layout else None,
        flavours=[options.flavour] if options.flavour else None,
        chunks=[options.chunk] if options.chunk is not None else None,
        rounds=options.rounds,
        budget=options.seconds,
        fresh=options.fresh,
    )
    print_tables([tuned.table()], options.format)
    if options.output is not None:
        deliver(tuned.plan.to_json() + "\n", options.output)
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Compare modules with their declarations; 1 if one differs."""
    rows = [row for what in options.what for row in named_rows(what, options)[1]]
    chosen = [row for row in rows if row.emitted]
    if not chosen:
        raise DeclarationError(f"{rows[0].label} is only costed; declare the layer in a file to build it")
    reports = [(row.label, check(row.planned)) for row in with_progress(chosen, "checking")]
    cells = tuple((label, *line) for label, report in reports for line in report.table().rows)
    left = tuple(f"Not checked (cost only): {row.label}." for row in rows if not row.emitted)
    columns = (("layer", "layer"), *reports[0][1].table().columns)
    print_tables([Table("Emitted modules against their declarations", columns, cells, left)], options.format)
    return 0 if all(report.passed for _, report in reports) else 1


def run_calibrate(options: argparse.Namespace) -> int:
    """Measure this machine and keep its profile."""
    path = Path(options.output or default_path(options.device))
    if options.output is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{path.parent} cannot be made: {error.strerror}; name a file with -o") from None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        profile = calibrate(
            device=options.device,
            dtypes=options.dtype or ("float32",),
            budget=options.budget,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    files.save(profile.to_json() + "\n", path)
    print(f"wrote {path}: {profile.name}, {profile.source}")
    return 0


def _unique(names: list[str]) -> list[str]:
    """Class names with a number where one occurs twice."""
    return [n if names.count(n) == 1 else f"{n}{names[: k + 1].count(n)}" for k, n in enumerate(names)]
