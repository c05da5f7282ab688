"""What a calibration times: the sizes of its grids, and a case for each point and each kind of op."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PICKED = 16
"""Entries that a `ProductTopK` picks where it is measured, as the heads of PEER do."""

Point = tuple[int, ...]
Axes = tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Grid axes: see `Rates` for their meaning; `streams` counts elements, `memory` matrices.

    Three are of `ROUTING`: rows and their length, rows that are moved and their length, slots and experts; the last
    ones are of `Products` and `Training`.
    """

    gemm: Axes
    batched: Axes
    streams: Point
    rowwise: Axes
    memory: Point
    rows: Axes
    moved: Axes
    slots: Axes
    fast: Axes
    backward_streams: Point
    backward_rows: Axes


FULL = Sizes(
    gemm=((1, 2, 4, 16, 64, 256, 1024), (4, 16, 64, 256, 1024, 4096), (4, 16, 64, 256, 1024, 4096)),
    batched=((1, 16, 256, 2048), (1, 4, 16, 64), (4, 16, 64), (4, 32, 256)),
    # glibc takes results from 32 MiB on from the system and gives them back at once: a cliff at 2^23 floats.
    streams=(*(4**k for k in range(4, 12)), 7 * 2**20, 2**23, 2**24),
    # Rows shorter than a vector register, 16 floats at most, take other kernels: 15 and 16 may lie far apart.
    rowwise=((1, 8, 64, 512, 4096), (4, 15, 16, 64, 256, 1024)),
    memory=(1, 2, 4, 6, 8, 12, 16, 24, 32),
    rows=((1, 16, 256, 4096), (2, 16, 64, 512)),
    moved=((1, 32, 512, 8192), (16, 256, 1024)),
    slots=((2, 32, 512, 8192), (4, 64, 512)),
    fast=((1, 4, 32, 256, 1024), (16, 128, 1024, 4096), (16, 128, 1024, 4096)),
    backward_streams=(64, 4096, 2**18, 2**22, 2**24),
    backward_rows=((1, 16, 256, 4096), (8, 64, 512)),
)
COARSE = Sizes(
    gemm=((1, 16, 256), (16, 256, 1024), (16, 256, 1024)),
    batched=((1, 256), (1, 16), (4, 64), (4, 256)),
    streams=(256, 65536),
    rowwise=((1, 256), (16, 256)),
    memory=(1, 2),
    rows=((1, 256), (2, 64)),
    moved=((1, 256), (16, 256)),
    slots=((2, 256), (4, 64)),
    fast=((1, 256), (16, 256), (16, 256)),
    backward_streams=(64, 65536),
    backward_rows=((1, 64), (8, 64)),
)


@dataclass(slots=True)
class Case:
    """One thing to time: what it is, where on the grid, its work in the rate's unit, and how to run it once."""

    kind: str
    point: Point
    work: float
    run: Callable[[], object]
    samples: list[float]

    @property
    def seconds(self) -> float:
        """Of one run, the median of the samples."""
        return statistics.median(self.samples)


