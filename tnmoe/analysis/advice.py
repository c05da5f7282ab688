"""What else could be done with a plan, in sentences: fold weights, recompute instead of saving, avoid copies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from tnmoe.costing.objective import FLOPS, INFERENCE, Objective, Term
from tnmoe.costing.prices import Prices
from tnmoe.ir.contractions import ContractAdd, Permute
from tnmoe.ir.dataflow import elements
from tnmoe.ir.layer import Contraction
from tnmoe.ir.network import Network
from tnmoe.ir.ops import results
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role, Value
from tnmoe.lowering.lower import lower_network, stages
from tnmoe.planners import pareto, subset_dp
from tnmoe.planning.candidates import least_copied, request_of
from tnmoe.planning.plan import Plan
from tnmoe.render.table import grouped

MOST_CALLS = 1 << 40
"""Where "however rarely the weights change" ends."""

LARGEST_FRONT = 6
"""Tensors of the largest network whose recomputations are searched for an explanation: that takes a second."""


@dataclass(frozen=True, slots=True)
class Folding:
    """When it pays to make products of weights alone once for several calls.

    Attributes:
        calls: forward passes between two updates of the weights from which it pays, exactly: there both cost the same.
        path: the order that then takes over.
        once: its FLOPs for what weights alone make.
        each: its FLOPs for each call.
        unfolded: FLOPs of each call in the best order without.
    """

    calls: Fraction
    path: ContractionPath
    once: int
    each: int
    unfolded: int


def folding(network: Network, sizes: dict[str, int]) -> Folding | None:
    """The threshold of folding, or None: it never pays, or it pays within a single call already.

    The FLOPs of an order in so many calls lie on a line, `once + each · calls`. Orders without folding have no `once`,
    so the lowest of them is one line through 0; from far away, the best order's line is crossed with it, again at the
    crossing, until nothing is below.

    Args:
        network: up to 12 tensors.
        sizes: an integer for every index.
    """
    single = subset_dp.plan(network, sizes, INFERENCE.with_calls(1))
    once, unfolded = _work(network, sizes, single)
    if once:
        return None
    best: Folding | None = None
    calls = Fraction(MOST_CALLS)
    while calls > 1:
        # once + each · calls, by an objective that takes a fraction: FLOPs are once + each, inference alone is each.
        path = subset_dp.plan(network, sizes, Objective(((Term("flops"), Term("inference", calls - 1)),)))
        once, each = _work(network, sizes, path)
        if once + each * calls >= unfolded * calls:
            break
        calls = Fraction(once, unfolded - each)
        best = Folding(calls, path, once, each, unfolded)
    return None if best is None or best.calls <= 1 else best


def _work(network: Network, sizes: dict[str, int], path: ContractionPath) -> tuple[int, int]:
    """FLOPs once and of each call."""
    ops = lower_network(Contraction(Value("__result", network.output), network), path)
    each, one = (Prices(network, sizes, INFERENCE.with_calls(calls)).of(ops) for calls in (2, 1))
    return 2 * one - each, each - one


def folds(plan: Plan, node: Contraction, names: list[str]) -> str:
    """What weights alone make in the order of a network, or from when on that would pay."""
    network, sizes = node.network, plan.layer.bound_sizes(plan.values)
    roles = {t.role for t in network.tensors}
    if Role.DATA not in roles or len(roles - {Role.DATA}) == 0 or len(names) > subset_dp.MAX_TENSORS:
        return ""
    once, each = _work(network, sizes, plan.paths[node.out.name])
    if once:
        own = {op.out.name for op in lower_network(node, plan.paths[node.out.name])}
        fixed = own & plan.program.weight_only
        made = ", ".join(op.out.name for op in plan.program.ops if op.out.name in fixed)
        return (
            f"Weights alone make {made}: {grouped(once)} FLOPs that need not be spent at each call while the weights "
            f"stay the same, besides {grouped(each)} that must."
        )
    fold = folding(network, sizes)
    if fold is None:
        return "No product of weights alone pays, however rarely they change."
    calls = math.floor(fold.calls) + 1
    when = f"{grouped(calls)} calls"
    if plan.layer.batched:
        tokens = fold.calls * plan.values[plan.layer.token_symbol]
        when = f"{float(tokens):,.1f} tokens"
    return (
        f"If weights are updated less often than every {when}, folding pays: {fold.path.tree(names)} takes "
        f"{grouped(fold.once)} FLOPs once and then {grouped(fold.each)} instead of {grouped(fold.unfolded)} a call."
    )


def recomputations(plan: Plan, node: Contraction) -> str:
    """What could be recomputed in the backward pass instead of saved, at what price."""
    requires_grad = plan.layer.network_gradients(node, plan.input_gradients)
    if not requires_grad or "inference" in plan.minimised.names or len(node.network.tensors) > LARGEST_FRONT:
        return ""
    sizes = plan.layer.bound_sizes(plan.values)
    points = pareto.plan(node.network, sizes, ("training", "saved"), requires_grad)
    first = points[0]
    if first.values["saved"] == 0:
        return "Trained at the least cost, nothing is saved between the steps."
    offers = []
    for point in points[1:]:
        if point.recomputed:
            what = ", ".join(f"({' · '.join(part)})" for part in point.recomputed)
            more = Fraction(point.values["training"], first.values["training"]) - 1
            rest = grouped(point.values["saved"])
            offers.append(f"{rest} by recomputing {what} at {float(100 * more):.2g} % more FLOPs")
    said = f"Trained at the least cost, {grouped(first.values['saved'])} elements are saved between the steps"
    return f"{said}; or {'; '.join(offers[:3])}." if offers else f"{said}; no recomputation saves any of them."


def copies(plan: Plan) -> str:
    """What is copied into another order of axes, what another order would copy, and which weights are stored anew."""
    declared = {p.name: p.indices for p in plan.layer.parameters}
    stored = [f"{p.name}[{' '.join(p.indices)}]" for p in plan.program.parameters if p.indices != declared[p.name]]
    moved = f" Weights stored in another order of axes than declared, so that no step copies them: {', '.join(stored)}."
    permuted = [op for op in plan.bound.ops if isinstance(op, Permute)]
    if not permuted:
        return "Nothing is copied into another order of axes." + (moved if stored else "")
    what = ", ".join(
        f"{op.x.name} to [{' '.join(op.out.indices)}] ({grouped(int(elements(op.out.indices, plan.bound.sizes)))})"
        for op in permuted
    )
    said = f"{grouped(plan.copied)} elements are copied into another order of axes: {what}."
    if plan.minimised.of_steps == FLOPS and plan.shortlist is None:
        other = least_copied(request_of(plan))
        if other.copied < plan.copied:
            more = Fraction(other.flops, plan.flops) - 1
            said += f" The objective 'layout' finds {grouped(other.copied)} at {float(100 * more):.2g} % more FLOPs."
    return said + (moved if stored else "")


def rewrites(plan: Plan) -> str:
    """What the passes between the order of contraction and the emitted statements changed."""
    sizes = plan.layer.bound_sizes(plan.values)
    after = dict(stages(plan.layer, plan.paths, sizes, plan.turned))
    made = {name: {v.name for op in program.ops for v in results(op)} for name, program in after.items()}
    said = []
    if repeated := sorted(made["lowered"] - made["share"]):
        said.append(f"Computed once, since an earlier step makes the same: {', '.join(repeated)}.")
    if wasted := sorted(made["share"] - made["prune"]):
        said.append(f"Left out, since it changes nothing or nothing reads it: {', '.join(wasted)}.")
    if fused := [op.out.name for op in after["fuse_bias"].ops if isinstance(op, ContractAdd)]:
        said.append(f"Biases added inside their matrix products: {', '.join(fused)}.")
    before = {p.name: p.indices for p in after["assign_layouts"].parameters}
    turned = [p.name for p in after["orient"].parameters if p.indices != before[p.name]]
    if turned:
        said.append(f"Stored with the longer side last, which few rows read faster: {', '.join(turned)}.")
    return "\n".join(said)
