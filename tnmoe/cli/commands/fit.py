"""`tnmoe fit`: the ranks that a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tnmoe.analysis.fit_ranks import fit_ranks
from tnmoe.analysis.fit_table import published
from tnmoe.cli.grammar import Commands, add_dtype, add_format
from tnmoe.cli.inputs import parse_sizes
from tnmoe.cli.printing import DATA_FORMATS, one_document, print_tables
from tnmoe.cli.rows import expanded
from tnmoe.layers import toml
from tnmoe.planning.request import DEFAULT_TOKENS
from tnmoe.presets import registry
from tnmoe.render.table import FORMATS

SUMMARY = "Find the ranks that a budget allows: of a file's open symbols, or of the paper's layers."


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = commands.add_parser("fit", help=SUMMARY, description=SUMMARY)
    sub.set_defaults(
        run=lambda given: run(
            given.what,
            parameters=given.parameters,
            flops=given.flops,
            bytes=given.bytes,
            at_least=parse_sizes(given.at_least, "--at-least"),
            at_most=parse_sizes(given.at_most, "--at-most"),
            nearest=given.nearest,
            tokens=given.tokens,
            dtype=given.dtype,
            form=given.format,
        )
    )
    sub.add_argument("what", nargs="+", metavar="PRESET|FILE", help=f"{', '.join(registry.FAMILIES)}, or a TOML file")
    for figure in ("parameters", "flops", "bytes"):
        sub.add_argument(f"--{figure}", type=int, metavar="N", help=f"the budget in {figure} (files)")
    for bound, word in (("--at-least", "floor"), ("--at-most", "ceiling")):
        sub.add_argument(
            bound, action="append", default=[], metavar="NAME=N", help=f"{word} of a rank; may be repeated"
        )
    sub.add_argument("--nearest", action="store_true", help="exceed the budget where that comes closer")
    sub.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, metavar="T", help="rows of input, for --flops")
    add_dtype(sub, "for --bytes; ")
    add_format(sub, list(FORMATS))


def run(
    names: Sequence[str],
    *,
    parameters: int | None,
    flops: int | None,
    bytes: int | None,
    at_least: Mapping[str, int],
    at_most: Mapping[str, int],
    nearest: bool,
    tokens: int,
    dtype: str,
    form: str,
) -> int:
    """Print the ranks that a budget allows.

    Args:
        names: families of presets, whose budget is published, and TOML files.
        parameters, flops, bytes, at_least, at_most, nearest, tokens, dtype: as in `fit_ranks`, for files.
        form: one of `FORMATS`.
    """
    tables = []
    for name in expanded(names):
        if name in registry.FAMILIES:
            tables.append(published(name, nearest=nearest))
            continue
        fitted = fit_ranks(
            toml.load(name).layer,
            parameters=parameters,
            flops=flops,
            bytes=bytes,
            at_least=at_least,
            at_most=at_most,
            nearest=nearest,
            tokens=tokens,
            dtype=dtype,
        )
        tables.append(fitted.table())
    if form in DATA_FORMATS and len({t.columns for t in tables}) == 1:
        tables = [one_document(tables)]
    print_tables(tables, form)
    return 0
