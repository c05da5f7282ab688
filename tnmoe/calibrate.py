"""Measure the present machine: a `DeviceProfile` from short, interleaved timings of the ops that emitted code runs."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnmoe.cost import DTYPE_BYTES
from tnmoe.errors import CostError, unknown
from tnmoe.hardware import OVERHEADS, ROWWISE, STREAMS, DeviceProfile, Grid, Rates

if TYPE_CHECKING:
    import torch

BUDGET = 40.0
"""Seconds that a calibration of one dtype takes by default."""

PASSES = 7
"""Times that each case is measured, far apart, so that a busy second spoils one sample and not the median."""

Point = tuple[int, ...]
Axes = tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Grid axes: see `Rates` for their meaning; `streams` counts elements, `memory` matrices."""

    gemm: Axes
    batched: Axes
    streams: Point
    rowwise: Axes
    memory: Point


_FULL = _Sizes(
    gemm=((1, 2, 4, 16, 64, 256, 1024), (4, 16, 64, 256, 1024, 4096), (4, 16, 64, 256, 1024, 4096)),
    batched=((1, 16, 256, 2048), (1, 4, 16, 64), (4, 16, 64), (4, 32, 256)),
    # glibc takes results from 32 MiB on from the system and gives them back at once: a cliff at 2^23 floats.
    streams=(*(4**k for k in range(4, 12)), 7 * 2**20, 2**23, 2**24),
    # Rows shorter than a vector register, 16 floats at most, take other kernels: 15 and 16 may lie far apart.
    rowwise=((1, 8, 64, 512, 4096), (4, 15, 16, 64, 256, 1024)),
    memory=(1, 2, 4, 6, 8, 12, 16, 24, 32),
)
_COARSE = _Sizes(
    gemm=((1, 16, 256), (16, 256, 1024), (16, 256, 1024)),
    batched=((1, 256), (1, 16), (4, 64), (4, 256)),
    streams=(256, 65536),
    rowwise=((1, 256), (16, 256)),
    memory=(1, 2),
)
_COARSE_BELOW = 5.0
"""Seconds of budget below which only the coarse grid fits."""


