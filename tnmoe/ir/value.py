"""An array of a program: what ops read and write."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tnmoe.ir.initialise import Init


class Role(enum.Enum):
    """What a tensor is: decides what needs a gradient, what is saved, and what may be folded."""

    DATA = "data"
    WEIGHT = "weight"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A stored weight: `indices` in canonical order (a pass may store it in another)."""

    name: str
    indices: tuple[str, ...]
    init: Init
    part: str = ""
    role: Role = Role.WEIGHT


INTEGER_BYTES = 8
"""Of a position or a count."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class Value:
    """An array: its name in the source, its indices in memory order, and the part of the layer it serves.

    `integer` marks positions and counts (64 bits each); no gradient flows through them.
    """

    name: str
    indices: tuple[str, ...]
    part: str = ""

    @property
    def label(self) -> str:
        """Name and indices, e.g. `hidden[t h]`."""
        return f"{self.name}[{' '.join(self.indices)}]"

    integer: bool = False
