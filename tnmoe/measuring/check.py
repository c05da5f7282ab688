"""Check an emitted module against its declaration: values, parameters and FLOPs, each by an independent count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tnmoe.backends.numpy import dense_oracle
from tnmoe.backends.numpy.arrays import Array
from tnmoe.backends.torch.names import attribute
from tnmoe.emission.build import build
from tnmoe.ir.contractions import Split
from tnmoe.ir.layer import Layer
from tnmoe.ir.routing_ops import GroupedContract
from tnmoe.ir.value import Parameter
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import with_tokens
from tnmoe.render.table import Table, grouped
from tnmoe.reports.calls import cost
from tnmoe.symbolic.dims import Dim

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-10
"""Largest error that passes, relative to the largest entry of the result (float64)."""

ROWS = 6
"""Rows of input that the values are compared on."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison."""

    item: str
    expected: str
    got: str
    passed: bool


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All comparisons of one layer."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True if every comparison holds."""
        return all(f.passed for f in self.findings)

    def table(self) -> Table:
        """One row for each comparison."""
        columns = (("item", "item"), ("expected", "expected"), ("got", "got"), ("verdict", "verdict"))
        rows = tuple((f.item, f.expected, f.got, "ok" if f.passed else "FAILED") for f in self.findings)
        return Table(f"Check of {self.name}", columns, rows)

    def __str__(self) -> str:
        return str(self.table())


def check(planned: Plan, *, seed: int = 0) -> CheckReport:
    """Build the module and compare it with its declaration.

    * values: with the dense evaluation of the declaration (NumPy, float64), for training and for evaluation;
    * parameters: `sum(p.numel())` with the report;
    * matmul FLOPs: `torch.utils.flop_counter` on the module at the planned sizes (without computing anything).

    Raises:
        EmitError: if the layer has an op without a torch form.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module = build(planned, dtype=torch.float64)
    layer, report = planned.layer, cost(planned)
    rows = _rows(planned)
    generator = np.random.default_rng(seed)
    sizes = (with_tokens(planned, rows) if layer.batched else planned).bound.sizes
    env = {v.name: generator.standard_normal([int(sizes[i]) for i in v.indices]) for v in layer.inputs}
    stored = {p.name: p.indices for p in planned.program.parameters + planned.program.buffers}
    state: dict[str, torch.Tensor] = {}
    for p in layer.parameters + layer.buffers:
        env[p.name] = _draw(p, layer, sizes, generator)
        order = [p.indices.index(i) for i in stored[p.name]]
        state[attribute(p.name)] = torch.from_numpy(env[p.name].transpose(order).copy())

    findings = []
    for training in (False, True) if layer.buffers else (False,):
        module.load_state_dict(state)
        module.train(training)
        with torch.no_grad():
            got = module(*(torch.from_numpy(env[v.name]) for v in layer.inputs)).numpy()
        expected, dense = dense_oracle.evaluate(layer, env, training=training, sizes=sizes)
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        mode = ("values, training" if training else "values, evaluation") if layer.buffers else "values"
        oracle = "dense weights" if dense else "one einsum, weights too large to form"
        findings.append(Finding(f"{mode} ({oracle})", f"error ≤ {TOLERANCE:.0e}", f"{error:.1e}", error <= TOLERANCE))
    numel = sum(p.numel() for p in module.parameters())
    findings.append(Finding("parameters", grouped(report.parameters), grouped(numel), numel == report.parameters))

    device = "meta"
    if any(isinstance(op, GroupedContract) for op in planned.program.ops):
        device = "cpu"  # numbers of rows are data
        planned = with_tokens(planned, rows)
        report = cost(planned)
    shapes = [[int(planned.bound.sizes[i]) for i in v.indices] for v in layer.inputs]
    counted_module = build(planned, device=device).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted_module(*(torch.zeros(shape, device=device) for shape in shapes))
    counted = counter.get_total_flops()
    findings.append(
        Finding("matmul FLOPs", grouped(report.matmul_flops), grouped(counted), counted == report.matmul_flops)
    )
    return CheckReport(layer.name, tuple(findings))


def _rows(planned: Plan) -> int:
    """About `ROWS`, and a multiple of the groups that the layer splits its tokens into."""
    program = planned.bound
    group = 1
    for op in program.ops:
        if isinstance(op, Split) and op.index in program.inputs[0].indices[:1]:
            group = math.prod(int(program.sizes[p]) for p in op.parts if p not in program.dynamic)
    return -(-ROWS // group) * group


def _draw(p: Parameter, layer: Layer, sizes: Mapping[str, Dim], generator: np.random.Generator) -> Array:
    """A value that no symmetry of the initialisation hides: no zeros, no equal experts; variances are positive."""
    shape = [int(sizes[i]) for i in p.indices]
    if p in layer.buffers:
        return generator.uniform(0.5, 1.5, shape)
    fan = max(1.0, float(np.prod(shape[:-1])) ** 0.5)
    return np.asarray(generator.standard_normal(shape) / fan)
