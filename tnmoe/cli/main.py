"""The command line. Exit codes: 0 fine, 1 a check failed, 2 bad input."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from tnmoe.cli.arguments import parser
from tnmoe.errors import TnmoeError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks "μ" shows "?"
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except TnmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        _discard_output()
        code = 0
    except OSError as error:  # results are written through FileError, so this is the output stream
        _discard_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed the help, the version or an error
        return stop.code if isinstance(stop.code, int) else 2
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        code: int = options.run(options)
    return code


def _discard_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it cannot fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
