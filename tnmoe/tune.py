"""Choice by measurement: build the cheapest orders of a layer, time them side by side, keep the winner.

A shared machine is noisy, so the candidates take turns in random order, and one replaces a cheaper one only if it was
faster in most of the rounds. What was measured is cached: for the same layer, sizes and settings on the same device,
with the same torch and number of threads, nothing is run again.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tnmoe import cache
from tnmoe._version import __version__
from tnmoe.api import build
from tnmoe.calibrate import processor
from tnmoe.candidates import shortlist
from tnmoe.errors import PlanError, unknown
from tnmoe.goals import SHORTLISTED
from tnmoe.plan import Plan
from tnmoe.planning import symbol_sizes
from tnmoe.question import DEFAULT_TOKENS, Planable
from tnmoe.report import Table

if TYPE_CHECKING:
    import torch

FORMAT = "tnmoe-tuned-1"
DTYPES = ("float32", "float64", "bfloat16", "float16")

DECISIVE = 0.75
"""Share of the rounds that an order must win against a cheaper one to replace it."""

LEAST = 1e-3
"""Seconds that one measurement takes at least: what is faster is run several times."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate: its plan, and the seconds of one pass in each round."""

    plan: Plan
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of one pass."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the measurements."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` returns.

    Attributes:
        measured: the candidates, the cheapest first.
        chosen: place of the winner.
        setting: what was measured, and where.
        cached: True if the figures come from an earlier run.
    """

    measured: tuple[Measured, ...]
    chosen: int
    setting: str
    cached: bool = False

    @property
    def plan(self) -> Plan:
        """The winner."""
        return self.measured[self.chosen].plan

    def table(self) -> Table:
        """One row for each candidate: order, FLOPs, median and quartiles in microseconds, ratio to the cheapest."""
        rows = []
        for k, found in enumerate(self.measured):
            orders = "; ".join(f"{name} = {order}" for name, order in found.plan.orders.items())
            low, high = found.quartiles
            paired = zip(self.measured[0].seconds, found.seconds, strict=True)
            speed = statistics.median(first / own for first, own in paired)
            micro = (round(1e6 * s, 1) for s in (found.median, low, high))
            rows.append(
                (k + 1, found.plan.flops, *micro, round(speed, 3), "chosen" if k == self.chosen else "", orders)
            )
        columns = (
            ("candidate", "no."),
            ("flops", "FLOPs"),
            ("median", "median µs"),
            ("first_quartile", "25 %"),
            ("third_quartile", "75 %"),
            ("speed", "speed"),
            ("chosen", ""),
            ("orders", "orders"),
        )
        rounds = len(self.measured[0].seconds)
        notes = (
            f"{self.setting}; {rounds} rounds in random order{', kept from an earlier run' if self.cached else ''}.",
            f"Speed: median ratio to no. 1. An order replaces a cheaper one if it wins {100 * DECISIVE:g} % of rounds.",
        )
        return Table(f"Orders of {self.plan.layer.name}, measured", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return str(self.table())


def tune(
    what: Plan | Planable,
    *,
    tokens: int | None = None,
    sizes: dict[str, int] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    training: bool = False,
    count: int = 4,
    rounds: int = 15,
    fresh: bool = False,
) -> Tuned:
    """Time the cheapest orders of a layer on this machine, interleaved, and choose the fastest.

    Args:
        what: a plan, whose own order takes part; or anything that `plan` takes.
        tokens, sizes: as in `plan`; by default those of the plan.
        device: "cpu" or "cuda"; on a CPU with as many threads as torch now uses.
        dtype: of weights and activations.
        training: forward and backward pass instead of the forward pass alone.
        count: orders to measure; the cheapest by FLOPs of what is measured.
        rounds: measurements of each.
        fresh: measure anew, even if the cache knows.

    Raises:
        PlanError: a faulty device, dtype, count or number of rounds.
        EmitError: a layer that cannot be built.
        DeclarationError: as `plan`.
    """
    import torch  # planning and costing do without

    if device not in ("cpu", "cuda"):
        raise PlanError(unknown("device", device, ["cpu", "cuda"]))
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError("torch finds no CUDA device here; tune with device='cpu'")
    if dtype not in DTYPES:
        raise PlanError(unknown("dtype", dtype, DTYPES))
    if type(rounds) is not int or not 1 <= rounds <= 10_000:
        raise PlanError(f"rounds must be an integer from 1 to 10,000, got {rounds!r}")
    plans = _candidates(what, tokens, sizes, training, count)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} thread(s)"
    passes = "forward and backward" if training else "forward"
    setting = f"{passes}, {dtype}, {where}, torch {torch.__version__}"
    question = {
        "format": FORMAT,
        "version": __version__,
        "setting": setting,
        "plans": [json.loads(p.to_json()) for p in plans],
        "rounds": rounds,
    }
    key = cache.key("tuned", question)
    if not fresh and (kept := _read(cache.get(key), len(plans), rounds)):
        seconds, cached = kept, True
    else:
        seconds, cached = _measure([_runner(p, device, dtype, training) for p in plans], rounds), False
        cache.put(key, {"seconds": seconds})
    measured = tuple(Measured(p, tuple(s)) for p, s in zip(plans, seconds, strict=True))
    return Tuned(measured, _winner(seconds), setting, cached)


def _candidates(
    what: Plan | Planable, tokens: int | None, sizes: dict[str, int] | None, training: bool, count: int
) -> list[Plan]:
    """The plans to measure, the cheapest first; what differs in its program alone is different."""
    objective = "training" if training else "flops"
    if not isinstance(what, Plan):
        given = shortlist(
            what, count=count, tokens=DEFAULT_TOKENS if tokens is None else tokens, sizes=sizes, objective=objective
        )
        return [c.plan for c in given]
    layer = what.layer
    given = shortlist(
        layer,
        count=count,
        tokens=tokens or (what.values[layer.token_symbol] if layer.batched else DEFAULT_TOKENS),
        sizes={**symbol_sizes(what), **(sizes or {})},
        objective="flops" if what.objective in SHORTLISTED and not training else objective,
        input_gradients=what.input_gradients,
    )
    plans = [c.plan for c in given]
    if all(p.bound.ops != what.bound.ops for p in plans) and plans[0].values == what.values:
        plans.append(what)
    return plans


def _read(entry: dict[str, Any] | None, count: int, rounds: int) -> list[list[float]] | None:
    """Times from the cache, if they are what `tune` wrote."""
    seconds = (entry or {}).get("seconds")
    if not isinstance(seconds, list) or len(seconds) != count:
        return None
    for row in seconds:
        if not isinstance(row, list) or len(row) != rounds or not all(isinstance(s, float) and s > 0 for s in row):
            return None
    return seconds


def _winner(seconds: Sequence[Sequence[float]]) -> int:
    """The place of the chosen candidate: the first, or a later one that beat what was best so far in most rounds."""
    best = 0
    for k in range(1, len(seconds)):
        wins = sum(own < other for own, other in zip(seconds[k], seconds[best], strict=True))
        if wins >= DECISIVE * len(seconds[k]):
            best = k
    return best


def _runner(planned: Plan, device: str, dtype: str, training: bool) -> Callable[[], object]:
    """One pass of a freshly built module over random data."""
    import torch  # planning and costing do without

    kind: torch.dtype = getattr(torch, dtype)
    module = build(planned, device=device, dtype=kind)
    sizes = planned.bound.sizes
    inputs = [
        torch.randn([int(sizes[i]) for i in v.indices], device=device, dtype=kind).requires_grad_(
            training and v.name in planned.input_gradients
        )
        for v in planned.bound.inputs
    ]
    synchronize = torch.cuda.synchronize if device == "cuda" else None
    leaves = [t for t in (*module.parameters(), *inputs) if t.requires_grad]

    def run() -> None:
        if training and leaves:
            y = module(*inputs)
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        else:
            with torch.no_grad():
                module(*inputs)
        if synchronize is not None:
            synchronize()

    return run


def _measure(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of one call of each in every round; the candidates take turns in random order."""
    repeats = []
    for run in runs:
        run()  # the first call allocates
        repeats.append(max(1, int(LEAST / _seconds(run, 1))))
    found: list[list[float]] = [[] for _ in runs]
    shuffled = random.Random(0)
    for _ in range(rounds):
        for k in shuffled.sample(range(len(runs)), len(runs)):
            found[k].append(_seconds(runs[k], repeats[k]))
    return found


def _seconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return max((time.perf_counter() - begin) / repeats, 1e-9)
