"""Measured rates of a device: figures on grids of sizes, and the kinds of op that they are of."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tnmoe.errors import CostError

STREAMS = ("Multiply", "Add", "Reduce", "Permute", "Sigmoid", "Gelu")
"""Kinds of op whose time follows the bytes they move, whatever the shape."""

ROWWISE = ("Softmax", "Entmax15", "Sparsemax", "LayerNorm", "BatchNorm")
"""Kinds of op that work along one index: sorting and reductions make the row's length matter."""

ROUTING = ("TopK", "ProductTopK", "Normalise", "Spread", "Gather", "ScatterAdd", "SortSlots", "CapacitySlots")
"""Kinds of op that dispatch and combine: of the first four the rows and their length, of the next two those that are
taken or added, and of the last two the slots and the experts make the time."""

GROUPED = ("grouped", "expert")
"""The fixed time of a loop over experts, and of each expert in it, beside its product's."""

OVERHEADS = ("matmul", "batched", "bias", "merge", "split", "parameter", "switch", "call", *STREAMS, *ROWWISE)
"""What has a fixed time: a matrix product, a batched one, a bias on top of either, a view that merges axes, one that
splits an axis, a use of a parameter, going from one op to another, a module's call, and each other kind of op."""


BACKWARD_STREAMS = ("Gelu", "Sigmoid")
"""Those of `STREAMS` whose gradients have a kernel of their own; the others' are ops of the set."""

BACKWARD_ROWWISE = (*ROWWISE, "BatchNormTraining")
"""Kinds whose gradients are measured along one index; the last one is no gradient but a batch norm's forward pass in
training, which takes the statistics first."""

GRAPH = ("pass", "node", "leaf", "apply", "function")
"""What autograd takes besides kernels: a backward pass, a node that is recorded and visited, a gradient that is handed
out, a call of a function in Python without gradients, and what such a function takes more with them."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A positive figure, measured on a grid of sizes.

    Attributes:
        axes: for each size its grid points, ascending.
        values: the last axis varies fastest.
    """

    axes: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]

    def at(self, *point: float) -> float:
        """The figure at a point: multilinear in the logarithms, the nearest edge's value outside the grid.

        Raises:
            CostError: a point of another dimension, or a size below 1.
        """
        if len(point) != len(self.axes) or any(size < 1 for size in point):
            raise CostError(f"a grid over {len(self.axes)} sizes has no point {point}")
        corners = [(0, 1.0)]
        for axis, size in zip(self.axes, point, strict=True):
            low, share = _bracket(axis, size)
            steps = [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]
            corners = [(offset * len(axis) + k, w * weight) for offset, w in corners for k, weight in steps]
        return math.exp(math.fsum(w * math.log(self.values[k]) for k, w in corners))


def _bracket(axis: Sequence[int], size: float) -> tuple[int, float]:
    """Position of the grid point below `size`, and how far (0 … 1, in logarithms) it is on the way to the next."""
    if size <= axis[0]:
        return 0, 0.0
    if size >= axis[-1]:
        return len(axis) - 1, 0.0
    low = bisect_right(axis, size) - 1
    return low, math.log(size / axis[low]) / math.log(axis[low + 1] / axis[low])


@dataclass(frozen=True, slots=True)
class Products:
    """Matrix products of another library than torch's own.

    Attributes:
        gemm: FLOP/s, over (rows, inner, columns).
        overhead: seconds of each product.
    """

    gemm: Grid
    overhead: float


@dataclass(frozen=True, slots=True)
class Training:
    """What training takes besides ops whose rates are those of a forward pass.

    Attributes:
        streams: bytes/s of the gradient of each kind in `BACKWARD_STREAMS`, over (bytes read and written).
        rowwise: elements/s of each kind in `BACKWARD_ROWWISE`, over (rows, length of the index it works along).
        overhead: seconds of each of both.
        graph: seconds of each of `GRAPH`.
    """

    streams: Mapping[str, Grid]
    rowwise: Mapping[str, Grid]
    overhead: Mapping[str, float]
    graph: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does with one dtype; every rate is the op's own, its overhead taken off.

    Attributes:
        gemm: FLOP/s of a matrix product, over (rows, inner, columns).
        batched: FLOP/s of a batched one, over (batch, rows, inner, columns). Small matrices run far below the peak.
        streams: bytes/s of each kind in `STREAMS`, over (bytes read and written): caches make it fall with size.
        rowwise: elements/s of each kind in `ROWWISE`, over (rows, length of the index it works along).
        bandwidth: bytes/s that nothing exceeds; the bound where a grid ends.
        memory: bytes/s of reading weights in turn, over (bytes of all of them): past each cache's size it drops.
        fresh: bytes/s of filling a new tensor, over (its bytes): large ones are pages that the system clears first.
        overhead: seconds of each of `OVERHEADS`.
        routing: of each kind in `ROUTING`, over its two sizes: slots/s of the last two, elements/s of the others.
        routing_overhead: seconds of each of them, and of `GROUPED`. Both are empty in a profile of before they were
            measured, which then serves layers without routing.
        fast: products of the flavour `fast`; None where they were not measured: in a profile of before, on other
            devices than a CPU, and in other dtypes than float32, where that flavour calls the public ones.
        training: None in a profile of before it was measured.
    """

    gemm: Grid
    batched: Grid
    streams: Mapping[str, Grid]
    rowwise: Mapping[str, Grid]
    bandwidth: float
    memory: Grid
    fresh: Grid
    overhead: Mapping[str, float]
    routing: Mapping[str, Grid] = field(default_factory=dict)
    routing_overhead: Mapping[str, float] = field(default_factory=dict)
    fast: Products | None = None
    training: Training | None = None
