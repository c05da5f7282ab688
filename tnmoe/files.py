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
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path} is not TOML: {error}") from None
    try:
        check_keys(data, ["layer", "sizes"], ["layer"], "top-level ")
        sizes = data.get("sizes", {})
        if not isinstance(sizes, Mapping):
            raise DeclarationError(f"sizes must be a table such as [sizes] d = 768, got {sizes!r}")
        for key, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeclarationError(f"sizes.{key} must be a positive integer, got {value!r}")
        return Declared(declare(data["layer"]), sizes)
    except DeclarationError as error:
        raise DeclarationError(f"{path}: [layer] {error}") from None


def save(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a file whole or not at all: into a temporary file beside it, then renamed over it.

    Raises:
        FileError: if it cannot be written; whatever was there before is untouched.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a directory; name a file in it, e.g. {path / 'layer.py'}")
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is no directory; make it first")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files; this one is an ordinary one
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise FileError(f"{path} cannot be written: {error.strerror}") from None
    return path
