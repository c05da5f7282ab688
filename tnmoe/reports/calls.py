"""What a plan costs and keeps in memory: the calls that make its reports."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tnmoe.costing.padding import padded_splits
from tnmoe.errors import CostError, unknown
from tnmoe.footprint.liveness import release
from tnmoe.ir.bound import bind
from tnmoe.ir.layer import Layer, Node
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import CapacitySlots, SortSlots, Spread
from tnmoe.ir.value import Role
from tnmoe.layers.kinds import declare
from tnmoe.lowering.fuse_products import fuse_program
from tnmoe.lowering.overwrite import overwrite
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import for_inference, plan, with_tokens
from tnmoe.planning.request import DEFAULT_TOKENS, Planable
from tnmoe.reports.cost_report import CostReport
from tnmoe.reports.memory_report import MemoryReport


def cost(
    what: Plan | Planable,
    *,
    tokens: int | None = None,
    dtype: str = "float32",
    inference: bool = False,
    frozen: str | Collection[str] = (),
) -> CostReport:
    """Parameters, work, rank and bytes of a layer, as numbers and as formulas.

    Args:
        what: a plan; or anything `plan` takes, which is then planned by its defaults.
        tokens: rows of the input to count; by default those of the plan.
        dtype: of weights and activations, for the byte counts.
        inference: of the inference form that `freeze` makes: what each call costs, and what is stored for it.
        frozen: names of parameters that get no gradient, besides those declared so: the backward pass, what it saves,
            gradients and optimizer states leave them out. A backward pass of its own, planned for all of them, skips
            what serves one of them alone and keeps what it was planned to keep, as the module does; freeze them in the
            declaration, or plan their layer anew, to leave it out.

    Raises:
        CostError: an unknown dtype or parameter.
    """
    planned = _planned(what, tokens)
    if inference:
        found = CostReport(planned.layer, _each_call(planned, for_inference(planned)), planned.values, dtype)
        return replace(found, ideal=_without_padding(found))
    names = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    found = _report(planned, dtype, names)
    chosen = _chosen_alone(planned)
    ideal = _report(chosen, dtype, names) if chosen else None
    return replace(found, ideal=_without_padding(ideal or found) or ideal)


def _each_call(trained: Plan, planned: Plan) -> Program:
    """What each call of the inference form runs: in place where it can be, and with products fused by `triton`."""
    each = planned.folded.each
    if trained.function is not None and trained.function.flavour == "triton":
        each = fuse_program(each, {index: int(size) for index, size in bind(each, planned.values).sizes.items()})
    return overwrite(each)


def _report(planned: Plan, dtype: str, frozen: Collection[str]) -> CostReport:
    program, gradients = planned.program, planned.input_gradients
    stored = [p.name for p in program.parameters]
    for name in frozen:
        if name not in stored:
            raise CostError(unknown("parameter", name, stored))
    since = frozenset(p.name for p in program.parameters if p.name in frozen and p.role is Role.WEIGHT)
    kept = (replace(p, role=Role.FROZEN) if p.name in frozen else p for p in program.parameters)
    program = replace(program, parameters=tuple(kept))
    return CostReport(planned.layer, program, planned.values, dtype, gradients, planned.function, frozen=since)


def _without_padding(report: CostReport) -> CostReport | None:
    """The same without work on padded axes; None if there are none."""
    return replace(report, without_padding=True) if padded_splits(report.program) else None


def _chosen_alone(planned: Plan) -> Plan | None:
    """The plan of the same mixture whose tokens run through their chosen experts alone; None if they do so already."""
    layer = planned.layer
    if any(isinstance(node, Spread | CapacitySlots) for node in layer.nodes):
        layer = declare({k: v for k, v in layer.declaration.items() if k not in ("lowering", "capacity")})
    layer = _unpadded(layer)
    if layer == planned.layer:
        return None
    values = {k: v for k, v in planned.values.items() if k in layer.free_symbols - {layer.token_symbol}}
    tokens = planned.values[planned.layer.token_symbol]
    found = plan(layer, tokens=tokens, sizes=values, input_gradients=planned.input_gradients)
    return None if found.flops == planned.flops else found  # few tokens fill no blocks


def _unpadded(layer: Layer) -> Layer:
    """The same layer without the rows that fill up an expert's blocks."""
    sizes = dict(layer.sizes)
    nodes: list[Node] = []
    for node in layer.nodes:
        if isinstance(node, SortSlots):
            sizes[node.rows.indices[0]] = sizes[node.out.indices[0]]
            node = replace(node, block=1)
        nodes.append(node)
    return replace(layer, nodes=tuple(nodes), sizes=sizes)


def memory(
    what: Plan | Planable,
    *,
    tokens: int | None = None,
    dtype: str = "float32",
    inference: bool = False,
    frozen: Collection[str] = (),
) -> MemoryReport:
    """What is alive when in the emitted module: peaks, what is saved for the backward pass and why, a timeline.

    Args:
        what, tokens, dtype, inference: as in `cost`.
        frozen: names of parameters that get no gradient.

    Raises:
        CostError: an unknown dtype or parameter, or a layer that cannot be emitted.
    """
    planned = _planned(what, tokens)
    names = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    call = release(cost(planned, inference=True).bound) if inference else None
    return MemoryReport(planned, dtype, names, call)


def _planned(what: Plan | Planable, tokens: int | None) -> Plan:
    if isinstance(what, Plan):
        return what if tokens is None else with_tokens(what, tokens)
    return plan(what, tokens=DEFAULT_TOKENS if tokens is None else tokens)
