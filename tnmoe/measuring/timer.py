"""The one place that takes times: passes of a run between two looks at a clock, the device's work included."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Clock = Callable[[], float]
"""Seconds. On a machine shared with others, `time.process_time` with one thread of torch leaves out the time that
others had the processor; what they do to caches and memory stays."""

SHORTEST = 1e-9
"""Seconds that a measurement counts at least, so that quotients of two stay finite."""

T = TypeVar("T")


def wall_clock() -> float:
    """The clock unless another is asked for."""
    return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Timer:
    """Times runs on one device.

    Attributes:
        clock: seconds.
        wait: until the device has done what it was given; None where a call returns when it is done.
    """

    clock: Clock = wall_clock
    wait: Callable[[], object] | None = None

    def passes(self, run: Callable[[], object], count: int = 1, *, apart: bool = False) -> float:
        """Seconds of each of `count` passes in a row; `apart` says that each waits until the device is done."""
        begin = self.clock()
        for _ in range(count):
            run()
            if apart:
                self._wait()
        if not apart:
            self._wait()
        return max((self.clock() - begin) / count, SHORTEST)

    def once(self, run: Callable[[], T]) -> tuple[T, float]:
        """What one pass returns, and its seconds."""
        begin = self.clock()
        result = run()
        self._wait()
        return result, max(self.clock() - begin, SHORTEST)

    def warm(self, run: Callable[[], object]) -> None:
        """A pass that is not timed: it fills the caches and takes the memory."""
        run()
        self._wait()

    def _wait(self) -> None:
        if self.wait is not None:
            self.wait()


def of_device(device: str, clock: Clock = wall_clock) -> Timer:
    """The timer of a kind of device, "cpu" or "cuda"."""
    if device == "cpu":
        return Timer(clock)
    import torch  # planning and costing do without

    return Timer(clock, torch.cuda.synchronize)


def passes_for(once: float, least: float, most: int | None = None) -> int:
    """How many passes make a measurement of at least so many seconds; at least one, and at most `most`."""
    count = max(1, int(least / max(once, SHORTEST)))
    return count if most is None else min(most, count)


def turns(runs: Sequence[T], count: int, order: random.Random) -> Iterator[tuple[int, T]]:
    """Each of the runs once in each of `count` rounds, with the round's number.

    In random order: who comes after whom must not matter.
    """
    for number in range(count):
        for run in order.sample(runs, len(runs)):
            yield number, run
