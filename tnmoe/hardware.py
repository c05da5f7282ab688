"""How long a program should take: a device's measured rates, and a roofline over the ops of a program.

The work of an op comes from `tnmoe.cost`; this module only divides it by rates. A prediction ranks programs and
shortlists them; near-ties are for a measurement to decide. `tnmoe.calibrate` makes profiles.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tnmoe import cache
from tnmoe.cost import DTYPE_BYTES, elements, op_cost
from tnmoe.dims import Dim
from tnmoe.errors import CostError, DeclarationError, TnmoeError
from tnmoe.ops import (
    Add,
    BatchNorm,
    Contract,
    ContractAdd,
    Entmax15,
    Gelu,
    LayerNorm,
    MatmulGroups,
    Merge,
    Multiply,
    Op,
    Permute,
    Reduce,
    Sigmoid,
    Softmax,
    Sparsemax,
    Split,
    matmul_groups,
    operands,
    results,
)
from tnmoe.program import Program
from tnmoe.report import Cell, Table, json_text

FORMAT = "tnmoe-profile-1"

STREAMS = ("Multiply", "Add", "Reduce", "Permute", "Sigmoid", "Gelu")
"""Kinds of op whose time follows the bytes they move, whatever the shape."""

ROWWISE = ("Softmax", "Entmax15", "Sparsemax", "LayerNorm", "BatchNorm")
"""Kinds of op that work along one index: sorting and reductions make the row's length matter."""

OVERHEADS = ("matmul", "batched", "bias", "merge", "split", "parameter", "switch", "call", *STREAMS, *ROWWISE)
"""What has a fixed time: a matrix product, a batched one, a bias on top of either, a view that merges axes, one that
splits an axis, a use of a parameter, going from one op to another, a module's call, and each other kind of op."""

