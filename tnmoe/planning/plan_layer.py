"""Planning: the calls that choose orders of contraction for a layer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tnmoe.autodiff.backward_plan import plan_function
from tnmoe.costing.backward import gradient_names
from tnmoe.costing.objective import INFERENCE, PEAK, TIME, Goal, as_objective
from tnmoe.errors import DeclarationError, PlanError, RankWarning, unknown
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.rank import excessive_ranks
from tnmoe.lowering.orient import Layout, resolve
from tnmoe.planners import pareto as front
from tnmoe.planners.effort import check_budget
from tnmoe.planners.pareto import Tradeoff
from tnmoe.planning.candidates import DeviceOrFile, fastest, least_copied
from tnmoe.planning.memory_limit import within_peak
from tnmoe.planning.plan import Plan
from tnmoe.planning.request import DEFAULT_TOKENS, PLANNERS, Planable, plan_request, planner_of, token_value
from tnmoe.planning.saved_limit import within


def plan(
    what: Planable,
    *,
    tokens: int = DEFAULT_TOKENS,
    sizes: Mapping[str, int] | None = None,
    objective: Goal = "flops",
    calls: int | None = None,
    planner: str = "auto",
    profile: DeviceOrFile | None = None,
    input_gradients: bool | Collection[str] = True,
    budget: float | None = None,
    memory: str | int | None = None,
    flavour: str = "portable",
    chunk: int | None = None,
    saved_limit: int | None = None,
    memory_limit: int | None = None,
    dtype: str = "float32",
    layout: Layout = "auto",
) -> Plan:
    """Choose the order in which every network of a layer is contracted.

    Args:
        what: a declaration such as `MuMoE(…)`, a `Layer`, or a bare `Network`.
        tokens: rows of the input (batch × sequence) to plan for; the emitted module takes any number.
        sizes: values of the declaration's symbols by name; for a bare network, of its indices.
        objective: "flops" or "macs" of the forward pass; "traffic": elements that its steps read and write; "training":
            FLOPs of forward and backward, for each operand that needs a gradient; "saved": elements kept for the
            backward pass, then FLOPs of training; "inference": FLOPs of forward passes where what weights alone make
            is made once. A mapping such as `{"training": 1, "saved": 0.5}` is a weighted sum, a sequence such as
            `("saved", "flops")` decides by the first and between its equals by the next; as text,
            "training + 0.5*saved" and "saved, flops".
            "time" and "layout" choose among the 16 orders with the fewest FLOPs: "time" by predicted time, which is a
            model and no proof, and also among 16 with the fewest where moved elements count, and among the lowerings
            of a mixture that leaves them open; "layout" the one that copies the fewest elements into another order of
            axes, of those within 1 % of the fewest FLOPs. "peak": the
            most bytes alive at once in a forward pass without autograd, over all orders and the order of their steps,
            then FLOPs; up to 9 tensors a network.
        calls: forward passes between two updates of the weights, for "inference"; None if they are never updated.
        planner: "subset_dp" (exact, up to 12 tensors), "search" (any number: greedy starts, and cotengra's if it is
            installed, improved by the exact planner), "greedy", "cotengra", "opt_einsum"; "auto" takes the exact one
            where it can, else the search.
        profile: of the device, or the file of one, for "time"; by default what `tnmoe calibrate` kept.
        input_gradients: whether the inputs need a gradient, as they do inside a model; or the names of those that do.
        budget: seconds that the search may take for each network; None for a fixed amount of work, which gives the
            same plan on every machine.
        memory: what the emitted module keeps for its backward pass. None leaves it to autograd. Else the module has a
            backward pass of its own, planned by the exact front of bytes kept against FLOPs repeated: "save" repeats
            what costs next to nothing (Hadamards, GELU), "recompute" up to 15 % of the FLOPs of training, and an
            integer is a budget in bytes (float32, at `tokens`) that is met with the fewest FLOPs.
        flavour: "portable" calls torch's public products; "fast" calls oneDNN's on float32 CPU tensors where this
            torch has them, and the public ones else; "triton" fuses products that the backward pass does not keep into
            what reads them, and calls Triton kernels on a GPU. Both need their own backward pass: `memory` is "save"
            if not given.
        chunk: tokens that the emitted function takes at once, forward and backward, which bounds its temporaries;
            `memory` is "save" if not given.
        saved_limit: elements that may be kept for the backward pass at most (`Plan.saved`), up to 9 tensors a network;
            `pareto` also says what recomputing instead would cost.
        memory_limit: bytes that may be alive at once in a forward pass without autograd, weights and inputs included
            (`tnmoe.memory(plan).inference_peak`), at `tokens`; for "flops" and "macs", up to 9 tensors a network.
        dtype: of weights and activations, for "peak" and `memory_limit`.
        layout: how weights are stored that a matrix product may read in two orders of axes (`Plan.turnable`); it
            changes no cost, but the time, where that goes into reading weights. "auto": large ones with their longer
            side last; "rows": (inner, columns); "columns": (columns, inner), as `nn.Linear` does; or the names of
            those that are (columns, inner). `tune` measures which is best.

    Raises:
        PlanError: unknown objective, planner, memory policy, flavour or layout, a network the planner cannot take, a
            budget or limit that is none or cannot be met (with the least that there is), or a layer that has no end
            with an adjoint, or cannot run in chunks.
        DeclarationError: a symbol without a value, an unknown size name, or sizes that are no sizes.
    """
    minimised = as_objective(objective, calls)
    if planner != "auto" and planner not in PLANNERS:
        raise PlanError(unknown("planner", planner, ["auto", *PLANNERS]))
    check_budget(budget)
    if profile is not None and minimised != TIME:
        raise PlanError(f"a profile goes with the objective 'time', not with {str(minimised)!r}")
    request = plan_request(what, tokens, sizes, input_gradients)
    if isinstance(layout, str):
        resolve(layout, ())  # raises before the search does its work
    for sentence in excessive_ranks(request.layer, request.sizes):
        warnings.warn(sentence, RankWarning, stacklevel=2)
    if minimised == PEAK or memory_limit is not None:
        if planner != "auto" or (saved_limit, memory, flavour, chunk) != (None, None, "portable", None):
            raise PlanError(
                "the peak of a forward pass is planned by a search of its own, for modules whose backward pass is "
                "autograd's: leave planner, saved_limit, memory, flavour and chunk out"
            )
        return within_peak(request, minimised, memory_limit, dtype).store(layout)
    if minimised.shortlisted:
        if planner != "auto":
            raise PlanError(f"the objective {str(minimised)!r} needs a search of its own; leave planner out")
        if saved_limit is not None:
            raise PlanError(f"the objective {str(minimised)!r} takes no limit; plan by a price, or measure a shortlist")
        if minimised == TIME:
            timed = fastest(request, profile, lambda planned: _with_function(planned, memory, flavour, chunk))
            return timed.store(layout)
        return _with_function(least_copied(request), memory, flavour, chunk).store(layout)
    if saved_limit is not None:
        if planner != "auto":
            raise PlanError("a limit needs a search of its own; leave planner out")
        if (memory, flavour, chunk) != (None, "portable", None):
            raise PlanError("saved_limit is for modules left to autograd; memory= sets a budget for the others")
        return within(request, minimised, saved_limit).store(layout)
    paths: dict[str, ContractionPath] = {}
    for node in request.layer.contractions:
        search, requires_grad = planner_of(planner, node.network, budget), request.requires_grad(node, minimised)
        paths[node.out.name] = search(node.network, request.sizes, minimised, requires_grad)
    planned = Plan(request.layer, paths, request.values, minimised, request.inputs)
    return _with_function(planned, memory, flavour, chunk).store(layout)


def symbol_sizes(planned: Plan) -> dict[str, int]:
    """The values of the symbols that a plan's layer leaves open, the tokens aside."""
    layer = planned.layer
    open_ = layer.free_symbols - ({layer.token_symbol} if layer.batched else set())
    return {name: size for name, size in planned.values.items() if name in open_}


