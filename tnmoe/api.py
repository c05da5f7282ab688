"""The few calls a user makes after planning; only the top modules import planners and backends."""

from __future__ import annotations

import hashlib
import linecache
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tnmoe._version import __version__
from tnmoe.backends import torch as torch_backend
from tnmoe.backends.torch_function import PRODUCTS, FunctionUnit
from tnmoe.backends.torch_methods import Frozen, Unit
from tnmoe.built import remember
from tnmoe.cost_report import CostReport
from tnmoe.errors import CostError, DeclarationError, unknown
from tnmoe.layer import Layer, Node
from tnmoe.layers import declare
from tnmoe.memory_report import MemoryReport
from tnmoe.network import Role
from tnmoe.padding import padded_splits
from tnmoe.passes.fold_weights import fold_weights
from tnmoe.passes.fuse_products import fuse_program
from tnmoe.passes.overwrite import overwrite
from tnmoe.plan import Plan
from tnmoe.planning import for_inference, plan, with_tokens
from tnmoe.program import Program, bind
from tnmoe.question import DEFAULT_TOKENS, Planable
from tnmoe.release import release
from tnmoe.routing_ops import CapacitySlots, SortSlots, Spread

if TYPE_CHECKING:
    import torch


def _require_plan(what: object) -> Plan:
    if not isinstance(what, Plan):
        raise DeclarationError(f"expected a plan, got {type(what).__name__}; make one with tnmoe.plan(…)")
    return what


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


def emit(what: Plan | Sequence[Plan], *, name: str | Sequence[str] | None = None, freeze: bool = False) -> str:
    """The source of a standalone torch module (or of several in one file); it imports torch alone.

    Args:
        what: one plan, or several.
        name: of the class (or one name for each plan), by default after the layer.
        freeze: give each class a method `freeze()` that makes its inference form, a second class: what weights alone
            determine is computed once, in the order that is best for that, and there are no gradients.

    Raises:
        EmitError: a name that is taken, or an op without a torch form.
        DeclarationError: a name that is no identifier.
    """
    plans = [_require_plan(p) for p in (what if isinstance(what, list | tuple) else [what])]
    names = [name] if isinstance(name, str) else [p.layer.name for p in plans] if name is None else list(name)
    if len(names) != len(plans):
        raise DeclarationError(f"{len(plans)} plans need {len(plans)} class names, got {names}")
    units = [_unit(p, n, freeze) for p, n in zip(plans, names, strict=True)]
    return torch_backend.emit(units, f"Generated by tnmoe {__version__}. It needs torch alone; edit it as you like.")


def _unit(planned: Plan, name: str, freeze: bool) -> Unit:
    report = cost(planned)
    notes = [
        "",
        "Declaration:",
        *(f"    {key} = {_toml(value)}" for key, value in planned.layer.declaration.items()),
        "",
        *_orders(planned),
        "",
        "Cost:",
        f"    {report.parameters:,} parameters",
        f"    {report.macs:,} MACs, {report.flops:,} FLOPs ({report.matmul_flops:,} in matmuls)",
    ]
    if planned.function is not None:
        notes.append(f"    training: {report.training_flops:,} FLOPs, {report.saved_bytes:,} bytes kept in float32")
    sizes = planned.bound.sizes
    if planned.layer.batched:
        width_in, width_out = sizes[planned.layer.inputs[0].indices[-1]], sizes[planned.layer.output.indices[-1]]
        title = f"Maps (..., {width_in}) to (..., {width_out})."
    else:
        title = f"Contracts {planned.layer.summary}."
    adjoint = planned.adjoint
    function = (
        None
        if adjoint is None or planned.function is None
        else FunctionUnit(adjoint, planned.function.flavour, planned.function.chunk, planned.function.aside)
    )
    product = "@" if function is None else PRODUCTS[function.flavour]
    frozen = _frozen(planned, name, product) if freeze else None
    summary, batched = planned.layer.summary, planned.layer.batched
    return Unit(planned.bound, name, title, summary, notes, batched, function, frozen=frozen, product=product)


def _orders(planned: Plan) -> list[str]:
    tokens = f" for {planned.values[planned.layer.token_symbol]:,} tokens" if planned.layer.batched else ""
    return [
        f"Planned{tokens}; objective {planned.objective}, {planned.proof}:",
        *(f"    {name} = {order}" for name, order in planned.orders.items()),
    ]


def _frozen(trained: Plan, name: str, product: str) -> Frozen:
    """The inference form of a class."""
    planned = for_inference(trained)
    report = cost(trained, inference=True)
    notes = [
        "",
        *_orders(planned),
        "",
        "Cost of a call:",
        f"    {report.macs:,} MACs, {report.flops:,} FLOPs ({report.matmul_flops:,} in matmuls)",
        f"    {planned.folding_flops:,} FLOPs once, when it is made; {report.parameters:,} numbers stored",
    ]
    unit = Unit(
        release(report.bound),
        f"Frozen{name}",
        f"Inference form of {name}, made by its freeze(); it has no gradients.",
        planned.layer.summary,
        notes,
        planned.layer.batched,
        inference=True,
        product=product,
    )
    orders = {p.name: p.indices for p in (*trained.bound.parameters, *trained.bound.buffers)}
    return Frozen(unit, fold_weights(planned.bound), orders)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return str(value)


def build(
    planned: Plan,
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    freeze: bool = False,
) -> torch.nn.Module:
    """A live module, made from the very source that `emit` writes.

    Args:
        planned: the plan.
        name: of the class.
        device, dtype: of the parameters.
        freeze: give it a method `freeze()`; see `emit`.
    """
    source = emit(_require_plan(planned), name=name, freeze=freeze)
    name = name or planned.layer.name
    made = getattr(loaded(source), name)
    remember(made, planned)
    result: torch.nn.Module = made(device=device, dtype=dtype)
    return result


def loaded(source: str) -> types.ModuleType:
    """The module of an emitted source, imported once."""
    module_name = f"tnmoe_emitted_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        module = types.ModuleType(module_name)
        file = f"<{module_name}.py>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
        exec(compile(source, file, "exec"), module.__dict__)
        sys.modules[module_name] = module  # so that instances can be pickled within the process
    return sys.modules[module_name]


def from_reference(planned: Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict for `build(planned)` from one of the μMoE reference implementation.

    Raises:
        DeclarationError: a key or shape that does not fit the declaration, with the axis named.
    """
    from tnmoe.backends import reference_format  # imports torch, which planning and costing do without

    return reference_format.from_reference(planned.layer, planned.program, planned.bound.sizes, state)


def to_reference(planned: Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict for the μMoE reference implementation from one of `build(planned)`."""
    from tnmoe.backends import reference_format  # imports torch, which planning and costing do without

    return reference_format.to_reference(planned.layer, planned.program, planned.bound.sizes, state)
