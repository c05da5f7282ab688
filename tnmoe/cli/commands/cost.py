"""`tnmoe cost`: one view of the cost of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, assert_never, get_args

from tnmoe.cli.grammar import DEVICES, Commands, add_dtype, add_format, planning_command
from tnmoe.cli.inputs import read_device
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import DATA_FORMATS, print_tables
from tnmoe.cli.rows import Row, planned_rows
from tnmoe.errors import DeclarationError
from tnmoe.measuring.measured import measured
from tnmoe.render.table import FORMATS, Table
from tnmoe.reports.calls import cost, memory
from tnmoe.reports.training_state import PRECISIONS
from tnmoe.timing.device import Device
from tnmoe.timing.predict import predict
from tnmoe.timing.predict_training import predict_training

View = Literal["steps", "backward", "formulas", "memory"]
"""Views besides the one part by part; `--training` and `--profile` choose one, too."""

VIEWS: tuple[View, ...] = get_args(View)


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "cost",
        "Print the cost of a layer, part by part.",
        lambda given: run(
            given.what,
            PlanOptions.of(given, own_profile=True),
            form=given.format,
            dtype=given.dtype,
            view=next((view for view in VIEWS if getattr(given, view)), None),
            precision=given.training,
            profile=given.profile,
            timed=given.measure,
        ),
        own_profile=True,
    )
    add_format(sub, list(FORMATS))
    add_dtype(sub)
    group = sub.add_mutually_exclusive_group()
    group.add_argument("--steps", action="store_true", help="one row for each step instead of each part")
    group.add_argument("--backward", action="store_true", help="one row for each gradient of the backward pass")
    group.add_argument(
        "--training",
        nargs="?",
        const="mixed",
        choices=list(PRECISIONS),
        metavar="PRECISION",
        help=f"gradients, master copy and optimizer states; {', '.join(PRECISIONS)} (default: mixed)",
    )
    group.add_argument("--formulas", action="store_true", help="every figure as a formula and a number")
    group.add_argument("--memory", action="store_true", help="peaks, what is saved for backward and why, a timeline")
    group.add_argument("--profile", metavar="DEVICE|FILE", help=f"predicted time of each step: {DEVICES}")
    sub.add_argument(
        "--measure", action="store_true", help="time the module, too: the profile is a calibration of this machine"
    )


def run(
    names: Sequence[str],
    options: PlanOptions,
    *,
    form: str,
    dtype: str,
    view: View | None,
    precision: str | None,
    profile: str | None,
    timed: bool,
) -> int:
    """Print a view of the cost of each layer.

    Args:
        names: presets and files.
        options: of their plans.
        form: one of `FORMATS`.
        dtype: for bytes and times.
        view: one of `VIEWS`; None for the parts.
        precision: of training, whose memory is shown instead.
        profile: a device or a file, whose times are shown instead.
        timed: measure the times, too.
    """
    if timed and profile is None:
        raise DeclarationError("--measure goes with --profile FILE, a calibration of this machine")
    device = None if profile is None else read_device(profile)
    tables: list[Table] = []
    for row in planned_rows(names, options):
        if device is None:
            tables += _view(row, view, precision, dtype, form)
        elif timed:
            tables.append(measured(row.planned, device, dtype).table(row.label))
        else:
            tables += _times(row, device, dtype, form)
    if len(tables) > 1 and form in DATA_FORMATS:  # one document, which then says which layer a row is of
        rows = tuple((table.title, *row) for table in tables for row in table.rows)
        tables = [replace(tables[0], columns=(("layer", "layer"), *tables[0].columns), rows=rows)]
    print_tables(tables, form)
    return 0


def _view(row: Row, view: View | None, precision: str | None, dtype: str, form: str) -> Sequence[Table]:
    if view == "memory":
        held = memory(row.planned, dtype=dtype)
        return [held.timeline()] if form in DATA_FORMATS else held.tables()
    report = cost(row.planned, dtype=dtype)
    if precision is not None:
        return [report.training(precision)]
    match view:
        case "steps":
            return [report.steps()]
        case "backward":
            return [report.backward()]
        case "formulas":
            return [report.symbolic()]
        case None:
            return [report.parts()]
    assert_never(view)


def _times(row: Row, device: Device, dtype: str, form: str) -> Sequence[Table]:
    """Predicted times of a row; of training, too, in prose formats."""
    plan = row.planned
    own, flavour = plan.adjoint, plan.flavour
    forward = predict(plan.executed, device, dtype, adjoint=own, flavour=flavour).table(row.label)
    if form in DATA_FORMATS:
        return [forward]
    training = predict_training(plan.bound, device, dtype, inputs=plan.input_gradients, adjoint=own, flavour=flavour)
    return [forward] if training is None else [forward, training.table(row.label)]
