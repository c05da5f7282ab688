"""How long a program should take on a device: a roofline over its ops.

The work of an op comes from `tnmoe.costing.op_cost`; this module only divides it by rates, measured ones (`tnmoe
calibrate`) or those of a data sheet (`tnmoe.timing.datasheet`). A prediction ranks programs and shortlists them;
near-ties are for a measurement to decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.traffic import forward_traffic, touched_parameters
from tnmoe.errors import CostError
from tnmoe.ir.contractions import (
    Add,
    Contract,
    ContractAdd,
    MatmulGroups,
    Merge,
    Multiply,
    Permute,
    Reduce,
    Split,
    matmul_groups,
)
from tnmoe.ir.dataflow import elements
from tnmoe.ir.fused_ops import FusedOp, unfused
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, Gelu, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import GroupedContract, Noise, RoutingOp, Select
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.render.table import Cell, Table
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.datasheet import Datasheet, roofline
from tnmoe.timing.device_profile import DeviceProfile
from tnmoe.timing.rates import GROUPED, Products, Rates
from tnmoe.timing.routing_time import calls, grouped_products, routing_seconds

Device = DeviceProfile | Datasheet
"""What a time can be predicted for."""


def op_seconds(
    op: Op, sizes: Mapping[str, Dim], profile: Device, dtype: str, *, working_set: int = 0, fast: bool = False
) -> float:
    """Seconds of one op, without gradients: max(work / rate, bytes / bandwidth) + overhead + fetching.

    By a data sheet the rate is the peak, and nothing is known of fetching. The rates of a calibration were measured on
    the same operands again and again, which then lie in whatever cache holds them. In a program they do not: fetching
    is what reading them costs more among `working_set` bytes than by themselves.

    Args:
        op: laid out.
        sizes: integers by index.
        profile: of the device, measured or a data sheet.
        dtype: of all operands.
        working_set: bytes that are used between two runs of this op; 0 if it runs by itself.
        fast: whether its products are those of the flavour `fast`. By a data sheet they are at the peak like all; on
            a device or in a dtype for which that flavour has none, they are the public ones.

    Raises:
        CostError: an op without a time model, a size that is a symbol, or a dtype that the profile lacks.
    """
    for index in {i for v in (*operands(op), *results(op)) for i in v.indices}:
        if not isinstance(sizes[index], int):
            raise CostError(f"the size of {index!r} is {sizes[index]}, not an integer: bind the program first")
    if isinstance(profile, Datasheet):
        return roofline(op, sizes, profile, dtype)
    rates, width = profile.of(dtype), DTYPE_BYTES[dtype]
    if isinstance(op, RoutingOp) and not rates.routing:
        raise CostError(
            f"the profile of {profile.name!r} is of before routing was measured, so that {type(op).__name__} has no "
            f"rate in it: run `tnmoe calibrate` again"
        )
    if isinstance(op, Noise):  # in evaluation its result is its operand
        return 0.0
    if isinstance(op, RoutingOp):  # it reads what is chosen alone
        traffic = forward_traffic(op, sizes)
        moved = width * max(1, int(traffic.read + traffic.written))
    else:
        moved = width * sum(int(elements(v.indices, sizes)) for v in (*operands(op), *results(op)))
    least = moved / rates.bandwidth
    fetching = 0.0
    if working_set > moved:
        fetching = max(0.0, moved / rates.memory.at(working_set) - moved / rates.memory.at(moved))
    products = _fast_products(profile, dtype) if fast else None
    return fetching + _alone(op, sizes, rates, width, moved, least, products)


def _fast_products(profile: DeviceProfile, dtype: str) -> Products | None:
    """The rates of oneDNN's products; None where the flavour `fast` calls the public ones instead."""
    if profile.device != "cpu" or dtype != "float32":
        return None
    if (found := profile.of(dtype).fast) is None:
        raise CostError(
            f"the profile of {profile.name!r} is of before the flavour 'fast' was measured: run `tnmoe calibrate` again"
        )
    return found


