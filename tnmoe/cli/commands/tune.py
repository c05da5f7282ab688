"""`tnmoe tune`: the fastest order and form of a layer, measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from tnmoe.cli.grammar import Commands, add_format, add_output, planning_command
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import deliver, print_tables
from tnmoe.cli.rows import planned_rows
from tnmoe.errors import DeclarationError
from tnmoe.measuring.tune import BUDGET, DTYPES, tune
from tnmoe.render.table import FORMATS


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = planning_command(
        commands,
        "tune",
        "Time the cheapest orders and the ways to emit them on this machine; choose the fastest. "
        "What --layout, --flavour, --chunk or --keep say is not varied.",
        lambda given: run(
            given.what,
            PlanOptions.of(given),
            device=given.device,
            dtype=given.dtype,
            training=given.training,
            count=given.count,
            rounds=given.rounds,
            seconds=given.seconds,
            fresh=given.fresh,
            form=given.format,
            output=given.output,
        ),
        several=False,
    )
    add_format(sub, list(FORMATS))
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    sub.add_argument("--training", action="store_true", help="forward and backward pass")
    sub.add_argument("--count", type=int, default=4, metavar="N", help="orders to measure (default: 4)")
    sub.add_argument("--rounds", type=int, default=15, metavar="N", help="last rounds (default: 15)")
    sub.add_argument(
        "--seconds", type=float, default=BUDGET, metavar="S", help=f"after which it ends early (default: {BUDGET:g})"
    )
    sub.add_argument("--fresh", action="store_true", help="measure anew, even what the cache knows")
    add_output(sub, "write the winner there, as a plan in JSON")


def run(
    names: Sequence[str],
    options: PlanOptions,
    *,
    device: str,
    dtype: str,
    training: bool,
    count: int,
    rounds: int,
    seconds: float,
    fresh: bool,
    form: str,
    output: str | None,
) -> int:
    """Measure the cheapest orders of one layer, and the ways to emit them; what the options say is not varied.

    Args:
        names: one preset or file.
        options: of its plan.
        device, dtype, training, count, rounds, fresh: as in `tune`.
        seconds: after which the measuring ends early.
        form: one of `FORMATS`.
        output: the file that gets the winner, as a plan.
    """
    rows = [row for row in planned_rows(names, options) if row.emitted]
    if len(rows) != 1:
        raise DeclarationError(f"tune takes one layer that can be emitted, this names {len(rows)}; e.g. gpt2-cp")
    tuned = tune(
        rows[0].planned,
        device=device,
        dtype=dtype,
        training=training,
        count=count,
        layouts=None if options.layout is None else [options.layout],
        flavours=None if options.flavour is None else [options.flavour],
        chunks=None if options.chunk is None else [options.chunk],
        rounds=rounds,
        budget=seconds,
        fresh=fresh,
    )
    print_tables([tuned.table()], form)
    if output is not None:
        deliver(tuned.plan.to_json() + "\n", output)
    return 0
