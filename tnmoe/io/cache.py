"""Results kept between processes: one file a key, in the user's cache folder, the least recently used removed first.

A cache is a convenience: whatever goes wrong with it (no home, a full disk, an entry cut short or altered, another
process writing or removing the same key) costs a computation and never an error. Entries are written whole under a
temporary name and renamed, so readers see all of an entry or none; they carry a checksum, so what was damaged is a
miss, and is written again.

`TNMOE_CACHE` names another folder, or is `off`; `TNMOE_CACHE_LIMIT` bounds the bytes that entries take.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from tnmoe.errors import FileError
from tnmoe.io.files import TEMPORARY, write_whole

FORMAT = "tnmoe-cache-1"
VARIABLE = "TNMOE_CACHE"
LIMIT_VARIABLE = "TNMOE_CACHE_LIMIT"
LIMIT = 256 * 2**20
"""Bytes that entries may take if the user does not say."""

BLOCK = 4096
"""A file takes whole blocks of a disk, so that a million small entries are not for nothing."""

KEPT = 0.75
"""Share of the limit that an eviction leaves."""

EVICTIONS = 32
"""Times that the folder is looked through while as many bytes as the limit are written to it."""

ABANDONED = 3600.0
"""Seconds after which a temporary file's writer is taken for dead."""

DAY = 86400.0

