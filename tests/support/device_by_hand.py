"""A device profile made by hand, whose times are arithmetic."""

from __future__ import annotations

from tnmoe.ir.value import Value
from tnmoe.timing.device_profile import DeviceProfile
from tnmoe.timing.rates import (
    BACKWARD_ROWWISE,
    BACKWARD_STREAMS,
    GRAPH,
    GROUPED,
    OVERHEADS,
    ROUTING,
    ROWWISE,
    STREAMS,
    Grid,
    Products,
    Rates,
    Training,
)

OVERHEAD = {kind: (k + 1) * 1e-6 for k, kind in enumerate(OVERHEADS)}

ROUTING_OVERHEAD = {kind: (k + 1) * 1e-7 for k, kind in enumerate((*ROUTING, *GROUPED))}

BACKWARD_OVERHEAD = {kind: (k + 1) * 1e-5 for k, kind in enumerate((*BACKWARD_STREAMS, *BACKWARD_ROWWISE))}

GRAPH_OVERHEAD = {kind: (k + 1) * 1e-5 for k, kind in enumerate(GRAPH)}

FAST_OVERHEAD = 3e-6


def flat(dimension: int, value: float) -> Grid:
    return Grid(((1,),) * dimension, (value,))


def by_hand() -> DeviceProfile:
    """1 GFLOP/s in products, 4 in fast ones, 0.5 in batched ones, 2 GB/s in streams, 0.1 G elements/s along rows.

    Backwards 1 GB/s in streams and 0.05 G elements/s along rows.
    """
    rates = Rates(
        gemm=flat(3, 1e9),
        batched=flat(4, 5e8),
        streams={kind: flat(1, 2e9) for kind in STREAMS},
        rowwise={kind: flat(2, 1e8) for kind in ROWWISE},
        bandwidth=1e12,
        fresh=flat(1, 1e9),
        memory=Grid(((2**12, 2**20),), (1e12, 1e9)),
        overhead=OVERHEAD,
        routing={kind: flat(2, 1e7) for kind in ROUTING},
        routing_overhead=ROUTING_OVERHEAD,
        fast=Products(flat(3, 4e9), FAST_OVERHEAD),
        training=Training(
            streams={kind: flat(1, 1e9) for kind in BACKWARD_STREAMS},
            rowwise={kind: flat(2, 5e7) for kind in BACKWARD_ROWWISE},
            overhead=BACKWARD_OVERHEAD,
            graph=GRAPH_OVERHEAD,
        ),
    )
    return DeviceProfile("slow machine", "by hand", "cpu", {"float32": rates})


def value(name: str, indices: str, integer: bool = False) -> Value:
    return Value(name, tuple(indices), "", integer)
