"""Why a plan is as it is, in sentences: what dominates, how close the next order is, and when it would change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from tnmoe.analysis import advice
from tnmoe.costing.objective import Objective
from tnmoe.costing.prices import Prices, amounts, forward_price
from tnmoe.errors import PlanError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.layer import Contraction
from tnmoe.ir.network import note
from tnmoe.ir.path import ContractionPath
from tnmoe.lowering.lower import lower_network
from tnmoe.planners import peak, ranked, subset_dp
from tnmoe.planning.plan import Plan
from tnmoe.render.table import grouped

MOST_TOKENS = 1 << 40
"""Where "any number of tokens" ends."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The token counts at which one order stays the cheapest, at all other sizes as planned.

    Attributes:
        low, high: exact ends; at an end two orders cost the same. `low` is 1 and `high` is None where there is none.
        below, above: the order that takes over there.
    """

    low: Fraction
    high: Fraction | None
    below: ContractionPath | None
    above: ContractionPath | None


def token_range(plan: Plan, name: str) -> TokenRange:
    """Within which token counts the order of the network `name` stays optimal.

    Every order's price is affine in the tokens, so the optimum is the lower envelope of lines. From far away, the
    best order's line is intersected with the plan's, and again at the intersection, until nothing is below it.

    Args:
        plan: of a batched layer, its order of `name` exact under the objective.
        name: of the value that the network defines.

    Raises:
        PlanError: if the plan has no tokens, or the order is not proven optimal.
    """
    if not plan.layer.batched:
        raise PlanError("a plan of a bare network has no tokens")
    limited = plan.saved_limit is not None or plan.paths[name].planner == peak.NAME
    if not plan.paths[name].exact or plan.minimised.whole is not None or limited:
        raise PlanError(f"the order of {name!r} is not proven optimal, so there is no range in which it is")
    node = _node(plan, name)
    tokens = plan.values[plan.layer.token_symbol]
    path = plan.paths[name]
    at_one, slope = _line(plan, node, path)
    ends: list[tuple[Fraction, ContractionPath] | None] = []
    for far in (1, MOST_TOKENS):
        here, taker = Fraction(far), None
        while True:
            best = _best(plan, node, here)
            start, rise = _line(plan, node, best)
            if start + rise * (here - 1) >= at_one + slope * (here - 1):
                break
            # The lines cross between `here`, where the other is below, and the planned tokens, where it is not.
            here = 1 + Fraction(start - at_one, slope - rise)
            taker = best
        ends.append((here, taker) if taker is not None else None)
    below, above = ends
    assert below is None or below[0] <= tokens
    return TokenRange(
        low=below[0] if below else Fraction(1),
        high=above[0] if above else None,
        below=below[1] if below else None,
        above=above[1] if above else None,
    )


def explain(plan: Plan) -> str:
    """Sentences on each network that leaves a choice, on lowerings, on what the passes changed, and on what is copied.

    For each: its order, the dominant step, the runner-up, the tokens at which another order takes over, what weights
    alone make or from when on that would pay, and what could be recomputed instead of saved.
    """
    chapters = [_chapter(plan, node) for node in plan.layer.contractions if len(node.network.tensors) > 2]
    if not chapters:
        chapters = [f"{plan.layer.name}: every network has at most two tensors, so there is only one order."]
    return "\n\n".join([*chapters, *filter(None, (_lowerings(plan), advice.rewrites(plan), advice.copies(plan)))])


def _lowerings(plan: Plan) -> str:
    """Which programs of a routed layer were compared, with predicted times, or why one alone was looked at."""
    layer, shortlist = plan.layer, plan.shortlist
    if shortlist is not None and len(shortlist.lowerings) > 1:
        chosen = shortlist.considered[shortlist.chosen].lowering
        least = {
            name: min(c.seconds for c in shortlist.considered if c.lowering == name and c.seconds is not None)
            for name in shortlist.lowerings
        }
        times = ", ".join(f"{name} {1e6 * seconds:,.1f} µs" for name, seconds in least.items())
        return (
            f"Lowerings: {len(least)} were compared by the least predicted time of their orders: {times}; the {chosen} "
            f"one was chosen. The times are a model ({shortlist.source})."
        )
    if layer.lowerings:
        return (
            f"Lowerings: {' and '.join(layer.lowerings)} compute the same; {plan.objective!r} knows no time "
            "of a program, so the gathered one, which runs the chosen experts alone, was taken without a look at the "
            'other. "time" compares them, and `tune` measures.'
        )
    return f"Lowerings: one alone was looked at, for {layer.only_lowering}." if layer.only_lowering else ""


def _chapter(plan: Plan, node: Contraction) -> str:
    path = plan.paths[node.out.name]
    names = [t.name for t in node.network.tensors]
    sentences = [f"{node.out.name} = {path.tree(names)}."]
    if disconnected := note(node.network):
        sentences.append(disconnected)
    sentences.append(_dominant(plan, node, path))
    if len(names) <= ranked.MAX_TENSORS:
        sentences.append(_runner_up(plan, node, path, names))
    else:
        sentences.append(f"With {len(names)} tensors the runner-up is not searched.")
    if path.planner == peak.NAME:
        sentences.append(
            "It was searched for the memory of a forward pass: cheaper orders, if there are any, hold more at once."
        )
    elif plan.layer.batched and path.exact and plan.shortlist is None and plan.saved_limit is None:
        sentences.append(_tokens(plan, node, names))
    sentences += [said for said in (advice.folds(plan, node, names), advice.recomputations(plan, node)) if said]
    return "\n  ".join(sentences)


def _dominant(plan: Plan, node: Contraction, path: ContractionPath) -> str:
    which = plan.minimised.forward or "flops"
    ops = lower_network(node, path)
    prices = [forward_price((op,), _sizes(plan), which) for op in ops]
    total, most = sum(prices), max(prices)
    op = ops[prices.index(most)]
    what = {"macs": "MACs", "flops": "FLOPs"}.get(str(plan.minimised.of_steps), "FLOPs of the forward pass")
    size = elements(op.out.indices, plan.bound.sizes)
    return (
        f"The step that makes {op.out.name}[{' '.join(op.out.indices)}] ({grouped(int(size))} elements) takes "
        f"{100 * most / total:.0f} % of the {grouped(total)} {what}."
    )


def _runner_up(plan: Plan, node: Contraction, path: ContractionPath, names: list[str]) -> str:
    first, *others = ranked.plan(
        node.network, _sizes(plan), _price(plan), _requires_grad(plan, node), count=8 if len(names) < 8 else 3
    )
    equal = sum(o.price == first.price for o in others)
    worse = next((o for o in others if o.price > first.price), None)
    said = f"{equal} other order(s) cost the same. " if equal else ""
    chosen = _whole_price(plan, node, path)
    if chosen > first.price:
        said += f"It is not the best: it costs {_more(plan, chosen, first.price)} than {first.path.tree(names)}. "
    if worse is None:
        return said + "The search for the next best one ended there." if said else "It is the only order."
    return said + f"The next best order, {worse.path.tree(names)}, costs {_more(plan, worse.price, first.price)}."


def _more(plan: Plan, price: int, best: int) -> str:
    """How much more than `best`, in the first criterion that differs."""
    pairs = zip(amounts(price, _price(plan)), amounts(best, _price(plan)), strict=True)
    k, (more, less) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
    where = f" (in criterion {k + 1}, {', '.join(t.name for t, _ in _price(plan).criteria[k])})" if k else ""
    if not less:
        return f"{float(more):,.6g} more, where it costs none{where}"
    ratio = more / less
    if ratio >= Fraction(11, 10):
        return f"{float(ratio):.3g} times as much{where}"
    return f"{float(100 * (ratio - 1)):.2g} % more{where}"


def _tokens(plan: Plan, node: Contraction, names: list[str]) -> str:
    span = token_range(plan, node.out.name)
    if span.above is None and span.below is None:
        return "The order is the same for any number of tokens."
    parts = []
    if span.below is not None:
        parts.append(f"below {_decimal(span.low)} tokens {span.below.tree(names)}")
    if span.above is not None and span.high is not None:
        parts.append(f"above {_decimal(span.high)} tokens {span.above.tree(names)}")
    return f"The choice depends on the batch: {'; '.join(parts)} would be cheaper."


def _decimal(number: Fraction) -> str:
    return grouped(int(number)) if number.denominator == 1 else f"{float(number):,.1f}"


def _node(plan: Plan, name: str) -> Contraction:
    for node in plan.layer.contractions:
        if node.out.name == name:
            return node
    raise PlanError(f"the plan has no network {name!r}; it has {', '.join(plan.paths)}")


def _price(plan: Plan) -> Objective:
    return plan.minimised.of_steps


def _sizes(plan: Plan, tokens: int | None = None) -> dict[str, int]:
    own = {} if tokens is None else {plan.layer.token_symbol: tokens}
    return plan.layer.bound_sizes({**plan.values, **own})


def _requires_grad(plan: Plan, node: Contraction) -> frozenset[str]:
    if not _price(plan).of_training:
        return frozenset()
    return plan.layer.network_gradients(node, plan.input_gradients)


def _whole_price(plan: Plan, node: Contraction, path: ContractionPath, tokens: int | None = None) -> int:
    return Prices(node.network, _sizes(plan, tokens), _price(plan), _requires_grad(plan, node)).of(
        lower_network(node, path)
    )


def _line(plan: Plan, node: Contraction, path: ContractionPath) -> tuple[int, int]:
    """Price at one token, and its rise with each further one."""
    at_one, at_two = (_whole_price(plan, node, path, tokens) for tokens in (1, 2))
    return at_one, at_two - at_one


def _best(plan: Plan, node: Contraction, tokens: Fraction) -> ContractionPath:
    """The best order at a token count. Where that is a fraction, the best of those of the integers beside it.

    An order that is best only strictly between two integers is never best for any number of tokens.
    """

    def at(path: ContractionPath) -> Fraction:
        start, rise = _line(plan, node, path)
        return start + rise * (tokens - 1)

    beside = {math.floor(tokens), math.ceil(tokens)}
    requires_grad = _requires_grad(plan, node)
    return min(
        (subset_dp.plan(node.network, _sizes(plan, t), _price(plan), requires_grad) for t in sorted(beside)), key=at
    )
