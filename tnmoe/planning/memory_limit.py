"""Planning for the memory of a forward pass: the least peak of a layer, or the cheapest orders within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tnmoe.costing.objective import PEAK, Objective
from tnmoe.errors import PlanError, unknown
from tnmoe.footprint.forward import inference
from tnmoe.footprint.liveness import eager
from tnmoe.ir.layer import Contraction, reads, writes
from tnmoe.ir.ops import results
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.planners import greedy, peak
from tnmoe.planning.plan import Plan
from tnmoe.planning.request import PlanRequest


@dataclass(frozen=True, slots=True)
class _Part:
    """One network of the layer: its partitions, the bytes that stay alive beside it, and its least peak with them."""

    space: peak.Space
    besides: int
    least: int


def within_peak(request: PlanRequest, objective: Objective, memory_limit: object, dtype: str) -> Plan:
    """The plan with the least peak, or the cheapest one within `memory_limit` bytes, as MemTracker counts them.

    While one network is contracted, what else is alive does not depend on its order; so the least peak of a layer is
    that of its steps, each network at its own least, and a limit of the layer is one for each network. Copies between
    steps, which the search does not see, are counted on the program: an order that needs one is not called optimal.

    Raises:
        PlanError: no limit, one that no order keeps (with the least there is), an objective about training, a dtype
            that is none, or a network of more than 9 tensors.
    """
    if dtype not in DTYPE_BYTES:
        raise PlanError(unknown("dtype", dtype, DTYPE_BYTES))
    if memory_limit is not None and (type(memory_limit) is not int or memory_limit < 1):
        raise PlanError(f"memory_limit must be a number of bytes, got {memory_limit!r}")
    if objective.shortlisted:
        raise PlanError(f"the objective {str(objective)!r} takes no limit; plan by a price of the forward pass")
    itemsize = DTYPE_BYTES[dtype]
    parts, rest = _parts(request, objective.of_steps, itemsize)
    least = max([rest, *(part.least for part in parts.values())])
    if memory_limit is not None and memory_limit < least:
        raise PlanError(f"no order holds {memory_limit:,} bytes or fewer in a forward pass; the least is {least:,}")
    wanted = [least] if objective == PEAK or memory_limit is None else [memory_limit, least]
    limit = least if memory_limit is None else memory_limit
    for attempt in wanted:  # where copies exceed the limit, what leaves the most room for them
        plan = _planned(request, objective, parts, attempt, itemsize)
        held = max((step.peak for step in inference(plan.bound, itemsize)), default=0)
        if held <= limit or memory_limit is None:
            plan = replace(plan, memory_limit=memory_limit)
            return plan if held <= attempt == wanted[0] else _unproven(plan)
    raise PlanError(f"no order was found that holds {limit:,} bytes or fewer, copies included; the least is {held:,}")


def _planned(request: PlanRequest, objective: Objective, parts: Mapping[str, _Part], limit: int, itemsize: int) -> Plan:
    paths: dict[str, ContractionPath] = {}
    for name, part in parts.items():
        path = peak.cheapest(part.space, (limit - part.besides) // itemsize)
        assert path is not None, "the limit is at least the least peak of every part"
        paths[name] = path
    return Plan(request.layer, paths, request.values, objective, request.inputs)


def _unproven(plan: Plan) -> Plan:
    return replace(plan, paths={name: replace(path, exact=False) for name, path in plan.paths.items()})


def _parts(request: PlanRequest, price: Objective, itemsize: int) -> tuple[dict[str, _Part], int]:
    """Every network, and the peak of the steps that are no part of one."""
    first = {node.out.name: greedy.plan(node.network, request.sizes) for node in request.layer.contractions}
    program = eager(Plan(request.layer, first, request.values).bound)
    nodes = request.layer.nodes
    owner = program.owner
    values = {v.name: v for v in program.leaves} | {v.name: v for op in program.ops for v in results(op)}
    always = sum(program.bytes(v, itemsize) for v in program.leaves)
    made = {v.name for node in nodes for v in writes(node)}
    read = [{v.name for v in reads(node)} for node in nodes]
    # The coefficients live until the function that makes them returns, and every one of them is read after that.
    parts: dict[str, _Part] = {}
    for k, node in enumerate(nodes):
        if not isinstance(node, Contraction):
            continue
        later = {owner[name] for names in read[k + 1 :] for name in names} | {owner[program.output.name]}
        before = {owner[v.name] for n in nodes[:k] for v in writes(n)} & made
        besides = always + sum(program.bytes(values[name], itemsize) for name in before & later)
        dying = {name for name in read[k] if owner[name] in before - later}
        space = peak.Space(node.network, request.sizes, price, dying)
        parts[node.out.name] = _Part(space, besides, besides + itemsize * peak.least_peak(space))
    single = {node.out.name for node in nodes if not isinstance(node, Contraction)}
    rest = [step.peak for step in inference(program, itemsize) if step.step in single]
    return parts, max(rest, default=always)