def _alone(
    op: Op,
    sizes: Mapping[str, Dim],
    rates: Rates,
    width: int,
    moved: int,
    least: float,
    fast: Products | None = None,
) -> float:
    """Seconds of an op whose operands, `moved` bytes with the result, lie where they lay when it was measured."""
    kind = type(op).__name__
    match op:
        case Contract() | ContractAdd():
            cost = op_cost(op, sizes)
            groups = matmul_groups(op)
            batched = groups.batch + groups.outer
            batch, rows, inner, cols = (
                int(elements(g, sizes)) for g in (batched, groups.rows, groups.inner, groups.cols)
            )
            point: tuple[int, ...]
            # A batched product, or one with a bias for each entry, is the public one in every flavour.
            public = bool(batched) or (isinstance(op, ContractAdd) and set(op.bias.indices) != set(groups.cols))
            products = None if public else fast
            if batched:
                grid, point, overhead = rates.batched, (batch, rows, inner, cols), rates.overhead["batched"]
            elif products is not None:
                grid, point, overhead = products.gemm, (rows, inner, cols), products.overhead
            else:
                grid, point, overhead = rates.gemm, (rows, inner, cols), rates.overhead["matmul"]
            seconds = max(int(cost.matmul_flops) / grid.at(*point), least) + overhead
            # The public one spreads the bias over the result first, to which the product is added.
            if isinstance(op, ContractAdd) and products is None:
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
        case Select():  # a view as well
            return rates.overhead["split"]
        case Softmax(_, x, index) | Entmax15(_, x, index) | Sparsemax(_, x, index):
            return _rowwise(kind, int(elements(x.indices, sizes)), int(elements((index,), sizes)), rates, least)
        case LayerNorm(_, x, index) | BatchNorm(_, x, index):
            return _rowwise(kind, int(elements(x.indices, sizes)), int(elements((index,), sizes)), rates, least)
        case _ if isinstance(op, FusedOp):  # a profile times no kernels: as the public products that it stands for
            return sum(_of_part(part, sizes, rates, width) for part in unfused(op))
        case GroupedContract():
            return max(_grouped(op, sizes, rates, width), least)
        case _ if isinstance(op, RoutingOp):
            return max(routing_seconds(op, sizes, rates, width), least)
        case _:
            raise CostError(f"op {kind} has no time model")


def _grouped(op: GroupedContract, sizes: Mapping[str, Dim], rates: Rates, width: int) -> float:
    """A product for each expert that is chosen, as the emitted loop runs them, and their concatenation.

    How many rows an expert has, only the data knows; here all are chosen alike.
    """
    (row, index), experts = op.lhs.indices, int(elements(op.counts.indices, sizes))
    rows, inner, cols = (int(elements((i,), sizes)) for i in (row, index, op.out.indices[-1]))
    products = grouped_products(op, sizes)
    each = max(1.0, rows / max(1.0, products)) if rows > 2 * experts else 1.0
    one = 2 * each * inner * cols / rates.gemm.at(each, inner, cols) + rates.overhead["matmul"]
    if op.bias is not None:
        one += width * each * cols / rates.streams["Add"].at(3 * width * each * cols) + rates.overhead["bias"]
    joined = 2 * width * rows * cols
    copying = joined / rates.streams["Permute"].at(joined) + rates.overhead["Permute"]
    loop, expert = (rates.routing_overhead[kind] for kind in GROUPED)
    return loop + products * (one + expert) + copying


def _of_part(op: Op, sizes: Mapping[str, Dim], rates: Rates, width: int) -> float:
    moved = width * sum(int(elements(v.indices, sizes)) for v in (*operands(op), op.out))
    return _alone(op, sizes, rates, width, moved, moved / rates.bandwidth)


