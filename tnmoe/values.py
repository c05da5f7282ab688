"""An array of a program: what ops read and write."""

from __future__ import annotations

from dataclasses import dataclass


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
