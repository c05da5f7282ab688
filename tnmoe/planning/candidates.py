"""Candidates: the cheapest orders of a whole layer, to be told apart by their programs, or measured."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

from tnmoe.costing.objective import FLOPS, LAYOUT, TIME, TRAINING, Goal, Objective, Term, as_objective
from tnmoe.errors import FileError, PlanError, TnmoeError
from tnmoe.ir.layer import Layer
from tnmoe.ir.path import ContractionPath
from tnmoe.layers.kinds import declare
from tnmoe.planners import ranked
from tnmoe.planning.plan import Plan
from tnmoe.planning.request import DEFAULT_TOKENS, Planable, PlanRequest, plan_request, planner_of
from tnmoe.planning.shortlist import TOLERANCE, CandidateFigures, Shortlist
from tnmoe.timing.device import Device
from tnmoe.timing.device_profile import DeviceProfile, default_path, load_cached
from tnmoe.timing.predict import predict

DeviceOrFile = Device | str | os.PathLike[str]
"""A device, or the file of a calibration."""

Emitted = Callable[[Plan], Plan]
"""A plan with the function that its module shall have."""

COUNT = 16
"""How many orders "layout" chooses among; "time" among these and as many more, the cheapest as `BALANCE` counts."""

BALANCE = 80
"""FLOPs that take as long as reading or writing an element, by which orders are found that move less; measured, see
docs/decisions/moved-elements.md."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the cheapest orders, to be measured.

    Attributes:
        plan: the order as a plan; it can be built.
        seconds: predicted time of one forward pass, None without a profile.
    """

    plan: Plan
    seconds: float | None = None


def shortlist(
    what: Planable,
    *,
    count: int = COUNT,
    tokens: int = DEFAULT_TOKENS,
    sizes: Mapping[str, int] | None = None,
    objective: Goal = "flops",
    calls: int | None = None,
    profile: DeviceOrFile | None = None,
    input_gradients: bool | Collection[str] = True,
) -> tuple[Candidate, ...]:
    """The cheapest orders of a layer, the cheapest first: what to measure, where near-ties matter.

    Args:
        what, tokens, sizes, calls, input_gradients: as in `plan`.
        count: how many at most; orders that differ in the operands' places alone are one. A network of more than 10
            tensors, which cannot be ranked, takes part with one order.
        objective: what they are the cheapest by; as in `plan`, but for "time" and "layout".
        profile: of a device, or the file of one; then each candidate's time is predicted, in float32 if it has that.

    Raises:
        PlanError: a faulty count or objective.
        CostError: a layer without a time model, if there is a profile.
        FileError, DeclarationError: as `plan`.
    """
    price = as_objective(objective, calls)
    if price.shortlisted:
        raise PlanError(
            f"{str(price)!r} chooses from a shortlist; the shortlist itself is made by FLOPs or another price"
        )
    _check_count(count)
    request = plan_request(what, tokens, sizes, input_gradients)
    plans = [plan for _, plan in cheapest(request, price, count)]
    device = None if profile is None else _device(profile)
    return tuple(Candidate(p, None if device is None else _seconds(p, device)) for p in plans)


def diverse(
    what: Planable,
    *,
    count: int,
    training: bool,
    tokens: int = DEFAULT_TOKENS,
    sizes: Mapping[str, int] | None = None,
    input_gradients: bool | Collection[str] = True,
) -> list[Plan]:
    """The cheapest orders by FLOPs, and between them the cheapest where each moved element counts too (`BALANCE`).

    Args:
        what, tokens, sizes, input_gradients: as in `plan`.
        count: how many at most; each order is there once, the one with the fewest FLOPs first.
        training: whether they are the cheapest forward and backward, instead of forward alone.

    Raises:
        PlanError, FileError, DeclarationError: as `shortlist`.
    """
    _check_count(count)
    return _mixed(plan_request(what, tokens, sizes, input_gradients), count, training=training)[:count]


def _check_count(count: object) -> None:
    if type(count) is not int or not 1 <= count <= 1000:
        raise PlanError(f"count must be an integer from 1 to 1000, got {count!r}")


def _mixed(request: PlanRequest, count: int, *, training: bool) -> list[Plan]:
    """`count` orders by FLOPs and as many where moved elements count, in turns; an order that is among both is once."""
    # What a forward pass moves counts three times in training: either gradient of a product moves about as much.
    flops, moved = (TRAINING, 3 * BALANCE) if training else (FLOPS, BALANCE)
    balanced = Objective(((*flops.levels[0], Term("traffic", Fraction(moved))),))
    mixed: dict[str, Plan] = {}
    for pair in zip_longest(cheapest(request, flops, count), cheapest(request, balanced, count)):
        for _, plan in filter(None, pair):
            mixed.setdefault(str(plan.orders), plan)
    return list(mixed.values())


def cheapest(request: PlanRequest, objective: Objective, count: int) -> list[tuple[int, Plan]]:
    """The `count` cheapest combinations of the orders of all networks, with the price of each."""
    joint: list[tuple[int, dict[str, ContractionPath]]] = [(0, {})]
    for node in request.layer.contractions:
        requires_grad, network = request.requires_grad(node, objective), node.network
        if len(network.tensors) <= ranked.MAX_TENSORS:
            orders = ranked.plan(network, request.sizes, objective, requires_grad, count)
        else:
            path = planner_of("auto", network)(network, request.sizes, objective, requires_grad)
            orders = (ranked.Ranked(0, path),)
        further = [(price + o.price, {**paths, node.out.name: o.path}) for price, paths in joint for o in orders]
        joint = heapq.nsmallest(count, further, key=lambda pair: pair[0])
    return [(price, Plan(request.layer, paths, request.values, objective, request.inputs)) for price, paths in joint]


def request_of(planned: Plan) -> PlanRequest:
    """What would have to be asked for another plan of the same layer, at the same sizes."""
    sizes = planned.layer.bound_sizes(planned.values)
    return PlanRequest(planned.layer, planned.values, sizes, planned.input_gradients)


def lowered(request: PlanRequest) -> dict[str, PlanRequest]:
    """The request for each program that the layer's declaration leaves to choose from; "" if it leaves none."""
    layers = {name: declare(text) for name, text in request.layer.lowerings.items()} or {"": request.layer}
    return {name: _request_for(layer, request) for name, layer in layers.items()}


