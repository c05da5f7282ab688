"""From what is named on the command line to planned layers."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tnmoe.cli.printing import with_progress
from tnmoe.errors import DeclarationError, FileError, TnmoeError
from tnmoe.ir.layer import Layer
from tnmoe.layers import toml
from tnmoe.lowering.orient import LAYOUTS, Layout
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan, with_tokens
from tnmoe.planning.request import DEFAULT_TOKENS
from tnmoe.presets import registry
from tnmoe.reports.calls import cost
from tnmoe.reports.cost_report import CostReport

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One layer that a command is about."""

    label: str
    planned: Plan
    emitted: bool = True


def named_rows(what: str, options: argparse.Namespace) -> tuple[str, list[Row]]:
    """Title and planned layers of a preset, a TOML file or a plan."""
    sizes = parse_sizes(options.size)
    if what in registry.FAMILIES or what in registry.PRESETS:
        title, rows = registry.find(what)
        return title, [
            Row(p.label, _planned(p.spec.layer(), options, sizes, p.tokens), p.emitted)
            for p in with_progress(rows, "planning")
        ]
    if not (os.path.exists(what) or os.sep in what or "." in what):
        registry.find(what)  # raises, with the names there are
    if what.endswith(".json"):
        planned = _read_plan(what, options)
        return planned.layer.name, [Row(Path(what).stem, planned)]
    declared = toml.load(what)
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
        profile=options.profile
        if options.objective == "time" or options.command not in ("cost", "report", "table")
        else None,
        planner=options.planner or "auto",
        budget=options.budget,
        memory=int(options.keep) if (options.keep or "").isdecimal() else options.keep,
        flavour=options.flavour or "portable",
        chunk=options.chunk,
        layout=parse_layout(options.layout) if options.layout else "auto",
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
        "layout",
    ):
        if getattr(options, flag.replace("-", "_")):
            raise DeclarationError(f"{path} is a plan already: --{flag} goes with a preset or a TOML file")
    planned = read_as(path, Plan.from_json)
    return planned if options.tokens is None else with_tokens(planned, options.tokens)


def parse_layout(text: str) -> Layout:
    """A layout by its name, or names of weights."""
    return text if text in LAYOUTS or "," not in text else [name.strip() for name in text.split(",") if name.strip()]


def read_as(path: str, parse: Callable[[str], T]) -> T:
    """What a JSON file holds; every error names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse(text)
    except TnmoeError as error:
        raise type(error)(f"{path}: {error}") from None


def report_of(row: Row, options: argparse.Namespace) -> CostReport:
    """The cost report of a row."""
    return cost(row.planned, dtype=options.dtype)


def parse_sizes(given: Iterable[str], flag: str = "--size") -> dict[str, int]:
    """NAME=N pairs as a mapping."""
    found: dict[str, int] = {}
    for item in given:
        name, equals, number = item.partition("=")
        if not equals or not re.fullmatch(r"\s*[0-9]{1,19}\s*", number):
            shown = item if len(item) <= 80 else item[:80] + "…"
            raise DeclarationError(f"{flag} takes NAME=N, e.g. {flag} d=768; got {shown!r}")
        found[name.strip()] = int(number)
    return found