def pools(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of random numbers, of which all operands are views: no case waits for its data to be drawn."""
    import torch

    largest = max(
        *(max(a * b, b * c) for a, b, c in itertools.product(*sizes.gemm)),
        *(n * max(a * b, b * c) for n, a, b, c in itertools.product(*sizes.batched)),
        *(*sizes.streams, *sizes.backward_streams),
        *(a * b for axes in (sizes.rowwise, sizes.rows, sizes.moved) for a, b in itertools.product(*axes)),
    )
    left, right = (torch.randn(largest, device=device).to(dtype) for _ in range(2))
    return left, right


def cases_of(left: torch.Tensor, right: torch.Tensor, sizes: Sizes, itemsize: int) -> list[Case]:
    """All cases of a forward pass, on views of two `pools`; `itemsize` is the bytes of an element."""
    import torch
    from torch.nn import functional as F

    from tnmoe.backends.runtime.activations import entmax15, sparsemax
    from tnmoe.backends.runtime.grouped_matmul import grouped_matmul
    from tnmoe.backends.runtime.onednn import _mm

    device, dtype = left.device, left.dtype

    def a(*shape: int) -> torch.Tensor:
        return left[: math.prod(shape)].view(shape)

    def b(*shape: int) -> torch.Tensor:
        return right[: math.prod(shape)].view(shape)

    cases: list[Case] = []

    def case(kind: str, point: Point, work: float, run: Callable[[], object]) -> None:
        cases.append(Case(kind, point, work, run, []))

    def product(kind: str, point: Point, x: torch.Tensor, y: torch.Tensor) -> None:
        case(kind, point, 2.0 * math.prod(point), lambda: x @ y)

    for m, k, n in itertools.product(*sizes.gemm):
        product("matmul", (m, k, n), a(m, k), b(k, n))
    for batch, m, k, n in itertools.product(*sizes.batched):
        product("batched", (batch, m, k, n), a(batch, m, k), b(batch, k, n))

    def fast(point: Point, x: torch.Tensor, y: torch.Tensor) -> None:
        case("fast", point, 2.0 * math.prod(point), lambda: _mm(x, y))

    if device.type == "cpu" and dtype == torch.float32:  # elsewhere the flavour calls public products
        for m, k, n in itertools.product(*sizes.fast):
            fast((m, k, n), a(m, k), b(k, n))

    def streams(n: int) -> None:
        x, y, square = a(n), b(n), a(n // 16, 16)
        case("Multiply", (3 * n * itemsize,), 3 * n * itemsize, lambda: x * y)
        case("Add", (3 * n * itemsize,), 3 * n * itemsize, lambda: x + y)
        case("Sigmoid", (2 * n * itemsize,), 2 * n * itemsize, lambda: torch.sigmoid(x))
        case("Gelu", (2 * n * itemsize,), 2 * n * itemsize, lambda: F.gelu(x))
        moved = itemsize * (n + n // 16)
        case("Reduce", (moved,), moved, lambda: square.sum(1))
        copied = torch.contiguous_format
        case("Permute", (2 * n * itemsize,), 2 * n * itemsize, lambda: square.permute(1, 0).clone(memory_format=copied))

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
        moved = n * 1024 * 512 * itemsize
        case("memory", (moved,), moved, lambda: [row @ weight for weight in weights[:n]])

    for n in sizes.memory:
        memory(n)

    def fresh(n: int) -> None:
        case("fresh", (n * itemsize,), n * itemsize, lambda: torch.ones(n, dtype=dtype, device=device))

    for n in sizes.streams:
        fresh(n)

    cases += routing_cases(left, sizes)
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

    def loop(experts: int) -> None:
        counts, matrices, biases = torch.full((experts,), 4, device=device), b(experts, 16, 16), b(experts, 16)
        sorted_rows = a(4 * experts, 16)
        case("loop", (), 0, lambda: grouped_matmul(sorted_rows, matrices, counts, biases))

    loop(1)
    loop(32)

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
    return cases


def routing_cases(pool: torch.Tensor, sizes: Sizes) -> list[Case]:
    """Cases of `ROUTING`, on views of `pool`; positions are drawn at random, as an untrained gate chooses."""
    import torch

    from tnmoe.backends.runtime import routing_functions as routing

    cases: list[Case] = []
    device = pool.device

    def case(kind: str, point: Point, work: float, run: Callable[[], object]) -> None:
        cases.append(Case(kind, point, work, run, []))

    def rows(count: int, length: int) -> None:
        x, k = pool[: count * length].view(count, length), min(length, PICKED)
        best = x[:, : min(length, 2)].contiguous()
        at = torch.arange(best.shape[1], device=device).expand(count, -1).contiguous()
        case("TopK", (count, length), count * length, lambda: routing.top_k(x, min(2, length)))
        case("ProductTopK", (count, length), count * length, lambda: routing.product_top_k(x, x, k))
        case("Normalise", (count, length), count * length, lambda: routing.normalise(x))
        case("Spread", (count, length), count * length, lambda: x.new_zeros(count, length).scatter(-1, at, best))

    def moved(count: int, length: int) -> None:
        x = pool[: count * length].view(count, length)
        at = torch.randint(count, (count,), device=device)
        case("Gather", (count, length), count * length, lambda: x.index_select(0, at))
        case("ScatterAdd", (count, length), count * length, lambda: x.new_zeros(count, length).index_add(0, at, x))

    def slots(count: int, experts: int) -> None:
        at = torch.randint(experts, (count // 2, 2), device=device)
        shares, even = pool[:count].view(count // 2, 2), -(-count // experts)
        case("SortSlots", (count, experts), count, lambda: routing.sort_slots_in_blocks(at, experts, 4))
        case("CapacitySlots", (count, experts), count, lambda: routing.capacity_slots(shares, at, experts, even))

    for axes, add in ((sizes.rows, rows), (sizes.moved, moved), (sizes.slots, slots)):
        for point in itertools.product(*axes):
            add(*point)
    return cases
