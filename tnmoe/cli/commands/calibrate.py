"""`tnmoe calibrate`: this machine's speed, for predicted times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tnmoe.cli.grammar import Commands, add_output
from tnmoe.errors import FileError
from tnmoe.io import files
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.measuring.calibrate import BUDGET, calibrate
from tnmoe.timing.device_profile import default_path

SUMMARY = "Measure this machine's speed, for predicted times."


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = commands.add_parser("calibrate", help=SUMMARY, description=SUMMARY)
    sub.set_defaults(
        run=lambda given: run(
            device=given.device, dtypes=given.dtype or ("float32",), budget=given.budget, output=given.output
        )
    )
    add_output(sub, "default: in the user's cache folder")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    sub.add_argument("--dtype", action="append", choices=list(DTYPE_BYTES), help="may be repeated; default: float32")
    sub.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds for each dtype (default: {BUDGET:g})"
    )


def run(*, device: str, dtypes: Sequence[str], budget: float, output: str | None) -> int:
    """Measure this machine and keep its profile.

    Args:
        device: "cpu" or "cuda".
        dtypes: what to measure.
        budget: seconds for each of them.
        output: the file that gets the profile; by default one in the user's cache folder.
    """
    path = Path(output or default_path(device))
    if output is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{path.parent} cannot be made: {error.strerror}; name a file with -o") from None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        profile = calibrate(
            device=device,
            dtypes=dtypes,
            budget=budget,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    files.save(profile.to_json() + "\n", path)
    print(f"wrote {path}: {profile.name}, {profile.source}")
    return 0
