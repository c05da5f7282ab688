"""`tnmoe report`: an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.charts.html_report import html_report
from tnmoe.cli.grammar import Commands, add_output, planning_command
from tnmoe.cli.inputs import read_device
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import deliver
from tnmoe.cli.rows import planned_rows


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "report",
        "Write an HTML page on layers: cost, orders, source.",
        lambda given: run(
            given.what,
            PlanOptions.of(given, own_profile=True),
            title=given.title,
            profile=given.profile,
            output=given.output,
        ),
        own_profile=True,
    )
    add_output(sub, "the file to write (default: print)")
    sub.add_argument("--title", default="Layers and their costs", help="of the page")
    sub.add_argument(
        "--profile",
        metavar="DEVICE|FILE",
        help="also predicted times, and measured ones if it is of this machine",
    )


def run(names: Sequence[str], options: PlanOptions, *, title: str, profile: str | None, output: str | None) -> int:
    """Print or write an HTML page.

    Args:
        names: presets and files.
        options: of their plans.
        title: of the page.
        profile: a device or a file, for times.
        output: the file to write.
    """
    rows = planned_rows(names, options)
    device = None if profile is None else read_device(profile)
    deliver(html_report([row.planned for row in rows], title, [row.label for row in rows], device), output)
    return 0
