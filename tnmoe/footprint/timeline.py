"""Bytes alive, storage by storage, and the moments at which that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from tnmoe.errors import CostError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.value import INTEGER_BYTES, Value
from tnmoe.symbolic.dims import Dim

CLASSES = ("weights", "inputs", "saved", "temporaries", "gradients")
"""Parameters and buffers; the input; kept for the backward pass; other results and scratch; gradients of weights and
inputs, with that of the result (those of intermediates are temporaries)."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a timeline.

    Attributes:
        phase: "inference", "forward" (with autograd) or "backward".
        step: name of the op's result.
        peak: most bytes alive while it runs.
        live: the same by class.
        after: bytes alive when it is done.
    """

    phase: str
    step: str
    peak: int
    live: Mapping[str, int]
    after: int


class Heap:
    """Storages by name, and the moments at which they change."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, int]] = {}
        self.live = dict.fromkeys(CLASSES, 0)
        self.moments: list[Moment] = []

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.live.values())

    def hold(self, name: str, count: int, kind: str) -> None:
        """Take `count` bytes of a class."""
        self.held[name] = kind, count
        self.live[kind] += count

    def free(self, name: str) -> None:
        """Give back what `hold` took."""
        kind, count = self.held.pop(name)
        self.live[kind] -= count

    def reclassify(self, name: str, kind: str) -> None:
        """Move what `hold` took to another class."""
        was, count = self.held[name]
        self.live[was] -= count
        self.live[kind] += count
        self.held[name] = kind, count

    def rename(self, name: str, new: str) -> None:
        """Call what `hold` took by another name."""
        self.held[new] = self.held.pop(name)

    def step(self, phase: str, name: str, script: Script) -> None:
        """Note what is alive while a script runs; what stays of it is to be held by the caller."""
        live = self.live | {"temporaries": self.live["temporaries"] + room(script)}
        self.moments.append(Moment(phase, name, sum(live.values()), live, 0))

    def done(self) -> None:
        """Note what is alive after the last step."""
        last = self.moments[-1]
        self.moments[-1] = Moment(last.phase, last.step, last.peak, last.live, self.total)


Script = tuple[int, ...]


def room(script: Script) -> int:
    """The most bytes that a script holds at once."""
    return max(accumulate(script, initial=0))


def size(value: Value, sizes: Mapping[str, Dim], item: int) -> int:
    """Bytes of a value whose elements take `item` bytes each, or those of an integer."""
    return (INTEGER_BYTES if value.integer else item) * entries(value.indices, sizes)


def entries(indices: tuple[str, ...], sizes: Mapping[str, Dim]) -> int:
    """Elements of an array with these indices.

    Raises:
        CostError: a size that is no number.
    """
    return whole(elements(indices, sizes))


def lines(value: Value, index: str, sizes: Mapping[str, Dim]) -> int:
    """Elements of a value for each entry of one of its indices."""
    return entries(tuple(i for i in value.indices if i != index), sizes)


def whole(dim: Dim) -> int:
    """A size that is a number.

    Raises:
        CostError: if it is a formula.
    """
    if not isinstance(dim, int):
        raise CostError(f"memory is counted for given sizes only, not for {dim}")
    return dim
