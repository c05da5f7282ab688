"""What the commands' parsers have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from tnmoe.cli.plan_options import add_plan_options
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.presets import registry
from tnmoe.timing.datasheet import datasheet_names

DEVICES = f"{', '.join(datasheet_names())} by data sheet, or a calibration's file"
"""What a predicted time can be of."""

Run = Callable[[argparse.Namespace], int]
"""Does what a command line says, and returns the exit code."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the way to help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An option of another command must not pass for the start of one of this one's.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(2, f"error: {message}\nrun '{self.prog} --help' for what is allowed\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Where a command adds its own parser."""


def planning_command(
    commands: Commands, name: str, summary: str, run: Run, *, several: bool = True, own_profile: bool = False
) -> Parser:
    """Add a command about planned layers."""
    sub = commands.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub.set_defaults(run=run)
    sub.add_argument(
        "what",
        nargs="+" if several else 1,
        metavar="PRESET|FILE",
        help=f"{', '.join(registry.FAMILIES)}, one of their rows (e.g. gpt2-cp), a TOML file, or a plan in JSON",
    )
    add_plan_options(sub, own_profile=own_profile)
    return sub


def add_format(sub: Parser, choices: Sequence[str]) -> None:
    """Add the option that says how to print."""
    sub.add_argument("--format", choices=choices, default="text", help="default: text")


def add_dtype(sub: Parser, purpose: str = "") -> None:
    """Add the option that says of which dtype bytes and times are."""
    sub.add_argument("--dtype", choices=list(DTYPE_BYTES), default="float32", help=f"{purpose}default: float32")


def add_output(sub: Parser, purpose: str) -> None:
    """Add the option that names a file to write."""
    sub.add_argument("-o", "--output", metavar="FILE", help=purpose)