LARGEST_AXIS = 2**40
MOST_POINTS = 100_000


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
    """

    gemm: Grid
    batched: Grid
    streams: Mapping[str, Grid]
    rowwise: Mapping[str, Grid]
    bandwidth: float
    memory: Grid
    fresh: Grid
    overhead: Mapping[str, float]


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
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, deep nesting
            raise DeclarationError(f"a profile must be JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise DeclarationError(f'a profile must be a JSON object with "format": "{FORMAT}"')
        _object(data, "profile", ("format", "name", "source", "device", "rates"))
        for key in ("name", "source", "device"):
            if not isinstance(data[key], str) or not data[key].strip():
                raise DeclarationError(f"{key} of a profile must be text, got {_shown(data[key])}")
        by_dtype = data["rates"]
        if not isinstance(by_dtype, dict) or not by_dtype or not set(by_dtype) <= set(DTYPE_BYTES):
            raise DeclarationError(
                f"rates of a profile must be an object with some of {', '.join(DTYPE_BYTES)}, got {_shown(by_dtype)}"
            )
        rates = {dtype: _rates(r, f"rates.{dtype}") for dtype, r in by_dtype.items()}
        return cls(data["name"], data["source"], data["device"], rates)


def _rates(data: Any, where: str) -> Rates:
    _object(data, where, ("gemm", "batched", "streams", "rowwise", "bandwidth", "memory", "fresh", "overhead"))
    for key, kinds in (("streams", STREAMS), ("rowwise", ROWWISE), ("overhead", OVERHEADS)):
        _object(data[key], f"{where}.{key}", kinds)
    return Rates(
        gemm=_grid(data["gemm"], f"{where}.gemm", 3),
        batched=_grid(data["batched"], f"{where}.batched", 4),
        streams={k: _grid(data["streams"][k], f"{where}.streams.{k}", 1) for k in STREAMS},
        rowwise={k: _grid(data["rowwise"][k], f"{where}.rowwise.{k}", 2) for k in ROWWISE},
        bandwidth=_positive(data["bandwidth"], f"{where}.bandwidth"),
        memory=_grid(data["memory"], f"{where}.memory", 1),
        fresh=_grid(data["fresh"], f"{where}.fresh", 1),
        overhead={k: _positive(data["overhead"][k], f"{where}.overhead.{k}", zero=True) for k in OVERHEADS},
    )


def _grid(data: Any, where: str, dimension: int) -> Grid:
    _object(data, where, ("axes", "values"))
    axes, values = data["axes"], data["values"]
    if not isinstance(axes, list) or len(axes) != dimension:
        raise DeclarationError(f"{where}.axes must be a list of {dimension} axes, got {_shown(axes)}")
    for k, axis in enumerate(axes):
        sizes = isinstance(axis, list) and bool(axis) and all(type(i) is int and 1 <= i <= LARGEST_AXIS for i in axis)
        if not sizes or any(a >= b for a, b in itertools.pairwise(axis)):
            raise DeclarationError(f"{where}.axes[{k}] must be ascending sizes, got {_shown(axis)}")
    points = math.prod(map(len, axes))
    if points > MOST_POINTS or not isinstance(values, list) or len(values) != points:
        got = f"{len(values):,}" if isinstance(values, list) else _shown(values)
        raise DeclarationError(f"{where}.values must be a list of {points:,} rates, one a grid point; got {got}")
    return Grid(tuple(map(tuple, axes)), tuple(_positive(v, f"{where}.values[{k}]") for k, v in enumerate(values)))


def _object(data: Any, where: str, keys: Iterable[str]) -> None:
    wanted = list(keys)
    if not isinstance(data, dict):
        raise DeclarationError(f"{where} must be an object with {', '.join(wanted)}; got {_shown(data)}")
    lacking, surplus = [k for k in wanted if k not in data], [k for k in data if k not in wanted]
    if lacking or surplus:
        fault = f"lacks {lacking[0]!r}" if lacking else f"has {surplus[0]!r}, which is no key of it"
        raise DeclarationError(f"{where} {fault}; its keys are {', '.join(wanted)}")


def _positive(value: Any, where: str, *, zero: bool = False) -> float:
    # The bounds keep every quotient of a count and a rate finite; nothing real comes near them.
    if type(value) in (int, float) and (1e-30 < value < 1e30 or (zero and value == 0)):
        return float(value)
    raise DeclarationError(f"{where} must be a {'number from 0' if zero else 'positive number'}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a very large integer"
    return text if len(text) <= 80 else text[:80] + "…"


def default_path(device: str = "cpu") -> Path:
    """Where a calibration of this machine is kept: `profile-<device>.json` in `tnmoe.cache.folder()`."""
    return cache.folder() / f"profile-{device}.json"


def load_cached(path: str | os.PathLike[str] | None = None) -> DeviceProfile | None:
    """The profile kept at `path` (`default_path()` if none); None if there is none or it is corrupt.

    A cache may vanish or spoil at any time. For a file that a user names, `DeviceProfile.from_json` says what is wrong.
    """
    try:
        return DeviceProfile.from_json(Path(default_path() if path is None else path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TnmoeError):
        return None


# ---- time ----------------------------------------------------------------------------------------------------


def op_seconds(op: Op, sizes: Mapping[str, Dim], profile: DeviceProfile, dtype: str, *, working_set: int = 0) -> float:
    """Seconds of one op, without gradients: max(work / rate, bytes / bandwidth) + overhead + fetching.

    The rates were measured on the same operands again and again, which then lie in whatever cache holds them. In a
    program they do not: fetching is what reading them costs more among `working_set` bytes than by themselves.

    Args:
        op: laid out.
        sizes: integers by index.
        profile: of the device.
        dtype: of all operands.
        working_set: bytes that are used between two runs of this op; 0 if it runs by itself.

    Raises:
        CostError: an op without a time model, a size that is a symbol, or a dtype that the profile lacks.
    """
    rates = profile.of(dtype)
    for index in {i for v in (*operands(op), *results(op)) for i in v.indices}:
        if not isinstance(sizes[index], int):
            raise CostError(f"the size of {index!r} is {sizes[index]}, not an integer: bind the program first")
    width = DTYPE_BYTES[dtype]
    moved = width * sum(int(elements(v.indices, sizes)) for v in (*operands(op), *results(op)))
    least = moved / rates.bandwidth
    fetching = 0.0
    if working_set > moved:
        fetching = max(0.0, moved / rates.memory.at(working_set) - moved / rates.memory.at(moved))
    return fetching + _alone(op, sizes, rates, width, moved, least)


def _alone(op: Op, sizes: Mapping[str, Dim], rates: Rates, width: int, moved: int, least: float) -> float:
    """Seconds of an op whose operands, `moved` bytes with the result, lie where they lay when it was measured."""
    kind = type(op).__name__
    match op:
        case Contract() | ContractAdd():
            cost = op_cost(op, sizes)
            groups = matmul_groups(op)
            batch, rows, inner, cols = (
                int(elements(g, sizes)) for g in (groups.batch, groups.rows, groups.inner, groups.cols)
            )
            point: tuple[int, ...]
            if groups.batch:
                grid, point, overhead = rates.batched, (batch, rows, inner, cols), rates.overhead["batched"]
            else:
                grid, point, overhead = rates.gemm, (rows, inner, cols), rates.overhead["matmul"]
            seconds = max(int(cost.matmul_flops) / grid.at(*point), least) + overhead
            if isinstance(op, ContractAdd):  # the bias is first spread over the result, to which the product is added
                spread = width * int(cost.elementwise_flops)
                seconds += spread / rates.streams["Add"].at(3 * spread) + rates.overhead["bias"]
            # Beyond the grid the rate is that of its edge, whose result was smaller and its memory at hand.
            written = width * int(cost.activations)
            measured = math.prod(min(size, axis[-1]) for size, axis in zip(point, grid.axes, strict=True))
            known = min(written, max(width, width * measured // min(inner, grid.axes[-2][-1])))
            seconds += max(0.0, written / rates.fresh.at(written) - written / rates.fresh.at(known))
            return seconds + _view_seconds(groups, rates.overhead)
        case Multiply() | Add() | Reduce() | Permute() | Sigmoid() | Gelu():
            return max(moved / rates.streams[kind].at(moved), least) + rates.overhead[kind]
        case Split(_, _, _, _, True):  # zeros are appended, a copy like that of another order
            return max(moved / rates.streams["Permute"].at(moved), least) + rates.overhead["Permute"]
        case Split() | Merge():
            return rates.overhead[kind.lower()]
        case Softmax(_, x, index) | Entmax15(_, x, index) | Sparsemax(_, x, index):
            return _rowwise(kind, int(elements(x.indices, sizes)), int(elements((index,), sizes)), rates, least)
        case LayerNorm(_, x, index) | BatchNorm(_, x, index):
            return _rowwise(kind, int(elements(x.indices, sizes)), int(elements((index,), sizes)), rates, least)
        case _:
            raise CostError(f"op {kind} has no time model; routed layers are not emitted, so there is none to measure")


def _rowwise(kind: str, count: int, length: int, rates: Rates, least: float) -> float:
    return max(count / rates.rowwise[kind].at(count // length, length), least) + rates.overhead[kind]


def _view_seconds(groups: MatmulGroups, overhead: Mapping[str, float]) -> float:
    """Seconds of the views that give the operands two axes and the result its own; they move nothing."""

    def odd(*found: tuple[str, ...]) -> int:
        return sum(len(g) != 1 for g in found)

    merges = odd(groups.rows, groups.inner) + odd(groups.inner, groups.cols)
    return merges * overhead["merge"] + odd(groups.rows, groups.cols) * overhead["split"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted time of one forward pass.

    Attributes:
        program: bound.
        profile: name and source of the profile used.
        dtype: of weights and activations.
        call: seconds of the module's call itself, the looking up of its parameters and going from op to op.
        per_op: seconds of each op, in order.
    """

    program: Program
    profile: str
    dtype: str
    call: float
    per_op: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return self.call + math.fsum(self.per_op)

    def table(self, title: str = "one forward pass") -> Table:
        """Nanoseconds of each op, with its share; `title` says of what."""
        rows: list[tuple[Cell, ...]] = [
            (k, type(op).__name__, f"{op.out.name}[{' '.join(op.out.indices)}]", *self._cells(seconds))
            for k, (op, seconds) in enumerate(zip(self.program.ops, self.per_op, strict=True), start=1)
        ]
        rows.append(("", "call", "", *self._cells(self.call)))
        rows.append(("", "total", "", *self._cells(self.seconds)))
        columns = (
            ("step", "step"),
            ("op", "op"),
            ("result", "result"),
            ("nanoseconds", "ns"),
            ("share", "share"),
        )
        notes = (
            f"Profile: {self.profile}.",
            "A model of one forward pass without gradients: good for ranking, no proof of a choice between near-ties.",
        )
        return Table(f"Predicted time of {title}, {self.dtype}", columns, tuple(rows), notes)

    def _cells(self, seconds: float) -> tuple[int, str]:
        return round(1e9 * seconds), f"{seconds / self.seconds:.1%}"


def working_set(program: Program, dtype: str) -> int:
    """Bytes that one forward pass touches: inputs, weights and every intermediate.

    Raises:
        CostError: if the program is not bound.
    """
    values = [*program.leaves, *(v for op in program.ops for v in results(op))]
    found = sum((elements(v.indices, program.sizes) for v in values), start=cast(Dim, 0))
    if not isinstance(found, int):
        raise CostError(f"the program touches {found} elements, which is not an integer: bind the program first")
    return DTYPE_BYTES[dtype] * found


def predict(program: Program, profile: DeviceProfile, dtype: str = "float32") -> Prediction:
    """Predicted time of one forward pass of a bound program.

    Raises:
        CostError: as `op_seconds`.
    """
    overhead = profile.of(dtype).overhead
    stored = {p.name for p in program.parameters + program.buffers}
    uses = sum(v.name in stored for op in program.ops for v in operands(op))
    call = overhead["call"] + uses * overhead["parameter"] + len(program.ops) * overhead["switch"]
    touched = working_set(program, dtype)
    per_op = tuple(op_seconds(op, program.sizes, profile, dtype, working_set=touched) for op in program.ops)
    used = f"{profile.name} ({profile.source})"
    return Prediction(program, used, dtype, call, per_op)
