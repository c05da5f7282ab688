"""A device's measured rates as a file: what `tnmoe calibrate` writes, and where it is kept."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnmoe.errors import CostError, DeclarationError, TnmoeError
from tnmoe.io import cache
from tnmoe.io.files import json_text
from tnmoe.io.json_fields import Field, read_json
from tnmoe.ir.ops import Op
from tnmoe.ir.routing_ops import Noise, RoutingOp
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.op_time import measured_seconds, moved_bytes
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

FORMAT = "tnmoe-profile-1"
LARGEST_AXIS = 2**40
MOST_POINTS = 100_000


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Measured rates of one device.

    Attributes:
        name: of the device, e.g. the processor's model.
        source: where the figures come from: a calibration with its versions and threads, or a data sheet.
        device: the kind, "cpu" or "cuda".
        rates: by dtype.
    """

    name: str
    source: str
    device: str
    rates: Mapping[str, Rates]

    def of(self, dtype: str) -> Rates:
        """The rates for a dtype.

        Raises:
            CostError: if it was not measured, with the dtypes that were.
        """
        if dtype not in self.rates:
            raise CostError(
                f"the profile of {self.name!r} has no dtype {dtype!r}; it has {', '.join(self.rates)}. "
                f"Calibrate with that dtype, or choose one of these"
            )
        return self.rates[dtype]

    @property
    def calibrated(self) -> bool:
        """True: its figures are measurements."""
        return True

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that were measured, float32 first."""
        return tuple(sorted(self.rates, key=lambda dtype: dtype != "float32"))

    # ---- seconds ---------------------------------------------------------------------------------------------

    def op_seconds(
        self, op: Op, sizes: Mapping[str, Dim], dtype: str, *, working_set: int = 0, fast: bool = False
    ) -> float:
        """Seconds of one op, as measured, and of fetching its operands from among `working_set` bytes."""
        rates, itemsize = self.of(dtype), DTYPE_BYTES[dtype]
        if isinstance(op, RoutingOp) and not rates.routing:
            raise CostError(
                f"the profile of {self.name!r} is of before routing was measured, so that {type(op).__name__} has no "
                f"rate in it: run `tnmoe calibrate` again"
            )
        if isinstance(op, Noise):  # in evaluation its result is its operand: nothing is fetched
            return 0.0
        moved = moved_bytes(op, sizes, itemsize)
        fetching = 0.0
        if working_set > moved:
            fetching = max(0.0, moved / rates.memory.at(working_set) - moved / rates.memory.at(moved))
        return fetching + measured_seconds(op, sizes, rates, itemsize, moved, self._fast(dtype) if fast else None)

    def _fast(self, dtype: str) -> Products | None:
        """The rates of oneDNN's products; None where the flavour `fast` calls the public ones instead."""
        if self.device != "cpu" or dtype != "float32":
            return None
        if (products := self.of(dtype).fast) is None:
            raise CostError(
                f"the profile of {self.name!r} is of before the flavour 'fast' was measured: run `tnmoe calibrate` "
                f"again"
            )
        return products

    def call_seconds(self, dtype: str, *, parameters: int, calls: int, functions: int) -> float:
        """Seconds of a module's call itself, the looking up of its parameters and going from op to op."""
        rates = self.of(dtype)
        call = rates.overhead["call"] + parameters * rates.overhead["parameter"] + calls * rates.overhead["switch"]
        return call if rates.training is None else call + functions * rates.training.graph["apply"]

    def graph_seconds(self, dtype: str, *, nodes: int, functions: int, leaves: int) -> float:
        """Seconds that autograd itself takes."""
        each = self._training(dtype).graph
        return each["pass"] + nodes * each["node"] + functions * each["function"] + leaves * each["leaf"]

    def gradient_seconds(self, kind: str, dtype: str, *, count: int, length: int | None, passes: int) -> float | None:
        """Seconds of a gradient that has a kernel of its own.

        Raises:
            CostError: a profile of before training was measured, or a kind that was not.
        """
        training, rates = self._training(dtype), self.of(dtype)
        moved = passes * DTYPE_BYTES[dtype] * count
        if kind not in (training.streams if length is None else training.rowwise):
            raise CostError(f"the profile of {self.name!r} has no rate for the gradient of {kind}")
        if length is None:
            taken = moved / training.streams[kind].at(moved)
        else:
            taken = count / training.rowwise[kind].at(count // length, length)
        return max(taken, moved / rates.bandwidth) + training.overhead[kind]

    def fill_seconds(self, dtype: str, count: int) -> float:
        """Seconds of so many elements of zeros."""
        size = DTYPE_BYTES[dtype] * count
        return size / self.of(dtype).fresh.at(size)

    def _training(self, dtype: str) -> Training:
        """What the profile knows of training."""
        if (training := self.of(dtype).training) is None:
            raise CostError(
                f"the profile of {self.name!r} is of before training was measured: run `tnmoe calibrate` again"
            )
        return training

    # ---- JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The profile as JSON; `from_json` gives it back exactly."""

        def grid(g: Grid) -> dict[str, Any]:
            return {"axes": [list(a) for a in g.axes], "values": list(g.values)}

        rates = {
            dtype: {
                "gemm": grid(r.gemm),
                "batched": grid(r.batched),
                "streams": {kind: grid(g) for kind, g in r.streams.items()},
                "rowwise": {kind: grid(g) for kind, g in r.rowwise.items()},
                "bandwidth": r.bandwidth,
                "memory": grid(r.memory),
                "fresh": grid(r.fresh),
                "overhead": dict(r.overhead),
                **_later_mapping(r, grid),
            }
            for dtype, r in self.rates.items()
        }
        return json_text(
            {"format": FORMAT, "name": self.name, "source": self.source, "device": self.device, "rates": rates}
        )

    @classmethod
    def from_json(cls, text: str) -> DeviceProfile:
        """The profile that `to_json` wrote.

        Raises:
            DeclarationError: naming the key, what it must be and what it is.
        """
        fields = read_json(text, "a profile", FORMAT, DeclarationError).keys("name", "source", "device", "rates")
        rates = {dtype: _rates(data) for dtype, data in fields["rates"].some_keys(DTYPE_BYTES).items()}
        return cls(fields["name"].words(), fields["source"].words(), fields["device"].words(), rates)


def _later_mapping(rates: Rates, grid: Callable[[Grid], dict[str, Any]]) -> dict[str, Any]:
    """What profiles of before lack, where this one has it."""

    def grids(given: Mapping[str, Grid]) -> dict[str, Any]:
        return {kind: grid(g) for kind, g in given.items()}

    later: dict[str, Any] = {}
    if rates.routing:
        later |= {"routing": grids(rates.routing), "routing_overhead": dict(rates.routing_overhead)}
    if rates.fast is not None:
        later["fast"] = {"gemm": grid(rates.fast.gemm), "overhead": rates.fast.overhead}
    if (training := rates.training) is not None:
        later["training"] = {
            "streams": grids(training.streams),
            "rowwise": grids(training.rowwise),
            "overhead": dict(training.overhead),
            "graph": dict(training.graph),
        }
    return later


def _rates(data: Field) -> Rates:
    keys = ("gemm", "batched", "streams", "rowwise", "bandwidth", "memory", "fresh", "overhead")
    fields = data.keys(*keys, optional=("routing", "routing_overhead", "fast", "training"))
    routed = any(fields[key].value is not None for key in ("routing", "routing_overhead"))
    return Rates(
        gemm=_grid(fields["gemm"], 3),
        batched=_grid(fields["batched"], 4),
        streams=_grids(fields["streams"], STREAMS, 1),
        rowwise=_grids(fields["rowwise"], ROWWISE, 2),
        bandwidth=fields["bandwidth"].number(),
        memory=_grid(fields["memory"], 1),
        fresh=_grid(fields["fresh"], 1),
        overhead=_seconds(fields["overhead"], OVERHEADS),
        routing=_grids(fields["routing"], ROUTING, 2) if routed else {},
        routing_overhead=_seconds(fields["routing_overhead"], (*ROUTING, *GROUPED)) if routed else {},
        fast=fields["fast"].maybe(_products),
        training=fields["training"].maybe(_training_rates),
    )


def _products(data: Field) -> Products:
    fields = data.keys("gemm", "overhead")
    return Products(_grid(fields["gemm"], 3), fields["overhead"].number(zero=True))


def _training_rates(data: Field) -> Training:
    fields = data.keys("streams", "rowwise", "overhead", "graph")
    return Training(
        streams=_grids(fields["streams"], BACKWARD_STREAMS, 1),
        rowwise=_grids(fields["rowwise"], BACKWARD_ROWWISE, 2),
        overhead=_seconds(fields["overhead"], (*BACKWARD_STREAMS, *BACKWARD_ROWWISE)),
        graph=_seconds(fields["graph"], GRAPH),
    )


def _grids(data: Field, kinds: Iterable[str], dimension: int) -> dict[str, Grid]:
    return {kind: _grid(field, dimension) for kind, field in data.keys(*kinds).items()}


def _seconds(data: Field, kinds: Iterable[str]) -> dict[str, float]:
    return {kind: field.number(zero=True) for kind, field in data.keys(*kinds).items()}


def _grid(data: Field, dimension: int) -> Grid:
    fields = data.keys("axes", "values")
    axes = tuple(map(_axis, fields["axes"].items(dimension, "axes")))
    points = math.prod(map(len, axes))
    if points > MOST_POINTS:
        raise fields["axes"].fault(f"axes of at most {MOST_POINTS:,} points")
    return Grid(axes, tuple(rate.number() for rate in fields["values"].items(points, "rates, one a grid point")))


def _axis(data: Field) -> tuple[int, ...]:
    sizes = tuple(size.integer(1, LARGEST_AXIS) for size in data.items(of="sizes"))
    if not sizes or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise data.fault("a list of ascending sizes")
    return sizes


def default_path(device: str = "cpu") -> Path:
    """Where a calibration of this machine is kept: `profile-<device>.json` in `tnmoe.io.cache.folder()`."""
    return cache.folder() / f"profile-{device}.json"


def kept_profiles() -> list[Path]:
    """The calibrations in the cache folders, whether they can be read or not."""
    return [path for place in cache.folders() for path in sorted(place.glob("profile-*.json"))]


def load_cached(path: str | os.PathLike[str] | None = None) -> DeviceProfile | None:
    """The profile kept at `path`, or of this machine's CPU in the cache folders; None if there is none to be read.

    A cache may vanish or spoil at any time. For a file that a user names, `DeviceProfile.from_json` says what is wrong.
    """
    paths = [place / default_path().name for place in cache.folders()] if path is None else [Path(path)]
    return next((profile for p in paths if (profile := _readable(p)) is not None), None)


def _readable(path: Path) -> DeviceProfile | None:
    try:
        return DeviceProfile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TnmoeError):
        return None