_KEY = re.compile(r"[a-z0-9_]+-[0-9a-f]{64}")
_BYTES = re.compile(r"([0-9]{1,18})\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def enabled() -> bool:
    """False if the user has switched the cache off by `TNMOE_CACHE=off`."""
    return os.environ.get(VARIABLE, "").strip().lower() != "off"


def folder() -> Path:
    """Where results are kept.

    `$TNMOE_CACHE` if it is set (and not `off`), else `$XDG_CACHE_HOME/tnmoe`, else the system's place for caches:
    `~/.cache/tnmoe` on Linux, `~/Library/Caches/tnmoe` on macOS, `%LOCALAPPDATA%\\tnmoe\\Cache` on Windows.

    Raises:
        FileError: it is below the user's home, and there is none.
    """
    return folders()[0]


def folders() -> tuple[Path, ...]:
    """Where to look for what was kept: `folder()`, and then `~/.cache/tnmoe`, which once was the place on all systems.

    Raises:
        FileError: as `folder`.
    """
    own, caches = os.environ.get(VARIABLE, "").strip(), os.environ.get("XDG_CACHE_HOME")
    if own and enabled():
        places = [own]
    elif caches:
        places = [os.path.join(caches, "tnmoe")]
    else:
        places = [platformdirs.user_cache_dir("tnmoe", appauthor=False), "~/.cache/tnmoe"]
    try:
        return tuple(dict.fromkeys(Path(place).expanduser() for place in places))
    except RuntimeError:
        raise FileError(f"{places[0]} needs a home, and there is none; name a folder by {VARIABLE}") from None


def limit() -> int:
    """Bytes that entries may take: what `TNMOE_CACHE_LIMIT` says, else `LIMIT`."""
    stated = parse_bytes(os.environ.get(LIMIT_VARIABLE, ""))
    return LIMIT if stated is None else stated


def parse_bytes(text: str) -> int | None:
    """What a text such as `1000000`, `512M` or `2 GiB` says, by powers of 1024; None if it says no number of bytes."""
    match = _BYTES.fullmatch(text.strip())
    return int(match[1]) * 1024 ** ("", "k", "m", "g", "t").index(match[2].lower()) if match else None


def key(kind: str, question: Mapping[str, Any]) -> str:
    """The key of the answer to a question, e.g. `plan-8a…`.

    Args:
        kind: what is kept, in lower-case letters, digits and underscores; the versions of its format and of what
            computes it belong into the question.
        question: plain data (what JSON can hold) that determines the answer; the order of keys is immaterial.
    """
    text = json.dumps(question, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}"
    assert _KEY.fullmatch(name), f"{kind!r} is no kind of entry"
    return name


def get(key: str) -> dict[str, Any] | None:
    """What `put` kept under `key`, or None: nothing is kept, it is damaged, or the cache is off."""
    if not enabled():
        return None
    try:
        paths = [place / "entries" / f"{key}.json" for place in folders()]
    except FileError:
        return None
    return next((value for path in paths if (value := _read(path, key)) is not None), None)


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The value of an entry, which counts as used now."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        if json.loads(head) != _head(key, body):
            return None
        value = json.loads(body)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    with suppress(OSError):  # a folder that can only be read, or another process has removed the entry
        os.utime(path)
    return value


def put(key: str, value: Mapping[str, Any]) -> bool:
    """Keep plain data under `key`, over what was there. Returns whether it could be kept.

    Now and then, the entries that were not used for longest are removed, down to `KEPT` of `limit()`. A look through
    the folder takes long if there are many, so it is drawn by the key: one in so many that `EVICTIONS` of them are
    expected for each `limit()` bytes written, whichever processes write them.
    """
    if not enabled():
        return False
    body = json.dumps(dict(value), separators=(",", ":")).encode()
    data = json.dumps(_head(key, body)).encode() + b"\n" + body
    most, size = limit(), _on_disk(len(data))
    if size > KEPT * most:
        return False
    try:
        target = folder() / "entries" / f"{key}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
        if int(key[-8:], 16) * most < 16**8 * EVICTIONS * size:
            _evict(target.parent, int(KEPT * most))
    except (OSError, FileError):
        return False
    return True


def _head(key: str, body: bytes) -> dict[str, str]:
    """The first line of an entry; the second is the value."""
    return {"format": FORMAT, "key": key, "sha256": hashlib.sha256(body).hexdigest()}


# ---- all entries -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: of the file.
        kind: what is kept in it.
        bytes: that it takes, in whole blocks.
        used: when it was last written or read, in seconds since the epoch.
    """

    path: Path
    kind: str
    bytes: int
    used: float


def entries() -> list[Entry]:
    """All entries of all `folders()`.

    Raises:
        FileError: as `folder`.
    """
    return [entry for place in folders() for entry in _entries(_files(place / "entries"))]


def clear() -> list[Entry]:
    """Remove all entries, and nothing else in the folders. Returns what they were.

    Raises:
        FileError: one cannot be removed, or as `folder`.
    """
    listed = entries()
    stuck = [entry for entry in listed if not _remove(entry.path)]
    if stuck:
        raise FileError(f"{len(stuck):,} of {len(listed):,} entries cannot be removed, e.g. {stuck[0].path}")
    return listed


def _files(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The regular files of a folder; none if there is no folder."""
    try:
        with os.scandir(place) as listing:
            for item in listing:
                with suppress(OSError):  # gone meanwhile
                    if item.is_file(follow_symlinks=False):
                        yield Path(item.path), item.stat(follow_symlinks=False)
    except OSError:
        return


def _entries(files: Iterable[tuple[Path, os.stat_result]]) -> list[Entry]:
    """Those of the files that `put` has written."""
    return [
        Entry(path, path.name.rpartition("-")[0], _on_disk(status.st_size), status.st_mtime)
        for path, status in files
        if path.suffix == ".json" and _KEY.fullmatch(path.stem)
    ]


def _evict(place: Path, most: int) -> None:
    """Remove what was not used for longest until at most so many bytes remain, and what killed writers left behind."""
    now, files = time.time(), list(_files(place))

    def age(entry: Entry) -> float:
        # A time to come was set by a clock that went wrong; such an entry would stay for ever.
        return now - entry.used if entry.used < now + DAY else now

    kept = sorted(_entries(files), key=age)
    total = sum(entry.bytes for entry in kept)
    while total > most:
        oldest = kept.pop()
        _remove(oldest.path)
        total -= oldest.bytes
    for path, status in files:
        if path.name.startswith(TEMPORARY) and status.st_mtime < now - ABANDONED:
            _remove(path)


def _remove(path: Path) -> bool:
    """Remove a file, if another process has not done it; False if it stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
