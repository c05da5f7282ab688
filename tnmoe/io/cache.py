"""Results kept between processes: one file a key, in the user's cache folder.

A cache is a convenience: whatever goes wrong with it (no home, a full disk, an entry cut short or altered, another
process writing the same key) costs a computation and never an error. Entries are written whole under a temporary
name and renamed, so readers see all of an entry or none; they carry a checksum, so what was damaged is a miss, and is
written again.

`TNMOE_CACHE` names another folder, or is `off`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnmoe.io.files import write_whole

FORMAT = "tnmoe-cache-1"
VARIABLE = "TNMOE_CACHE"
_KEY = re.compile(r"[a-z0-9_]+-[0-9a-f]{64}")


def enabled() -> bool:
    """False if the user has switched the cache off by `TNMOE_CACHE=off`."""
    return os.environ.get(VARIABLE, "").strip().lower() != "off"


def folder() -> Path:
    """`$TNMOE_CACHE` if it is set (and not `off`), else `$XDG_CACHE_HOME/tnmoe`, else `~/.cache/tnmoe`."""
    own = os.environ.get(VARIABLE, "").strip()
    if own and enabled():
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tnmoe"


def key(kind: str, question: Mapping[str, Any]) -> str:
    """The key of the answer to a question, e.g. `plan-8a…`.

    Args:
        kind: what is kept, in lower-case letters, digits and underscores; the versions of its format and of what
            computes it belong into the question.
        question: plain data (what JSON can hold) that determines the answer; the order of keys is immaterial.
    """
    text = json.dumps(question, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    found = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}"
    assert _KEY.fullmatch(found), f"{kind!r} is no kind of entry"
    return found


def get(key: str) -> dict[str, Any] | None:
    """What `put` kept under `key`, or None: nothing is kept, it is damaged, or the cache is off."""
    if not enabled():
        return None
    try:
        head, _, body = _path(key).read_bytes().partition(b"\n")
        if json.loads(head) != _head(key, body):
            return None
        value = json.loads(body)
    except (OSError, ValueError, RecursionError, RuntimeError):
        return None
    return value if isinstance(value, dict) else None


def put(key: str, value: Mapping[str, Any]) -> bool:
    """Keep plain data under `key`, over what was there. Returns whether it could be kept."""
    if not enabled():
        return False
    body = json.dumps(dict(value), separators=(",", ":")).encode()
    try:
        target = _path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps(_head(key, body)).encode() + b"\n" + body)
    except (OSError, RuntimeError):
        return False
    return True


def clear() -> int:
    """Remove all entries (and nothing else in the folder). Returns how many there were."""
    count = 0
    try:
        for path in (folder() / "entries").glob("*.json"):
            path.unlink(missing_ok=True)
            count += 1
    except (OSError, RuntimeError):
        pass
    return count


def _path(key: str) -> Path:
    return folder() / "entries" / f"{key}.json"


def _head(key: str, body: bytes) -> dict[str, str]:
    """The first line of an entry; the second is the value."""
    return {"format": FORMAT, "key": key, "sha256": hashlib.sha256(body).hexdigest()}
