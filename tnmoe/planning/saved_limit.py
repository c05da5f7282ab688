"""Planning under a hard limit on what is kept for the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from tnmoe.costing.objective import SAVED, Objective
from tnmoe.costing.prices import Prices
from tnmoe.errors import PlanError
from tnmoe.ir.path import ContractionPath
from tnmoe.lowering.lower import lower_network
from tnmoe.planners import pareto
from tnmoe.planning.candidates import cheapest
from tnmoe.planning.plan import Plan
from tnmoe.planning.request import PlanRequest

MORE = 256
"""Orders with the fewest saved elements that are tried where those of the front keep too much."""


def within(request: PlanRequest, objective: Objective, saved_limit: object) -> Plan:
    """The cheapest plan that keeps no more than `saved_limit` elements, as `Plan.saved` counts them.

    Of every network the front of price and saved elements is searched exactly; their combinations are tried from the
    cheapest on, and each is counted on its program. What the rest of the layer keeps is the same for all of them,
    unless they read other results of it, or copy what is kept: only where it is the same is the plan called optimal,
    and where none of them fits the limit, the orders that save the fewest elements are tried as well.

    Raises:
        PlanError: a faulty limit, one that no order keeps, or a network of more than 9 tensors.
    """
    if type(saved_limit) is not int or saved_limit < 0:
        raise PlanError(f"saved_limit must be a number of elements, 0 or more; got {saved_limit!r}")
    besides: set[int] = set()
    least: int | None = None
    for paths, inside in _combinations(request, objective):
        plan = Plan(request.layer, paths, request.values, objective, request.inputs)
        saved = plan.saved
        besides.add(saved - inside)
        if saved <= saved_limit:
            exact = len(besides) == 1
            proven = {name: replace(path, exact=exact) for name, path in paths.items()}
            return replace(plan, paths=proven, saved_limit=saved_limit)
        least = saved if least is None else min(least, saved)
    assert least is not None
    more = [plan for _, plan in cheapest(request, SAVED, MORE)]
    fitting = [plan for plan in more if plan.saved <= saved_limit]
    if fitting:
        best = min(fitting, key=lambda plan: _price(request, objective, plan.paths))
        paths = {name: replace(path, exact=False) for name, path in best.paths.items()}
        return replace(best, paths=paths, minimised=objective, saved_limit=saved_limit)
    least = min(least, *(plan.saved for plan in more))
    known = "least" if len(more) < MORE or len(besides) == 1 else "least that was found"
    raise PlanError(f"no order keeps {saved_limit:,} elements or fewer for the backward pass; the {known} is {least:,}")


def _combinations(request: PlanRequest, objective: Objective) -> list[tuple[dict[str, ContractionPath], int]]:
    """Orders of all networks that are on the fronts, with what they save inside the networks, the cheapest first."""
    price = objective.with_ties  # a front takes "saved" for the elements alone
    fronts = []
    for node in request.layer.contractions:
        requires_grad = request.layer.network_gradients(node, request.inputs)
        points = pareto.plan(node.network, request.sizes, (price, "saved"), requires_grad, recompute=False)
        fronts.append([(node.out.name, point) for point in points])
    combinations = []
    for combination in itertools.product(*fronts):
        prices, saved = (sum(p.values[o] for _, p in combination) for o in (str(price), "saved"))
        combinations.append((prices, saved, {name: p.path for name, p in combination}))
    combinations.sort(key=lambda entry: entry[:2])
    return [(paths, saved) for _, saved, paths in combinations]


def _price(request: PlanRequest, objective: Objective, paths: Mapping[str, ContractionPath]) -> int:
    total = 0
    for node in request.layer.contractions:
        prices = Prices(node.network, request.sizes, objective, request.requires_grad(node, objective))
        total += prices.of(lower_network(node, paths[node.out.name]))
    return total
