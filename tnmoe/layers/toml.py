"""Declarations in TOML: read from files, and written."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from tnmoe.errors import DeclarationError, FileError
from tnmoe.ir.layer import Layer
from tnmoe.layers.kinds import check_keys, declare


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


def written(mapping: Mapping[str, Any], width: int) -> list[str]:
    """The lines of a mapping as TOML: a key a line, its value behind it, inline, where that fits into `width`.

    What is longer takes a line for each entry: the items of a list between its brackets, those of a table under dotted
    keys, since an inline table may not be broken. One long text stays on one line.

    Raises:
        TypeError: TOML has no form for a value.
    """
    return [line for key, value in mapping.items() for line in _entry(_key(key), value, width)]


def _entry(key: str, value: Any, width: int) -> list[str]:
    line = f"{key} = {_inline(value)}"
    if len(line) <= width or not value:
        return [line]
    if isinstance(value, Mapping):
        return [line for k, v in value.items() for line in _entry(f"{key}.{_key(k)}", v, width)]
    if isinstance(value, list | tuple):
        return [f"{key} = [", *(f"    {_inline(item)}," for item in value), "]"]
    return [line]


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return _dumped({"x": value}).removeprefix("x = ")


def _key(key: str) -> str:
    return _dumped({key: 0}).removesuffix(" = 0")


def _dumped(pair: Mapping[str, Any]) -> str:
    """One line `key = value`; TOML allows a tab in a text, but whoever lays the line out may take it for blanks."""
    return tomli_w.dumps(pair).removesuffix("\n").replace("\t", "\\t")
