"""What the command line takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tnmoe._version import __version__
from tnmoe.autodiff.backward_plan import FLAVOURS
from tnmoe.cli.commands import (
    run_calibrate,
    run_check,
    run_cost,
    run_emit,
    run_fit,
    run_plan,
    run_report,
    run_table,
    run_tune,
)
from tnmoe.costing.objective import NAMES
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.lowering.orient import LAYOUTS
from tnmoe.measuring.calibrate import BUDGET
from tnmoe.measuring.tune import BUDGET as TUNING
from tnmoe.measuring.tune import DTYPES
from tnmoe.planning.request import DEFAULT_TOKENS, PLANNERS
from tnmoe.presets import registry
from tnmoe.render.table import FORMATS
from tnmoe.reports.cost_report import COMPARED
from tnmoe.reports.figures import FIGURES
from tnmoe.reports.training_state import PRECISIONS
from tnmoe.timing.datasheet import datasheet_names

DEVICES = f"{', '.join(datasheet_names())} by data sheet, or a calibration's file"
"""What a predicted time can be of."""

PRESET_NAMES = ", ".join(registry.FAMILIES)

EPILOG = f"""\
what to name:
  a preset       {PRESET_NAMES}: the paper's layers, each as MLP or linear, CP, TR, dense and sparse MoE;
                 moe: every family of mixtures at equal parameters and at equal MACs a token
  one row of it  {", ".join(list(registry.PRESETS)[:3])}, …
  a TOML file    with a [layer] table:

      [layer]
      kind = "mumoe_block"                                    # mumoe, mumoe_block, linear, mlp, dense_moe, …
      inputs = 768
      hidden = 3072                                           # a size is an integer or a symbol: "4*d"
      outputs = 768
      experts = 256                                           # or a hierarchy: [64, 8]
      factorization = {{ kind = "tensor_ring", ranks = [4, 4, 149] }}   # or {{ kind = "cp", rank = 556 }}
      gate = {{ activation = "entmax15", norm = "layer" }}      # softmax, sparsemax, sigmoid; batch, none
      bias = true
      input_norm = true

      [sizes]                                                 # values of symbols, if there are any
      d = 768

  a JSON file    a plan, as written by `tnmoe plan --format json -o FILE.json`

examples:
  tnmoe table gpt2 mixer clip               the paper's layers side by side
  tnmoe table gpt2 --format latex           the same for a paper
  tnmoe table moe --memory                  every family of mixtures, with what it keeps and its peaks
  tnmoe plan gpt2-tr                        the contraction order, step by step
  tnmoe cost gpt2-cp --formulas             every figure as a formula and a number
  tnmoe emit gpt2 -o gpt2_blocks.py         a standalone torch file, one class a layer
  tnmoe calibrate -o here.json              measure this machine, in under a minute
  tnmoe plan gpt2-tr --objective time --profile here.json   the order with the least predicted time
  tnmoe cost gpt2-tr --profile here.json    predicted time of each step on it
  tnmoe cost gpt2-tr --profile here.json --measure   and measured beside it
  tnmoe tune gpt2-tr --tokens 1             time its candidates here, and keep the fastest
  tnmoe check gpt2                          the emitted modules against dense einsum and torch's FLOP counter

