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
from tnmoe.costing.traffic import touched_parameters
from tnmoe.errors import CostError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import GroupedContract
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.render.table import Cell, Table
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.device import Device, check_bound
from tnmoe.timing.op_time import torch_calls


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
    check_bound(op, sizes)
    return profile.op_seconds(op, sizes, dtype, working_set=working_set, fast=fast)


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
    touched = sum((elements(v.indices, program.sizes) for v in values), start=touched_parameters(program))
    if not isinstance(touched, int):
        raise CostError(f"the program touches {touched} elements, which is not an integer: bind the program first")
    return DTYPE_BYTES[dtype] * touched


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
    stored = {p.name for p in program.parameters + program.buffers}
    call = profile.call_seconds(
        dtype,
        parameters=sum(v.name in stored for op in program.ops for v in operands(op)),
        calls=sum(torch_calls(op, program.sizes) for op in program.ops),
        functions=int(adjoint is not None),
    )
    return Prediction(program, f"{profile.name} ({profile.source})", dtype, call, per_op)
