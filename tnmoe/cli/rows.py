"""From what is named on the command line to planned layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tnmoe.cli.inputs import looks_like_file, read_as
from tnmoe.cli.plan_options import PlanOptions
from tnmoe.cli.printing import with_progress
from tnmoe.errors import DeclarationError
from tnmoe.layers import toml
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import with_tokens
from tnmoe.planning.request import DEFAULT_TOKENS
from tnmoe.presets import registry


@dataclass(frozen=True)
class Row:
    """One layer that a command is about."""

    label: str
    planned: Plan
    emitted: bool = True


def expanded(names: Iterable[str]) -> list[str]:
    """What is named, the name of a group standing for all of its families."""
    return [member for name in names for member in registry.GROUPS.get(name, (name,))]


def titled_rows(names: Iterable[str], options: PlanOptions) -> Iterator[tuple[str, list[Row]]]:
    """For each that is named, a title and its planned layers."""
    for name in expanded(names):
        yield _named(name, options)


def planned_rows(names: Iterable[str], options: PlanOptions) -> list[Row]:
    """All planned layers that are named."""
    return [row for _, rows in titled_rows(names, options) for row in rows]


def emitted_rows(rows: Iterable[Row]) -> list[Row]:
    """Those that can be emitted.

    Raises:
        DeclarationError: if there is none.
    """
    rows = list(rows)
    chosen = [row for row in rows if row.emitted]
    if not chosen:
        raise DeclarationError(f"{rows[0].label} is only costed; declare the layer in a file to build it")
    return chosen


def _named(what: str, options: PlanOptions) -> tuple[str, list[Row]]:
    """Title and planned layers of a preset, a TOML file or a plan."""
    if what in registry.FAMILIES or what in registry.PRESETS:
        title, presets = registry.find(what)
        return title, [
            Row(p.label, options.plan(p.spec.layer(), {}, p.tokens), p.emitted)
            for p in with_progress(presets, "planning")
        ]
    if not looks_like_file(what):
        registry.find(what)  # raises, with the names there are
    if what.endswith(".json"):
        planned = _read_plan(what, options)
        return planned.layer.name, [Row(Path(what).stem, planned)]
    declared = toml.load(what)
    planned = options.plan(declared.layer, declared.sizes, DEFAULT_TOKENS)
    return declared.layer.name, [Row(Path(what).stem, planned)]


def _read_plan(path: str, options: PlanOptions) -> Plan:
    for flag in options.instructions:
        raise DeclarationError(f"{path} is a plan already: {flag} goes with a preset or a TOML file")
    planned = read_as(path, Plan.from_json)
    return planned if options.tokens is None else with_tokens(planned, options.tokens)
