"""Reading declarations from TOML files, and writing results without ever leaving half a file."""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tnmoe.errors import DeclarationError, FileError
from tnmoe.layer import Layer
from tnmoe.layers import check_keys, declare


@dataclass(frozen=True, slots=True)
class Declared:
    """What a file declares: a layer, and values for its symbols."""

    layer: Layer
    sizes: Mapping[str, int]


def load(path: str | os.PathLike[str]) -> Declared:
    """The layer that a TOML file declares in `[layer]`, with the values of its symbols from `[sizes]`.

    Raises:
        FileError: if the file cannot be read or is no TOML.
        DeclarationError: naming the file, the key, the value and what is allowed.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_bytes().decode("utf-8"))
    except IsADirectoryError:
        raise FileError(f"{path} is a directory; name a TOML file") from None
    except FileNotFoundError:
        raise FileError(f"{path} does not exist") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text (byte {error.start}); a declaration is a TOML file") from None
    except (ValueError, RecursionError) as error:  # no TOML, a number of thousands of digits, deep nesting
        raise FileError(f"{path} is not TOML: {error}") from None
    try:
        check_keys(data, ["layer", "sizes"], ["layer"], "top-level ")
        sizes = data.get("sizes", {})
        if not isinstance(sizes, Mapping):
            raise DeclarationError(f"sizes must be a table such as [sizes] d = 768, got {sizes!r}")
        for key, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeclarationError(f"sizes.{key} must be a positive integer, got {value!r}")
        try:
            return Declared(declare(data["layer"]), sizes)
        except DeclarationError as error:
            raise DeclarationError(f"[layer] {error}") from None
    except DeclarationError as error:
        raise DeclarationError(f"{path}: {error}") from None


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
            _replace(target, data)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be written: {reason}") from None
    return path


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".tnmoe-", dir=target.parent)
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