def for_inference(planned: Plan) -> Plan:
    """The same layer at the same sizes, with the orders that cost least where weights stay the same.

    The plan's own orders are kept unless others do less work at each call.
    """
    layer = planned.layer
    tokens = planned.values[layer.token_symbol] if layer.batched else DEFAULT_TOKENS
    folding = plan(layer, tokens=tokens, sizes=symbol_sizes(planned), objective=INFERENCE, input_gradients=False)
    if folding.flops - folding.folding_flops < planned.flops - planned.folding_flops:
        return folding
    return replace(planned, function=None)


def _with_function(planned: Plan, memory: str | int | None, flavour: str, chunk: int | None) -> Plan:
    if (memory, flavour, chunk) == (None, "portable", None):
        return planned  # as it is: a copy would work everything out anew
    requires_grad = gradient_names(planned.bound, planned.input_gradients)
    return replace(planned, function=plan_function(planned.bound, requires_grad, memory, flavour, chunk))


def pareto(
    what: Planable,
    *,
    network: str | None = None,
    objectives: Sequence[str] = ("training", "saved"),
    tokens: int = DEFAULT_TOKENS,
    sizes: Mapping[str, int] | None = None,
    input_gradients: bool | Collection[str] = True,
    recompute: bool = True,
    saved_limit: int | None = None,
    peak_limit: int | None = None,
) -> tuple[Tradeoff, ...]:
    """All orders of one network, jointly with what to save or to recompute, that no other one beats; exact.

    Args:
        what, tokens, sizes, input_gradients: as in `plan`.
        network: name of the value that the network defines; needed if the layer has several with a choice.
        objectives: some of "flops", "training" (forward, recomputation and backward), "saved" and "peak" (elements).
        recompute: allow intermediates to be recomputed in the backward pass instead of saved.
        saved_limit, peak_limit: elements that must not be exceeded.

    Raises:
        PlanError: more than 9 tensors, an unknown objective or network, or limits that no order meets, with the
            least that there is.
        DeclarationError: as `plan`.
    """
    request = plan_request(what, tokens, sizes, input_gradients)
    layer = request.layer
    nodes = {n.out.name: n for n in layer.contractions}
    if network is None:
        chosen = [name for name, node in nodes.items() if len(node.network.tensors) > 2] or list(nodes)
        if len(chosen) > 1:
            raise PlanError(f"{layer.name} has several networks: pass network= one of {', '.join(chosen)}")
        (network,) = chosen
    if network not in nodes:
        raise PlanError(unknown("network", network, nodes))
    node = nodes[network]
    requires_grad = layer.network_gradients(node, request.inputs)
    return front.plan(
        node.network,
        request.sizes,
        [front.as_axis(objective, recompute) for objective in objectives],
        requires_grad,
        recompute=recompute,
        saved_limit=saved_limit,
        peak_limit=peak_limit,
    )


def with_tokens(planned: Plan, tokens: int) -> Plan:
    """The plan with its orders kept, at another number of tokens; what was optimal may no longer be.

    Raises:
        DeclarationError: if `tokens` is no size, or the plan is of a bare network.
    """
    if not planned.layer.batched:
        raise DeclarationError("a plan of a bare network has no tokens; plan it with other sizes")
    value = token_value(planned.layer, tokens)
    if value.items() <= planned.values.items():
        return planned
    paths = {name: replace(path, exact=False) for name, path in planned.paths.items()}
    return replace(
        planned, paths=paths, values={**planned.values, **value}, shortlist=None, saved_limit=None, memory_limit=None
    )
