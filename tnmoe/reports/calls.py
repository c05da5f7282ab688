"""What a plan costs and keeps in memory: the calls that make its reports."""

from __future__ import annotations

from collections.abc import Collection

from tnmoe.footprint.liveness import release
from tnmoe.ir.bound import bind
from tnmoe.ir.program import Program
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
        return cost_of_calls(planned, for_inference(planned), dtype)
    return CostReport.of(planned, dtype, (frozen,) if isinstance(frozen, str) else frozen)


def cost_of_calls(trained: Plan, planned: Plan, dtype: str = "float32") -> CostReport:
    """What each call of the inference form costs.

    Args:
        trained: the plan of the module that has the form.
        planned: its plan for inference.
        dtype: of weights and activations.
    """
    return CostReport(trained.layer, _each_call(trained, planned), trained.values, dtype)


def _each_call(trained: Plan, planned: Plan) -> Program:
    """What each call of the inference form runs: in place where it can be, and with products fused by `triton`."""
    each = planned.folded.each
    if trained.function is not None and trained.function.flavour == "triton":
        each = fuse_program(each, {index: int(size) for index, size in bind(each, planned.values).sizes.items()})
    return overwrite(each)


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
