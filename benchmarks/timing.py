"""Interleaved timing for the benchmarks: rounds in random order, paired ratios, the products' rate, the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tnmoe.measuring.timer import Clock, Timer, turns, wall_clock

SIDE = 2048
"""Of the square matrices whose product gives the best rate of the machine."""

FEWEST = 5
"""Rounds that are run even where they take longer than they should."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Of one figure a round."""
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        return Spread(median, low, high)

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} ({self.low:{form}}–{self.high:{form}})"


@dataclass(frozen=True)
class Times:
    """Seconds of one pass of each run in each round, and of the square products in the same rounds."""

    seconds: dict[str, list[float]]
    products: dict[str, list[float]]

    def of(self, name: str) -> Spread:
        """Seconds of one pass."""
        return Spread.of(self.seconds[name])

    def speed(self, name: str, over: str) -> Spread:
        """How many times as fast as another run, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[over], self.seconds[name], strict=True)])

    def rate(self, name: str, pick: Callable[[list[float]], float]) -> float:
        """FLOP/s of a product, by the fastest (`min`) or the median (`statistics.median`) of its times."""
        return 2 * SIDE**3 / pick(self.products[name])

    def peak(self, pick: Callable[[list[float]], float]) -> float:
        """The best product's rate."""
        return max(self.rate(name, pick) for name in self.products)


def square_products() -> dict[str, Callable[[], object]]:
    """The products of this torch: its default, and oneDNN's if there is one."""
    a = torch.randn(SIDE, SIDE)
    products: dict[str, Callable[[], object]] = {"mm": lambda: a @ a}
    with contextlib.suppress(AttributeError, RuntimeError):
        product = torch.ops.mkldnn._linear_pointwise
        product(a[:2], a[:2], None, "none", [], "")
        products["oneDNN"] = lambda: product(a, a, None, "none", [], "")
    return products


def interleaved(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    clock: Clock = wall_clock,
    *,
    repeats: int = 1,
    limit: float = float("inf"),
) -> Times:
    """Every round runs all of them once, `repeats` passes each, in a random order; the first round warms up.

    Args:
        limit: seconds after which no further round begins, if there were `FEWEST`.
    """
    products, timer, order = square_products(), Timer(clock), random.Random(0)
    every = {**runs, **products}
    seconds: dict[str, list[float]] = {name: [] for name in every}
    begun = wall_clock()
    for count in range(rounds + 1):
        if count > FEWEST and wall_clock() - begun > limit:
            break
        for _, name in turns(list(every), 1, order):
            taken = timer.passes(every[name], 1 if name in products else repeats)
            if count:
                seconds[name].append(taken)
    return Times({n: t for n, t in seconds.items() if n in runs}, {n: t for n, t in seconds.items() if n in products})


def machine(threads: int, clock: str) -> str:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    build = torch.__config__.show().splitlines()
    blas = next((part.strip(" -") for part in build if "Math Kernel Library" in part), "no MKL")
    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} CPUs, load {load}, {threads} thread(s), "
        f"{clock} clock, torch {torch.__version__}, {blas.split(' for ')[0]}, "
        f"oneDNN {'on' if torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available() else 'off'}"
    )
