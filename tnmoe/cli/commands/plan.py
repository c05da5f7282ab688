"""`tnmoe plan`: contraction orders, step by step, or as files."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.analysis.explain import explain
from tnmoe.cli.grammar import Commands, add_format, add_output, planning_command
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import deliver, print_tables
from tnmoe.cli.rows import planned_rows


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "plan",
        "Print the contraction order, step by step.",
        lambda given: run(
            given.what, PlanOptions.of(given), form=given.format, explained=given.explain, output=given.output
        ),
    )
    add_format(sub, ["text", "json"])
    sub.add_argument("--explain", action="store_true", help="also say why, in sentences (text format)")
    add_output(sub, "write there instead of printing")


def run(names: Sequence[str], options: PlanOptions, *, form: str, explained: bool, output: str | None) -> int:
    """Print or write plans.

    Args:
        names: presets and files.
        options: of their plans.
        form: "text" or "json".
        explained: say why, too, as text.
        output: the file to write.
    """
    plans = [row.planned for row in planned_rows(names, options)]
    if form == "json":
        texts = [p.to_json() for p in plans]
        deliver((texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]") + "\n", output)
    elif output is not None:
        texts = [f"{p}\n\n{explain(p)}" if explained else str(p) for p in plans]
        deliver("\n\n".join(texts) + "\n", output)
    else:
        for k, p in enumerate(plans):
            print("\n" if k else "", end="")
            print_tables([p.table()], "text")
            if explained:
                print(f"\n{explain(p)}")
    return 0
