"""`tnmoe emit`: standalone torch modules."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.cli.grammar import Commands, add_output, planning_command
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import deliver
from tnmoe.cli.rows import emitted_rows, planned_rows
from tnmoe.emission.emit import emit
from tnmoe.errors import DeclarationError


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "emit",
        "Write a standalone torch module.",
        lambda given: run(given.what, PlanOptions.of(given), class_name=given.name, output=given.output),
    )
    add_output(sub, "the file to write (default: print)")
    sub.add_argument("--name", help="name of the class, if there is one layer")


def run(names: Sequence[str], options: PlanOptions, *, class_name: str | None, output: str | None) -> int:
    """Print or write a module for each layer.

    Args:
        names: presets and files.
        options: of their plans.
        class_name: if there is one layer; else by what it is.
        output: the file to write.
    """
    rows = planned_rows(names, options)
    chosen = emitted_rows(rows)
    if class_name is not None and len(chosen) > 1:
        raise DeclarationError(f"--name goes with one layer, this names {len(chosen)}; choose one row, e.g. gpt2-cp")
    plans = [row.planned for row in chosen]
    source = emit(plans, name=_unique([p.layer.name for p in plans]) if class_name is None else class_name)
    deliver(source, output)
    if output:
        for row in rows:
            if not row.emitted:
                print(f"left out: {row.label} (cost only)")
    return 0


def _unique(names: list[str]) -> list[str]:
    """Class names with a number where one occurs twice."""
    return [n if names.count(n) == 1 else f"{n}{names[: k + 1].count(n)}" for k, n in enumerate(names)]