def _rowwise(kind: str, count: int, length: int, rates: Rates, least: float) -> float:
    return max(count / rates.rowwise[kind].at(count // length, length), least) + rates.overhead[kind]


def _views(groups: MatmulGroups) -> tuple[int, int]:
    """Views that give the operands two axes by merging some, and the result its own by splitting some."""

    def odd(*found: tuple[str, ...]) -> int:
        return sum(len(g) != 1 for g in found)

    outer = (groups.outer,) if groups.outer else ()
    merges = odd(groups.rows, groups.inner) + odd(*outer, groups.inner, groups.cols)
    merges += len(outer)  # the matrix is expanded
    return merges, odd(*outer, groups.rows, groups.cols)


def view_count(op: Contract | ContractAdd) -> int:
    """Views around a product: calls of torch that move nothing."""
    return sum(_views(matmul_groups(op)))


def _view_seconds(groups: MatmulGroups, overhead: Mapping[str, float]) -> float:
    merges, splits = _views(groups)
    return merges * overhead["merge"] + splits * overhead["split"]


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

    @property
    def notes(self) -> tuple[str, ...]:
        """Whose times, and what they rest on."""
        routed = any(isinstance(op, GroupedContract) for op in self.program.ops)
        alike = "How many rows an expert has, the data decides; here all are chosen alike."
        return (
            f"Profile: {self.profile}.",
            *((alike,) if routed else ()),
            "A model of one forward pass without gradients: good for ranking, no proof of a choice between near-ties.",
        )

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
        return Table(f"Predicted time of {title}, {self.dtype}", columns, tuple(rows), self.notes)

    def _cells(self, seconds: float) -> tuple[int, str]:
        return round(1e9 * seconds), f"{seconds / self.seconds:.1%}"


def working_set(program: Program, dtype: str) -> int:
    """Bytes that one forward pass touches: inputs, weights (of routed ones as many as are chosen), every intermediate.

    Raises:
        CostError: if the program is not bound.
    """
    stored = {p.name for p in program.parameters}
    values = [v for v in (*program.leaves, *(v for op in program.ops for v in results(op))) if v.name not in stored]
    found = sum((elements(v.indices, program.sizes) for v in values), start=touched_parameters(program))
    if not isinstance(found, int):
        raise CostError(f"the program touches {found} elements, which is not an integer: bind the program first")
    return DTYPE_BYTES[dtype] * found


def predict(
    program: Program,
    profile: Device,
    dtype: str = "float32",
    *,
    adjoint: Adjoint | None = None,
    flavour: str = "portable",
) -> Prediction:
    """Predicted time of one forward pass of a bound program.

    Args:
        program: bound.
        profile: of the device, measured or a data sheet.
        dtype: of all values.
        adjoint: of what is emitted as a function of its own, `plan.adjoint`; calling one takes time.
        flavour: of that function's products, `plan.flavour`. Those of Triton are predicted as the public ones.

    Raises:
        CostError: as `op_seconds`.
    """
    touched = working_set(program, dtype)
    own = frozenset() if adjoint is None or flavour != "fast" else frozenset(op.out.name for op in adjoint.ops)
    per_op = tuple(
        op_seconds(op, program.sizes, profile, dtype, working_set=touched, fast=op.out.name in own)
        for op in program.ops
    )
    used = f"{profile.name} ({profile.source})"
    if isinstance(profile, Datasheet):
        return Prediction(program, used, dtype, 0.0, per_op)
    rates = profile.of(dtype)
    overhead = rates.overhead
    stored = {p.name for p in program.parameters + program.buffers}
    uses = sum(v.name in stored for op in program.ops for v in operands(op))
    steps = sum(calls(op, program.sizes) for op in program.ops)
    call = overhead["call"] + uses * overhead["parameter"] + steps * overhead["switch"]
    if adjoint is not None and rates.training is not None:
        call += rates.training.graph["apply"]
    return Prediction(program, used, dtype, call, per_op)