@dataclass(slots=True)
class _Case:
    """One thing to time: what it is, where on the grid, its work in the rate's unit, and how to run it once."""

    kind: str
    point: Point
    work: float
    run: Callable[[], object]
    samples: list[float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


def calibrate(
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    budget: float = BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> DeviceProfile:
    """Measure this machine's rates, with as many threads as torch now uses.

    Args:
        device: "cpu" or "cuda".
        dtypes: which to measure, e.g. ("float32", "bfloat16").
        budget: seconds for each dtype, about; below 5 only a coarse grid is measured.
        progress: called with the number of cases done and of all cases.

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
    sizes = _COARSE if budget < _COARSE_BELOW else _FULL
    synchronize = torch.cuda.synchronize if device == "cuda" else _nothing
    rates: dict[str, Rates] = {}
    for position, dtype in enumerate(dtypes):
        with torch.no_grad():
            cases = _cases(torch.device(device), getattr(torch, dtype), sizes, DTYPE_BYTES[dtype])
            shift, total = position * PASSES * len(cases), len(dtypes) * PASSES * len(cases)
            _measure(cases, budget, synchronize, progress, shift, total)
        rates[dtype] = _rates(cases, sizes, DTYPE_BYTES[dtype])
    if device == "cuda":
        name, threads = torch.cuda.get_device_name(), ""
    else:
        name, threads = processor(), f", {torch.get_num_threads()} threads"
    return DeviceProfile(name, f"calibrated with torch {torch.__version__}{threads}", device, rates)


def _nothing() -> None:
    pass


def processor() -> str:
    """Model of the processor, as well as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine() or "CPU"


def _measure(
    cases: Sequence[_Case],
    budget: float,
    synchronize: Callable[[], None],
    progress: Callable[[int, int], None] | None,
    shift: int,
    total: int,
) -> None:
    """Fill in samples. Passes run over all cases in turn; each case gets an equal slice, at least one call."""
    slice_ = budget / (PASSES * len(cases))
    begin = time.perf_counter()
    for k in range(PASSES):
        if k and time.perf_counter() - begin > budget:  # the machine is slow: fewer samples, but in time
            break
        for done, case in enumerate(cases):
            # Slow cases need fewer samples: a long run averages by itself, and short ones want the time.
            if k >= 3 and case.seconds > 3 * slice_:
                continue
            case.samples.append(_sample(case.run, slice_, synchronize, warm=k > 0 and case.seconds > slice_))
            if progress is not None:
                progress(shift + k * len(cases) + done + 1, total)
    if progress is not None:
        progress(shift + PASSES * len(cases), total)


def _sample(run: Callable[[], object], slice_: float, synchronize: Callable[[], None], *, warm: bool) -> float:
    """Median seconds of one call within a slice of time; unless `warm`, after a call that fills the caches."""
    if not warm:
        run()
        synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    first = time.perf_counter() - begin
    repeats = min(200, int(slice_ / 5 / max(first, 1e-7)))
    if repeats < 1:
        return first
    groups = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize()
        groups.append((time.perf_counter() - begin) / repeats)
    return statistics.median(groups)


def _cases(device: torch.device, dtype: torch.dtype, sizes: _Sizes, width: int) -> list[_Case]:
    """All cases. Operands are views of two pools, so that no case waits for its data to be drawn."""
    import torch
    from torch.nn import functional as F

    from tnmoe.backends.activations import entmax15, sparsemax

    largest = max(
        *(max(a * b, b * c) for a, b, c in itertools.product(*sizes.gemm)),
        *(n * max(a * b, b * c) for n, a, b, c in itertools.product(*sizes.batched)),
        max(sizes.streams),
        *(a * b for a, b in itertools.product(*sizes.rowwise)),
    )
    left, right = (torch.randn(largest, device=device).to(dtype) for _ in range(2))

    def a(*shape: int) -> torch.Tensor:
        return left[: math.prod(shape)].view(shape)

    def b(*shape: int) -> torch.Tensor:
        return right[: math.prod(shape)].view(shape)

    found: list[_Case] = []

    def case(kind: str, point: Point, work: float, run: Callable[[], object]) -> None:
        found.append(_Case(kind, point, work, run, []))

    def product(kind: str, point: Point, x: torch.Tensor, y: torch.Tensor) -> None:
        case(kind, point, 2.0 * math.prod(point), lambda: x @ y)

    for m, k, n in itertools.product(*sizes.gemm):
        product("matmul", (m, k, n), a(m, k), b(k, n))
    for batch, m, k, n in itertools.product(*sizes.batched):
        product("batched", (batch, m, k, n), a(batch, m, k), b(batch, k, n))

    def streams(n: int) -> None:
        x, y, square = a(n), b(n), a(n // 16, 16)
        case("Multiply", (3 * n * width,), 3 * n * width, lambda: x * y)
        case("Add", (3 * n * width,), 3 * n * width, lambda: x + y)
        case("Sigmoid", (2 * n * width,), 2 * n * width, lambda: torch.sigmoid(x))
        case("Gelu", (2 * n * width,), 2 * n * width, lambda: F.gelu(x))
        moved = width * (n + n // 16)
        case("Reduce", (moved,), moved, lambda: square.sum(1))
        copied = torch.contiguous_format
        case("Permute", (2 * n * width,), 2 * n * width, lambda: square.permute(1, 0).clone(memory_format=copied))

    for n in sizes.streams:
        streams(n)

    def rowwise(rows: int, length: int) -> None:
        x, point, work = a(rows, length), (rows, length), rows * length
        weight, bias, mean, variance = b(length), b(length), b(length), b(length).square() + 1
        case("Softmax", point, work, lambda: torch.softmax(x, -1))
        case("Entmax15", point, work, lambda: entmax15(x))
        case("Sparsemax", point, work, lambda: sparsemax(x))
        case("LayerNorm", point, work, lambda: F.layer_norm(x, (length,), weight, bias))
        case("BatchNorm", point, work, lambda: F.batch_norm(x, mean, variance, None, None, False, 0.1))

    for rows, length in itertools.product(*sizes.rowwise):
        rowwise(rows, length)

    # Weights in turn, as one token reads a model's: a plain sum over one large array is several times as fast.
    row, weights = a(1, 1024), [torch.randn(1024, 512, device=device).to(dtype) for _ in range(max(sizes.memory))]

    def memory(n: int) -> None:
        moved = n * 1024 * 512 * width
        case("memory", (moved,), moved, lambda: [row @ weight for weight in weights[:n]])

    for n in sizes.memory:
        memory(n)

    def fresh(n: int) -> None:
        case("fresh", (n * width,), n * width, lambda: torch.ones(n, dtype=dtype, device=device))

    for n in sizes.streams:
        fresh(n)

    small, cube = a(4, 16), a(4, 4, 4)
    case("merge", (), 0, lambda: cube.flatten(1))
    case("split", (), 0, lambda: small.unflatten(-1, (4, 4)))  # type: ignore[no-untyped-call]

    class Call(torch.nn.Module):
        """What an emitted module does besides its ops."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(small)

        def _rows(self, x: torch.Tensor) -> torch.Tensor:
            if x.ndim == 0 or x.shape[-1] != 16:
                raise ValueError
            return x.reshape(-1, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lead = x.shape[:-1]
            x = self._rows(x)
            return x.reshape(*lead, 16)

    module = Call()
    case("call", (), 0, lambda: module(small))
    case("parameter", (), 0, lambda: module.weight)
    bias, square = b(16), b(16, 16)
    case("bias", (), 0, lambda: torch.addmm(bias, small, square))
    case("plain", (), 0, lambda: small @ square)

    steps: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x @ square,
        lambda x: F.layer_norm(x, (16,)),
        lambda x: torch.softmax(x, -1),
        lambda x: torch.addmm(bias, x, square),
        lambda x: x * small,
        lambda x: F.gelu(x),
    ]

    def alone(step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        case("step", (), 0, lambda: step(small))

    def chain() -> torch.Tensor:
        x = small
        for step in steps:
            x = step(x)
        return x

    for step in steps:
        alone(step)
    case("chain", (), 0, chain)
    return found


def _rates(cases: Sequence[_Case], sizes: _Sizes, width: int) -> Rates:
    by_kind: dict[str, list[_Case]] = {}
    for case in cases:
        by_kind.setdefault(case.kind, []).append(case)
    # The fastest case of a kind does next to nothing. A tenth is left to it so that its rate stays finite.
    overhead = {k: min(c.seconds for c in found) * (0.9 if found[0].work else 1.0) for k, found in by_kind.items()}
    # An op among others is slower than in a loop by itself: its code and its result's memory are no longer at hand.
    steps = [c.seconds for c in by_kind["step"]]
    overhead["switch"] = max(0.0, by_kind["chain"][0].seconds - sum(steps)) / len(steps)
    overhead["memory"] = 0.0  # its overhead grows with its size, and is a product's, which is small beside it
    overhead["bias"] = max(0.0, overhead["bias"] - overhead["plain"])

    def grid(kind: str) -> Grid:
        found = by_kind[kind]
        axes = tuple(tuple(sorted(set(axis))) for axis in zip(*(c.point for c in found), strict=True))
        at = {c.point: c.work / (c.seconds - overhead[kind]) for c in found}
        return Grid(axes, tuple(at[p] for p in itertools.product(*axes)))

    # What nothing exceeds: weights that lie in a cache are read faster than any element-wise op moves its bytes.
    read = [
        width * (p[0] * p[1] + p[1] * p[2] + p[0] * p[2]) / (c.seconds - overhead["matmul"])
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
    )
