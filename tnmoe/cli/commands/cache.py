"""`tnmoe cache`: what is kept between runs, and how to be rid of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from tnmoe.cli.grammar import Commands, add_format
from tnmoe.cli.printing import print_tables
from tnmoe.errors import DeclarationError
from tnmoe.io import cache
from tnmoe.render.table import FORMATS, Table
from tnmoe.timing.device_profile import kept_profiles

SUMMARY = "Show what is kept between runs in the user's cache folder, or remove it."


def declare(commands: Commands) -> None:
    """Add the command and its options."""
    sub = commands.add_parser("cache", help=SUMMARY, description=SUMMARY)
    sub.set_defaults(run=lambda given: run(clear=given.clear, form=given.format))
    sub.add_argument("--clear", action="store_true", help="remove all entries; calibrations stay")
    add_format(sub, list(FORMATS))


def run(*, clear: bool, form: str) -> int:
    """Print what lies in the cache, or remove the entries and print what they were.

    Args:
        clear: remove them.
        form: one of `FORMATS`.

    Raises:
        DeclarationError: the cache is off, or its limit is no number of bytes.
        FileError: an entry cannot be removed.
    """
    if not cache.enabled():
        raise DeclarationError(f"the cache is off: {cache.VARIABLE}={os.environ[cache.VARIABLE]}")
    stated = os.environ.get(cache.LIMIT_VARIABLE, "")
    if stated and cache.parse_bytes(stated) is None:
        raise DeclarationError(f"{cache.LIMIT_VARIABLE} must be bytes, e.g. 512M or 2G (by 1024); got {stated!r}")
    entries = cache.clear() if clear else cache.entries()
    print_tables([_table(f"{'Removed from' if clear else 'Kept in'} {cache.folder()}", entries)], form)
    return 0


def _table(title: str, entries: Sequence[cache.Entry]) -> Table:
    """Number and bytes of the entries of each kind, and what the cache holds besides."""
    count, taken = Counter(e.kind for e in entries), Counter[str]()
    for entry in entries:
        taken[entry.kind] += entry.bytes
    rows = (*((kind, count[kind], taken[kind]) for kind in sorted(count)), ("all", len(entries), sum(taken.values())))
    calibrations = ", ".join(dict.fromkeys(path.name for path in kept_profiles()))
    notes = (
        f"Limit: {cache.limit():,} bytes ({cache.LIMIT_VARIABLE}); the least recently used are removed first.",
        *(f"Of earlier versions, read but not written: {place}." for place in cache.folders()[1:] if place.is_dir()),
        *([f"Calibrations, which are never removed: {calibrations}."] if calibrations else []),
    )
    return Table(title, (("kind", "kind"), ("entries", "entries"), ("bytes", "bytes")), rows, notes)
