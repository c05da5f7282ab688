"""The command line. Exit codes: 0 fine, 1 a check failed, 2 bad input."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table as RichTable
from rich.text import Text

from tnmoe import files, presets, writing
from tnmoe._version import __version__
from tnmoe.api import cost, emit, memory
from tnmoe.calibrate import BUDGET, calibrate
from tnmoe.check import check
from tnmoe.cost import DTYPE_BYTES
from tnmoe.cost_report import COMPARED, CostReport, comparison
from tnmoe.datasheet import Datasheet, datasheet, datasheet_names
from tnmoe.device_profile import DeviceProfile, default_path
from tnmoe.errors import CostError, DeclarationError, FileError, TnmoeError
from tnmoe.explain import explain
from tnmoe.figures import FIGURES
from tnmoe.fit_ranks import fit_ranks
from tnmoe.fit_table import published
from tnmoe.function import FLAVOURS
from tnmoe.goals import ALONE, OBJECTIVES
from tnmoe.hardware import Device, predict
from tnmoe.html_report import html_report
from tnmoe.layer import Layer
from tnmoe.optimizers import PRECISIONS
from tnmoe.plan import Plan
from tnmoe.planning import plan, with_tokens
from tnmoe.question import DEFAULT_TOKENS, PLANNERS
from tnmoe.report import FORMATS, Cell, Table, grouped
from tnmoe.tune import DTYPES, tune

T = TypeVar("T")

EPILOG = f"""\
what to name:
  a preset       {", ".join(presets.FAMILIES)}: the paper's layers, each as MLP or linear, CP, TR, dense and sparse MoE;
                 moe: every family of mixtures at equal parameters and at equal MACs a token
  one row of it  {", ".join(list(presets.PRESETS)[:3])}, …
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
  tnmoe plan gpt2-tr                        the contraction order, step by step
  tnmoe cost gpt2-cp --formulas             every figure as a formula and a number
  tnmoe emit gpt2 -o gpt2_blocks.py         a standalone torch file, one class a layer
  tnmoe calibrate -o here.json              measure this machine, in under a minute
  tnmoe plan gpt2-tr --objective time --profile here.json   the order with the least predicted time
  tnmoe cost gpt2-tr --profile here.json    predicted time of each step on it
  tnmoe tune gpt2-tr --tokens 1             time its cheapest orders here, and keep the fastest
  tnmoe check gpt2                          the emitted modules against dense einsum and torch's FLOP counter

