"""Writing files whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tnmoe.errors import FileError

TEMPORARY = ".tnmoe-"
"""How the names of files begin that are not written to their end yet."""


def save(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a file whole or not at all: into a temporary file beside it, then renamed over it.

    A symbolic link is followed. What is no regular file (a pipe, a device) is written to directly.

    Raises:
        FileError: if it cannot be written; whatever was there before is untouched.
    """
    path = Path(path)
    try:
        data = text.encode("utf-8")
        target = path.resolve()
        if target.is_dir():
            raise FileError(f"{path} is a directory; name a file in it, e.g. {path / 'layer.py'}")
        if not target.parent.is_dir():
            raise FileError(f"{path.parent} is no directory; make it first")
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            write_whole(target, data)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be written: {reason}") from None
    return path


def write_whole(target: Path, data: bytes) -> None:
    """Put `data` into a file that exists with all of it or stays as it was; raises `OSError`."""
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files; this one is an ordinary one
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def json_text(value: Any) -> str:
    """JSON as every file of this project writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False)