def _request_for(layer: Layer, request: PlanRequest) -> PlanRequest:
    values = {name: request.values[name] for name in layer.free_symbols | set(layer.values)}
    return replace(request, layer=layer, values=values, sizes=layer.bound_sizes(values))


def other_lowerings(planned: Plan) -> tuple[Plan, ...]:
    """The layer of a plan in the other programs that its declaration leaves to choose from, to be measured.

    Each with the orders that take the fewest FLOPs; none if the declaration says which program it wants.
    """
    requests = lowered(request_of(planned))
    plans = [cheapest(request, FLOPS, 1)[0][1] for name, request in requests.items() if name]
    return tuple(p for p in plans if p.bound.ops != planned.bound.ops)


def fastest(request: PlanRequest, profile: DeviceOrFile | None, emitted: Emitted) -> Plan:
    """Of the cheapest orders the one with the least predicted time.

    `emitted` gives a plan the function that its module shall have, which the time depends on.
    """
    device = _device(profile)
    named = [
        (name, emitted(plan))
        for name, each in lowered(request).items()
        for plan in sorted(_mixed(each, COUNT, training=False), key=lambda plan: plan.flops)
    ]
    predicted = [_seconds(plan, device) for _, plan in named]
    chosen = predicted.index(min(predicted))
    figures = tuple(
        CandidateFigures(plan.orders, plan.flops, plan.copied, seconds, name)
        for (name, plan), seconds in zip(named, predicted, strict=True)
    )
    source = f"{device.name}, {device.source}, {device.dtypes[0]}"
    return _chosen(named[chosen][1], TIME, Shortlist("time", figures, chosen, source=source))


def least_copied(request: PlanRequest) -> Plan:
    """Of the orders within `TOLERANCE` of the fewest FLOPs the one that copies the fewest elements."""
    ranking = cheapest(request, FLOPS, COUNT)
    least, most = ranking[0][0], TOLERANCE * ranking[0][1].flops
    plans = [plan for price, plan in ranking if price - least <= most]
    ranks_all = all(len(n.network.tensors) <= ranked.MAX_TENSORS for n in request.layer.contractions)
    complete = ranks_all and (len(plans) < len(ranking) or len(ranking) < COUNT)
    figures = tuple(CandidateFigures(plan.orders, plan.flops, plan.copied) for plan in plans)
    chosen = min(range(len(plans)), key=lambda k: (plans[k].copied, k))
    return _chosen(plans[chosen], LAYOUT, Shortlist("layout", figures, chosen, complete))


def _chosen(plan: Plan, objective: Objective, shortlist: Shortlist) -> Plan:
    paths = {name: replace(path, exact=shortlist.complete) for name, path in plan.paths.items()}
    return replace(plan, paths=paths, minimised=objective, shortlist=shortlist)


def _device(given: DeviceOrFile | None) -> Device:
    """A device, the profile of a file, or the one that the last calibration kept."""
    if given is None:
        if (cached := load_cached()) is None:
            raise PlanError(f"no device profile at {default_path()}: run `tnmoe calibrate`, or pass profile=")
        return cached
    if isinstance(given, Device):
        return given
    try:
        return DeviceProfile.from_json(Path(given).read_text(encoding="utf-8"))
    except TnmoeError as error:
        raise type(error)(f"{given}: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise FileError(f"profile {given} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _seconds(planned: Plan, device: Device) -> float:
    own, flavour = planned.adjoint, planned.flavour
    return predict(planned.executed, device, device.dtypes[0], adjoint=own, flavour=flavour).seconds
