"""Measure the present machine: a `DeviceProfile` from short, interleaved timings of the ops that emitted code runs."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
from collections.abc import Callable, Sequence

from tnmoe.errors import CostError, unknown
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.measuring.calibration_cases import COARSE, FULL, Case, Sizes, cases_of, pools
from tnmoe.measuring.calibration_training import training_cases, training_rates
from tnmoe.measuring.timer import Clock, Timer, of_device, passes_for, wall_clock
from tnmoe.timing.device_profile import DeviceProfile
from tnmoe.timing.rates import GROUPED, OVERHEADS, ROUTING, ROWWISE, STREAMS, Grid, Products, Rates

BUDGET = 32.0
"""Seconds that a calibration of one dtype takes by default."""

PASSES = 7
"""Times that each case is measured, far apart, so that a busy second spoils one sample and not the median."""

MOST_REPEATS = 200
"""Calls between two looks at the clock at most."""

_COARSE_BELOW = 5.0
"""Seconds of budget below which only the coarse grid fits."""


def calibrate(
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    budget: float = BUDGET,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = wall_clock,
) -> DeviceProfile:
    """Measure this machine's rates, with as many threads as torch now uses.

    Args:
        device: "cpu" or "cuda".
        dtypes: which to measure, e.g. ("float32", "bfloat16").
        budget: seconds for each dtype, about; below 5 only a coarse grid is measured.
        progress: called with the number of cases done and of all cases.
        clock: seconds; see `tnmoe.measuring.timer.Clock`.

    Raises:
        CostError: an unknown device or dtype, or a budget that is no positive number.
    """
    import torch  # planning and costing do without

    if device not in ("cpu", "cuda"):
        raise CostError(unknown("device", device, ["cpu", "cuda"]))
    if device == "cuda" and not torch.cuda.is_available():
        raise CostError("torch finds no CUDA device here; calibrate with device='cpu'")
    if not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise CostError(f"budget must be a positive number of seconds, got {budget!r}")
    floating = [d for d in DTYPE_BYTES if d.startswith(("float", "bfloat")) and d != "float8"]
    for dtype in dtypes:
        if dtype not in floating:
            raise CostError(unknown("dtype", dtype, floating))
    if not dtypes:
        raise CostError(f"dtypes must name at least one of {', '.join(floating)}")
    sizes = COARSE if budget < _COARSE_BELOW else FULL
    timer = of_device(device, clock)
    rates: dict[str, Rates] = {}
    for position, dtype in enumerate(dtypes):
        with torch.no_grad():
            left, right = pools(torch.device(device), getattr(torch, dtype), sizes)
            cases = cases_of(left, right, sizes, DTYPE_BYTES[dtype])
            cases += training_cases(left, right, sizes, DTYPE_BYTES[dtype])
            shift, total = position * PASSES * len(cases), len(dtypes) * PASSES * len(cases)
            _measure(cases, budget, timer, progress, shift, total)
        rates[dtype] = _rates(cases, sizes, DTYPE_BYTES[dtype])
    if device == "cuda":
        name, threads = torch.cuda.get_device_name(), ""
    else:
        name, threads = processor(), f", {torch.get_num_threads()} threads"
    return DeviceProfile(name, f"calibrated with torch {torch.__version__}{threads}", device, rates)


def processor() -> str:
    """Model of the processor, as well as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine() or "CPU"


def _measure(
    cases: Sequence[Case],
    budget: float,
    timer: Timer,
    progress: Callable[[int, int], None] | None,
    shift: int,
    total: int,
) -> None:
    """Fill in samples. Passes run over all cases in turn; each case gets an equal slice, at least one call."""
    share = budget / (PASSES * sum(map(_weight, cases)))
    begin = wall_clock()
    for k in range(PASSES):
        for done, case in enumerate(cases):
            if k and wall_clock() - begin > budget:  # the machine is slow: fewer samples, but in time
                break
            slice_ = share * _weight(case)
            # Slow cases need fewer samples: a long run averages by itself, and short ones want the time.
            if k >= 3 and case.seconds > 3 * slice_:
                continue
            warm = k > 0 and case.seconds > slice_
            case.samples.append(_sample(case.run, slice_, timer, warm=warm))
            if progress is not None:
                progress(shift + k * len(cases) + done + 1, total)
    if progress is not None:
        progress(shift + PASSES * len(cases), total)