exit codes: 0 fine, 1 a check failed, 2 bad input
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An option of another command must not pass for the start of one of this one's.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nrun '{self.prog} --help' for what is allowed\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(
        prog="tnmoe",
        description="Compile factorized mixture-of-experts layers: plan, emit torch source, count the cost exactly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tnmoe {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, *, several: bool) -> _Parser:
        sub: _Parser = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument(
            "what",
            nargs="+" if several else 1,
            metavar="PRESET|FILE",
            help=f"{', '.join(registry.FAMILIES)}, one of their rows (e.g. gpt2-cp), a TOML file, or a plan in JSON",
        )
        sub.add_argument("--tokens", type=int, metavar="T", help="rows of input (default: the preset's, else 1024)")
        sub.add_argument(
            "--size", action="append", default=[], metavar="NAME=N", help="value of a symbol; may be repeated"
        )
        sub.add_argument(
            "--objective",
            metavar="WHAT",
            help=f"what the planner minimises: {', '.join(NAMES)}; a sum such as "
            "'training + 0.5*saved', or several such as 'saved, flops', the first deciding (default: flops)",
        )
        sub.add_argument(
            "--calls", type=int, metavar="N", help="forward passes between updates of the weights, for inference"
        )
        sub.add_argument(
            "--saved-limit", type=int, metavar="N", help="elements that may be kept for the backward pass at most"
        )
        sub.add_argument(
            "--memory-limit",
            type=int,
            metavar="BYTES",
            help="bytes alive at once in a forward pass (float32) at most",
        )
        if name not in ("cost", "report", "table"):  # which have their own use for it
            sub.add_argument("--profile", metavar="FILE", help="a calibration, for --objective time")
        sub.add_argument("--planner", choices=["auto", *PLANNERS], help="default: auto")
        sub.add_argument(
            "--keep",
            metavar="WHAT",
            help="a backward pass of the module's own: save, recompute, or the bytes that it may keep at most",
        )
        sub.add_argument("--flavour", choices=FLAVOURS, help="products of that (default: portable)")
        sub.add_argument("--chunk", type=int, metavar="T", help="tokens that it takes at once")
        sub.add_argument(
            "--layout",
            metavar="WHAT",
            help=f"how weights are stored: {', '.join(LAYOUTS)}, or NAME,… of those that are (columns, inner)",
        )
        sub.add_argument("--budget", type=float, metavar="S", help="seconds to search orders of a large network")
        return sub

    def formatted(sub: _Parser, choices: Sequence[str]) -> None:
        sub.add_argument("--format", choices=choices, default="text", help="default: text")

    table = command("table", run_table, "Print one row of figures for each layer.", several=True)
    formatted(table, list(FORMATS))
    table.add_argument("--dtype", choices=list(DTYPE_BYTES), default="float32", help="for bytes; default: float32")
    table.add_argument("--profile", metavar="DEVICE|FILE", help=f"a column of predicted times: {DEVICES}")
    table.add_argument("--memory", action="store_true", help="columns of what is saved for backward, and of the peaks")
    table.add_argument(
        "--columns",
        metavar="KEY,…",
        help=f"figures, in this order (default: {','.join(COMPARED)}); of {', '.join(FIGURES)}; ideal_flops "
        "and the like are what would be left without work in vain (csv and json have them if asked for)",
    )
    table.add_argument(
        "--sort", metavar="KEY", help="rows by a column, e.g. flops; -KEY from the largest: --sort=-flops"
    )
    table.add_argument("--si", action="store_true", help="numbers in k, M, G, … (csv and json stay exact)")

    plan_command = command("plan", run_plan, "Print the contraction order, step by step.", several=True)
    formatted(plan_command, ["text", "json"])
    plan_command.add_argument("--explain", action="store_true", help="also say why, in sentences (text format)")
    plan_command.add_argument("-o", "--output", metavar="FILE", help="write there instead of printing")

    cost_command = command("cost", run_cost, "Print the cost of a layer, part by part.", several=True)
    formatted(cost_command, list(FORMATS))
    cost_command.add_argument("--dtype", choices=list(DTYPE_BYTES), default="float32", help="default: float32")
    group = cost_command.add_mutually_exclusive_group()
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

    group.add_argument(
        "--profile",
        metavar="DEVICE|FILE",
        help=f"predicted time of each step: {DEVICES}",
    )

    cost_command.add_argument(
        "--measure",
        action="store_true",
        help="time the module, too: the profile is a calibration of this machine",
    )

    emit_command = command("emit", run_emit, "Write a standalone torch module.", several=True)
    emit_command.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: print)")
    emit_command.add_argument("--name", help="name of the class, if there is one layer")

    report_command = command("report", run_report, "Write an HTML page on layers: cost, orders, source.", several=True)
    report_command.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: print)")
    report_command.add_argument("--title", default="Layers and their costs", help="of the page")
    report_command.add_argument(
        "--profile",
        metavar="DEVICE|FILE",
        help="also predicted times, and measured ones if it is of this machine",
    )

    summary = "Find the ranks that a budget allows: of a file's open symbols, or of the paper's layers."
    fit: _Parser = commands.add_parser("fit", help=summary, description=summary)
    fit.set_defaults(run=run_fit)
    fit.add_argument("what", nargs="+", metavar="PRESET|FILE", help=f"{', '.join(registry.FAMILIES)}, or a TOML file")
    for figure in ("parameters", "flops", "bytes"):
        fit.add_argument(f"--{figure}", type=int, metavar="N", help=f"the budget in {figure} (files)")
    for bound, word in (("--at-least", "floor"), ("--at-most", "ceiling")):
        fit.add_argument(
            bound, action="append", default=[], metavar="NAME=N", help=f"{word} of a rank; may be repeated"
        )
    fit.add_argument("--nearest", action="store_true", help="exceed the budget where that comes closer")
    fit.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, metavar="T", help="rows of input, for --flops")
    fit.add_argument("--dtype", choices=list(DTYPE_BYTES), default="float32", help="for --bytes; default: float32")
    formatted(fit, list(FORMATS))

    check_command = command(
        "check", run_check, "Compare the emitted module with dense einsum and torch's FLOP counter.", several=True
    )
    formatted(check_command, list(FORMATS))

    tune_command = command(
        "tune",
        run_tune,
        "Time the cheapest orders and the ways to emit them on this machine; choose the fastest. "
        "What --layout, --flavour, --chunk or --keep say is not varied.",
        several=False,
    )
    formatted(tune_command, list(FORMATS))
    tune_command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    tune_command.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    tune_command.add_argument("--training", action="store_true", help="forward and backward pass")
    tune_command.add_argument("--count", type=int, default=4, metavar="N", help="orders to measure (default: 4)")
    tune_command.add_argument("--rounds", type=int, default=15, metavar="N", help="last rounds (default: 15)")
    tune_command.add_argument(
        "--seconds", type=float, default=TUNING, metavar="S", help=f"after which it ends early (default: {TUNING:g})"
    )
    tune_command.add_argument("--fresh", action="store_true", help="measure anew, even what the cache knows")
    tune_command.add_argument("-o", "--output", metavar="FILE", help="write the winner there, as a plan in JSON")

    summary = "Measure this machine's speed, for predicted times."
    calibrate_command: _Parser = commands.add_parser("calibrate", help=summary, description=summary)
    calibrate_command.set_defaults(run=run_calibrate)
    calibrate_command.add_argument("-o", "--output", metavar="FILE", help="default: in the user's cache folder")
    calibrate_command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    calibrate_command.add_argument(
        "--dtype", action="append", choices=list(DTYPE_BYTES), help="may be repeated; default: float32"
    )
    calibrate_command.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds for each dtype (default: {BUDGET:g})"
    )
    return top