exit codes: 0 fine, 1 a check failed, 2 bad input
"""


@dataclass(frozen=True)
class Row:
    """One layer that a command is about."""

    label: str
    planned: Plan
    emitted: bool = True


class _Parser(argparse.ArgumentParser):
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
            help=f"{', '.join(presets.FAMILIES)}, one of their rows (e.g. gpt2-cp), a TOML file, or a plan in JSON",
        )
        sub.add_argument("--tokens", type=int, metavar="T", help="rows of input (default: the preset's, else 1024)")
        sub.add_argument(
            "--size", action="append", default=[], metavar="NAME=N", help="value of a symbol; may be repeated"
        )
        sub.add_argument(
            "--objective",
            metavar="WHAT",
            help=f"what the planner minimises: {', '.join((*OBJECTIVES, *ALONE))}; a sum such as "
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
        if name != "cost":  # which has its own use for it
            sub.add_argument("--profile", metavar="FILE", help="a calibration, for --objective time")
        sub.add_argument("--planner", choices=["auto", *PLANNERS], help="default: auto")
        sub.add_argument(
            "--keep",
            metavar="WHAT",
            help="a backward pass of the module's own: save, recompute, or the bytes that it may keep at most",
        )
        sub.add_argument("--flavour", choices=FLAVOURS, help="products of that (default: portable)")
        sub.add_argument("--chunk", type=int, metavar="T", help="tokens that it takes at once")
        sub.add_argument("--budget", type=float, metavar="S", help="seconds to search orders of a large network")
        return sub

    def formatted(sub: _Parser, choices: Sequence[str]) -> None:
        sub.add_argument("--format", choices=choices, default="text", help="default: text")

    table = command("table", _table, "Print one row of figures for each layer.", several=True)
    formatted(table, list(FORMATS))
    table.add_argument("--dtype", choices=list(DTYPE_BYTES), default="float32", help="for bytes; default: float32")
    table.add_argument(
        "--columns",
        metavar="KEY,…",
        help=f"figures, in this order (default: {','.join(COMPARED)}); of {', '.join(FIGURES)}",
    )
    table.add_argument(
        "--sort", metavar="KEY", help="rows by a column, e.g. flops; -KEY from the largest: --sort=-flops"
    )
    table.add_argument("--si", action="store_true", help="numbers in k, M, G, … (csv and json stay exact)")

    plan_command = command("plan", _plan, "Print the contraction order, step by step.", several=True)
    formatted(plan_command, ["text", "json"])
    plan_command.add_argument("--explain", action="store_true", help="also say why, in sentences (text format)")
    plan_command.add_argument("-o", "--output", metavar="FILE", help="write there instead of printing")

    cost_command = command("cost", _cost, "Print the cost of a layer, part by part.", several=True)
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
        help=f"predicted time of each step: {', '.join(datasheet_names())} by data sheet, or a calibration's file",
    )

    emit_command = command("emit", _emit, "Write a standalone torch module.", several=True)
    emit_command.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: print)")
    emit_command.add_argument("--name", help="name of the class, if there is one layer")

    report_command = command(
        "report", _report_page, "Write an HTML page on layers: cost, orders, source.", several=True
    )
    report_command.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: print)")
    report_command.add_argument("--title", default="Layers and their costs", help="of the page")

    summary = "Find the ranks that a budget allows: of a file's open symbols, or of the paper's layers."
    fit: _Parser = commands.add_parser("fit", help=summary, description=summary)
    fit.set_defaults(run=_fit)
    fit.add_argument("what", nargs="+", metavar="PRESET|FILE", help=f"{', '.join(presets.FAMILIES)}, or a TOML file")
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
        "check", _check, "Compare the emitted module with dense einsum and torch's FLOP counter.", several=True
    )
    formatted(check_command, list(FORMATS))

    tune_command = command(
        "tune", _tune, "Time the cheapest orders on this machine; choose the fastest.", several=False
    )
    formatted(tune_command, list(FORMATS))
    tune_command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    tune_command.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    tune_command.add_argument("--training", action="store_true", help="forward and backward pass")
    tune_command.add_argument("--count", type=int, default=4, metavar="N", help="orders to measure (default: 4)")
    tune_command.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each (default: 15)")
    tune_command.add_argument("--fresh", action="store_true", help="measure anew, even what the cache knows")
    tune_command.add_argument("-o", "--output", metavar="FILE", help="write the winner there, as a plan in JSON")

    summary = "Measure this machine's speed, for predicted times."
    calibrate_command: _Parser = commands.add_parser("calibrate", help=summary, description=summary)
    calibrate_command.set_defaults(run=_calibrate)
    calibrate_command.add_argument("-o", "--output", metavar="FILE", help="default: in the user's cache folder")
    calibrate_command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    calibrate_command.add_argument(
        "--dtype", action="append", choices=list(DTYPE_BYTES), help="may be repeated; default: float32"
    )
    calibrate_command.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds for each dtype (default: {BUDGET:g})"
    )
    return top


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
    if hasattr(options, "what"):
        options.what = [name for what in options.what for name in presets.GROUPS.get(what, (what,))]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        code: int = options.run(options)
    return code


def _discard_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it cannot fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- commands ------------------------------------------------------------------------------------------------


def _table(options: argparse.Namespace) -> int:
    tables = []
    figures = COMPARED if options.columns is None else [key.strip() for key in options.columns.split(",")]
    for what in options.what:
        title, rows = _rows(what, options)
        reports = {row.label: _report(row, options) for row in _progress(rows, "costing")}
        tables.append(comparison(reports, f"{title}, {options.dtype}", figures=figures))
    if options.format in ("csv", "json"):  # one document
        tables = [replace(tables[0], rows=tuple(row for t in tables for row in t.rows))]
    elif options.si:
        tables = [table.si() for table in tables]
    _print(tables if options.sort is None else [table.sorted(options.sort) for table in tables], options.format)
    return 0


def _plan(options: argparse.Namespace) -> int:
    plans = [row.planned for what in options.what for row in _rows(what, options)[1]]
    if options.format == "json":
        texts = [p.to_json() for p in plans]
        _deliver((texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]") + "\n", options.output)
    elif options.output is not None:
        texts = [f"{p}\n\n{explain(p)}" if options.explain else str(p) for p in plans]
        _deliver("\n\n".join(texts) + "\n", options.output)
    else:
        for k, p in enumerate(plans):
            print("\n" if k else "", end="")
            _print([p.table()], "text")
            if options.explain:
                print(f"\n{explain(p)}")
    return 0


def _cost(options: argparse.Namespace) -> int:
    tables = []
    profile = None if options.profile is None else _device(options.profile)
    for what in options.what:
        for row in _rows(what, options)[1]:
            report = _report(row, options)
            if profile is not None:
                if row.emitted or isinstance(profile, Datasheet):  # routed layers cannot be measured
                    tables.append(predict(report.bound, profile, options.dtype).table(row.label))
                continue
            if options.memory:
                tables += _memory(row, options)
                continue
            tables.append(_view(report, options))
    if not tables:
        if options.memory:
            raise DeclarationError("there is no layer whose memory is counted")
        raise DeclarationError("these layers are only costed, so there is no time to predict")
    if len(tables) > 1 and options.format in ("csv", "json"):  # one document, which then says which layer a row is of
        labels = [t.title for t in tables]
        rows = tuple((label, *row) for label, t in zip(labels, tables, strict=True) for row in t.rows)
        tables = [replace(tables[0], columns=(("layer", "layer"), *tables[0].columns), rows=rows)]
    _print(tables, options.format)
    return 0


def _device(name: str) -> Device:
    """A device that comes with the package, or the one of a file."""
    known = name in datasheet_names() or not (os.path.exists(name) or os.sep in name or "." in name)
    return datasheet(name) if known else _read(name, DeviceProfile.from_json)


def _memory(row: Row, options: argparse.Namespace) -> Sequence[Table]:
    """The memory report of a row; of a layer whose memory is not counted yet, a line about it."""
    found = memory(row.planned, dtype=options.dtype)
    try:
        return [found.timeline()] if options.format in ("csv", "json") else found.tables()
    except CostError as error:
        print(f"left out: {row.label}: {error}", file=sys.stderr)
        return []


def _view(report: CostReport, options: argparse.Namespace) -> Table:
    if options.training:
        return report.training(options.training)
    chosen = {"steps": report.steps, "backward": report.backward, "formulas": report.symbolic}
    return next((view for name, view in chosen.items() if getattr(options, name)), report.parts)()


def _emit(options: argparse.Namespace) -> int:
    rows = [row for what in options.what for row in _rows(what, options)[1]]
    chosen = [row for row in rows if row.emitted]
    if not chosen:
        raise DeclarationError(f"{rows[0].label} is only costed; declare the layer in a file to build it")
    if options.name is not None and len(chosen) > 1:
        raise DeclarationError(f"--name goes with one layer, this names {len(chosen)}; choose one row, e.g. gpt2-cp")
    names = options.name if options.name is not None else _unique([row.planned.layer.name for row in chosen])
    source = emit([row.planned for row in chosen], name=names)
    _deliver(source, options.output)
    if options.output:
        for row in rows:
            if not row.emitted:
                print(f"left out: {row.label} (cost only)")
    return 0


def _report_page(options: argparse.Namespace) -> int:
    rows = [row for what in options.what for row in _rows(what, options)[1]]
    page = html_report([row.planned for row in rows], options.title, [row.label for row in rows])
    _deliver(page, options.output)
    return 0


def _fit(options: argparse.Namespace) -> int:
    tables = []
    for what in options.what:
        if what in presets.FAMILIES:
            tables.append(published(what, nearest=options.nearest))
            continue
        fitted = fit_ranks(
            files.load(what).layer,
            parameters=options.parameters,
            flops=options.flops,
            bytes=options.bytes,
            at_least=_sizes(options.at_least, "--at-least"),
            at_most=_sizes(options.at_most, "--at-most"),
            nearest=options.nearest,
            tokens=options.tokens,
            dtype=options.dtype,
        )
        tables.append(fitted.table())
    if options.format in ("csv", "json") and len({t.columns for t in tables}) == 1:  # one document
        tables = [replace(tables[0], rows=tuple(row for t in tables for row in t.rows))]
    _print(tables, options.format)
    return 0


def _tune(options: argparse.Namespace) -> int:
    rows = [row for what in options.what for row in _rows(what, options)[1] if row.emitted]
    if len(rows) != 1:
        raise DeclarationError(f"tune takes one layer that can be emitted, this names {len(rows)}; e.g. gpt2-cp")
    tuned = tune(
        rows[0].planned,
        device=options.device,
        dtype=options.dtype,
        training=options.training,
        count=options.count,
        rounds=options.rounds,
        fresh=options.fresh,
    )
    _print([tuned.table()], options.format)
    if options.output is not None:
        _deliver(tuned.plan.to_json() + "\n", options.output)
    return 0


def _check(options: argparse.Namespace) -> int:
    rows = [row for what in options.what for row in _rows(what, options)[1]]
    chosen = [row for row in rows if row.emitted]
    if not chosen:
        raise DeclarationError(f"{rows[0].label} is only costed; declare the layer in a file to build it")
    reports = [(row.label, check(row.planned)) for row in _progress(chosen, "checking")]
    cells = tuple((label, *line) for label, report in reports for line in report.table().rows)
    left = tuple(f"Not checked (cost only): {row.label}." for row in rows if not row.emitted)
    columns = (("layer", "layer"), *reports[0][1].table().columns)
    _print([Table("Emitted modules against their declarations", columns, cells, left)], options.format)
    return 0 if all(report.passed for _, report in reports) else 1


def _calibrate(options: argparse.Namespace) -> int:
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
    writing.save(profile.to_json() + "\n", path)
    print(f"wrote {path}: {profile.name}, {profile.source}")
    return 0


# ---- input and output ----------------------------------------------------------------------------------------


def _rows(what: str, options: argparse.Namespace) -> tuple[str, list[Row]]:
    """Title and planned layers of a preset, a TOML file or a plan."""
    sizes = _sizes(options.size)
    if what in presets.FAMILIES or what in presets.PRESETS:
        title, rows = presets.find(what)
        return title, [
            Row(p.label, _planned(p.spec.layer(), options, sizes, p.tokens), p.emitted)
            for p in _progress(rows, "planning")
        ]
    if not (os.path.exists(what) or os.sep in what or "." in what):
        presets.find(what)  # raises, with the names there are
    if what.endswith(".json"):
        planned = _read_plan(what, options)
        return planned.layer.name, [Row(Path(what).stem, planned)]
    declared = files.load(what)
    planned = _planned(declared.layer, options, {**declared.sizes, **sizes}, DEFAULT_TOKENS)
    return declared.layer.name, [Row(Path(what).stem, planned)]


def _planned(layer: Layer, options: argparse.Namespace, sizes: dict[str, int], tokens: int) -> Plan:
    tokens = tokens if options.tokens is None else options.tokens
    own = {layer.token_symbol} if layer.batched else set()
    for name in sorted(layer.free_symbols - own - set(sizes)):
        raise DeclarationError(f"{name} has no value: add --size {name}=…, or a table [sizes] to the file")
    return plan(
        layer,
        tokens=tokens,
        sizes=sizes,
        objective=options.objective or "flops",
        calls=options.calls,
        saved_limit=options.saved_limit,
        memory_limit=options.memory_limit,
        profile=options.profile if options.objective == "time" or options.command != "cost" else None,
        planner=options.planner or "auto",
        budget=options.budget,
        memory=int(options.keep) if (options.keep or "").isdecimal() else options.keep,
        flavour=options.flavour or "portable",
        chunk=options.chunk,
    )


def _read_plan(path: str, options: argparse.Namespace) -> Plan:
    for flag in (
        "size",
        "objective",
        "calls",
        "saved-limit",
        "memory-limit",
        "planner",
        "budget",
        "keep",
        "flavour",
        "chunk",
    ):
        if getattr(options, flag.replace("-", "_")):
            raise DeclarationError(f"{path} is a plan already: --{flag} goes with a preset or a TOML file")
    planned = _read(path, Plan.from_json)
    return planned if options.tokens is None else with_tokens(planned, options.tokens)


def _read(path: str, parse: Callable[[str], T]) -> T:
    """What a JSON file holds; every error names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse(text)
    except TnmoeError as error:
        raise type(error)(f"{path}: {error}") from None