def _weight(case: Case) -> int:
    """Slices of time: what is all overhead is short, and everything counts on it."""
    return 1 if case.work else 4


def _sample(run: Callable[[], object], slice_: float, timer: Timer, *, warm: bool) -> float:
    """Median seconds of one call within a slice of time; unless `warm`, after a call that fills the caches."""
    if not warm:
        timer.warm(run)
    first = timer.passes(run)
    if first < slice_ / 20:  # its code is in the caches now
        first = min(first, timer.passes(run))
    if first > slice_ / 5:
        return first
    repeats = passes_for(first, slice_ / 5, MOST_REPEATS)
    return statistics.median(timer.passes(run, repeats) for _ in range(5))


def _rates(cases: Sequence[Case], sizes: Sizes, itemsize: int) -> Rates:
    by_kind: dict[str, list[Case]] = {}
    for case in cases:
        by_kind.setdefault(case.kind, []).append(case)
    # The fastest case of a kind does next to nothing. A tenth is left to it so that its rate stays finite.
    overhead = {k: min(c.seconds for c in cases) * (0.9 if cases[0].work else 1.0) for k, cases in by_kind.items()}
    # An op among others is slower than in a loop by itself: its code and its result's memory are no longer at hand.
    steps = [c.seconds for c in by_kind["step"]]
    overhead["switch"] = max(0.0, by_kind["chain"][0].seconds - sum(steps)) / len(steps)
    overhead["memory"] = 0.0  # its overhead grows with its size, and is a product's, which is small beside it
    # A loop over 32 experts is as many small products with a bias, what comes with each, and what comes once.
    one, many = (c.seconds for c in by_kind["loop"])
    overhead["expert"] = max(0.0, (many - one) / 31 - overhead["bias"])
    overhead["grouped"] = max(0.0, one - overhead["bias"] - overhead["expert"])
    overhead["bias"] = max(0.0, overhead["bias"] - overhead["plain"])

    def grid(kind: str) -> Grid:
        measured = by_kind[kind]
        axes = tuple(tuple(sorted(set(axis))) for axis in zip(*(c.point for c in measured), strict=True))
        at = {c.point: c.work / (c.seconds - overhead[kind]) for c in measured}
        return Grid(axes, tuple(at[p] for p in itertools.product(*axes)))

    # What nothing exceeds: weights that lie in a cache are read faster than any element-wise op moves its bytes.
    read = [
        itemsize * (p[0] * p[1] + p[1] * p[2] + p[0] * p[2]) / (c.seconds - overhead["matmul"])
        for c in by_kind["matmul"]
        for p in [c.point]
    ]
    written = [max(grid(kind).values) for kind in STREAMS]
    return Rates(
        gemm=grid("matmul"),
        batched=grid("batched"),
        streams={kind: grid(kind) for kind in STREAMS},
        rowwise={kind: grid(kind) for kind in ROWWISE},
        bandwidth=max(*read, *written),
        memory=grid("memory"),
        fresh=grid("fresh"),
        overhead={kind: overhead[kind] for kind in OVERHEADS},
        routing={kind: grid(kind) for kind in ROUTING},
        routing_overhead={kind: overhead[kind] for kind in (*ROUTING, *GROUPED)},
        fast=Products(grid("fast"), overhead["fast"]) if "fast" in by_kind else None,
        training=training_rates(by_kind, overhead, grid, overhead["switch"]),
    )
