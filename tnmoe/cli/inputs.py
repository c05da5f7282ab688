"""What options and files say, as values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from tnmoe.errors import DeclarationError, FileError, TnmoeError
from tnmoe.lowering.orient import LAYOUTS, Layout
from tnmoe.timing.datasheet import datasheet, datasheet_names
from tnmoe.timing.device import Device
from tnmoe.timing.device_profile import DeviceProfile

T = TypeVar("T")


def parse_sizes(given: Iterable[str], flag: str = "--size") -> dict[str, int]:
    """NAME=N pairs as a mapping."""
    sizes: dict[str, int] = {}
    for item in given:
        name, equals, number = item.partition("=")
        if not equals or not re.fullmatch(r"\s*[0-9]{1,19}\s*", number):
            shown = item if len(item) <= 80 else item[:80] + "…"
            raise DeclarationError(f"{flag} takes NAME=N, e.g. {flag} d=768; got {shown!r}")
        sizes[name.strip()] = int(number)
    return sizes


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


def looks_like_file(name: str) -> bool:
    """True if a name is that of a file, or is written as one."""
    return os.path.exists(name) or os.sep in name or "." in name


def read_device(name: str) -> Device:
    """A device that comes with the package, or the one of a file."""
    if name in datasheet_names() or not looks_like_file(name):
        return datasheet(name)
    return read_as(name, DeviceProfile.from_json)