def _report(row: Row, options: argparse.Namespace) -> CostReport:
    return cost(row.planned, dtype=options.dtype)


def _sizes(given: Iterable[str], flag: str = "--size") -> dict[str, int]:
    found: dict[str, int] = {}
    for item in given:
        name, equals, number = item.partition("=")
        if not equals or not re.fullmatch(r"\s*[0-9]{1,19}\s*", number):
            shown = item if len(item) <= 80 else item[:80] + "…"
            raise DeclarationError(f"{flag} takes NAME=N, e.g. {flag} d=768; got {shown!r}")
        found[name.strip()] = int(number)
    return found


def _unique(names: list[str]) -> list[str]:
    """Class names with a number where one occurs twice."""
    return [n if names.count(n) == 1 else f"{n}{names[: k + 1].count(n)}" for k, n in enumerate(names)]


def _deliver(text: str, output: str | None) -> None:
    if output is None:
        print(text, end="")
    else:
        path = writing.save(text, output)
        print(f"wrote {path} ({grouped(len(text.splitlines()))} lines)")


def _print(tables: list[Table], form: str) -> None:
    if form == "text" and sys.stdout.isatty():
        console = Console()
        for table in tables:
            for shown in _rich(table, console.width):
                console.print(shown)
    else:
        print("\n\n".join(table.render(form) for table in tables))


def _rich(table: Table, width: int) -> list[RichTable]:
    """The table for a terminal. Numbers are never broken: if they do not fit side by side, rows become columns."""
    numeric = [table.numeric(k) for k in range(len(table.columns))]
    widths = [
        max([len(heading) if right else 12, *(len(grouped(row[k])) if right else 0 for row in table.rows)])
        for k, ((_, heading), right) in enumerate(zip(table.columns, numeric, strict=True))
    ]
    if sum(widths) + 2 * len(widths) <= width or not all(numeric[1:]):
        return [_rich_part(table, numeric, table.columns, table.rows)]
    # Each row's numbers below its label, as many rows at a time as fit.
    head = max(len(heading) for _, heading in table.columns)
    column = max(len(grouped(cell)) for row in table.rows for cell in row[1:])
    step = max(1, (width - head - 2) // (column + 2))
    parts = []
    for start in range(0, len(table.rows), step):
        chunk = table.rows[start : start + step]
        columns = (table.columns[0], *((str(k), str(row[0])) for k, row in enumerate(chunk)))
        rows = tuple((heading, *(row[k] for row in chunk)) for k, (_, heading) in enumerate(table.columns) if k)
        parts.append(
            _rich_part(table, [False] + [True] * len(chunk), columns, rows, last=start + step >= len(table.rows))
        )
    return parts


def _rich_part(
    table: Table,
    numeric: Sequence[bool],
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[Cell]],
    *,
    last: bool = True,
) -> RichTable:
    # As `Text`, for in plain strings rich takes "[t i]" for markup and hides it.
    caption = Text("\n".join(table.notes)) if last and table.notes else None
    shown = RichTable(
        title=Text(table.title),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for k, ((_, heading), right) in enumerate(zip(columns, numeric, strict=True)):
        least = max((len(grouped(row[k])) for row in rows), default=0) if right else None
        justify: Literal["left", "right"] = "right" if right else "left"
        shown.add_column(Text(heading), justify=justify, overflow="fold", min_width=least)
    for row in rows:
        shown.add_row(*(Text(grouped(cell)) for cell in row))
    return shown


def _progress(items: Sequence[T], doing: str) -> Iterable[T]:
    """A progress bar on the terminal's error stream, gone when it is done."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal or len(items) < 2)
