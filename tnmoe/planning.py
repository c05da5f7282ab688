"""Planning: the calls that choose orders of contraction for a layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import replace

from tnmoe.dims import as_dim
from tnmoe.errors import DeclarationError, PlanError, unknown
from tnmoe.goals import Goal, as_objective, parse
from tnmoe.layer import Layer, network_layer
from tnmoe.layers import Spec
from tnmoe.network import Network
from tnmoe.path import ContractionPath
from tnmoe.plan import Plan
from tnmoe.planners import cotengra, greedy, opt_einsum, search, subset_dp
from tnmoe.planners import pareto as front
from tnmoe.planners.effort import check_budget
from tnmoe.planners.pareto import Tradeoff
from tnmoe.progress import bar

Planable = Spec | Layer | Network

PLANNERS = {
    "subset_dp": subset_dp.plan,
    "greedy": greedy.plan,
    "cotengra": cotengra.plan,
    "opt_einsum": opt_einsum.plan,
    "search": search.plan,
}

DEFAULT_TOKENS = 1024


def plan(
    what: Planable,
    *,
    tokens: int = DEFAULT_TOKENS,
    sizes: Mapping[str, int] | None = None,
    objective: Goal = "flops",
    calls: int | None = None,
    planner: str = "auto",
    input_gradients: bool | Collection[str] = True,
    budget: float | None = None,
) -> Plan:
    """Choose the order in which every network of a layer is contracted.

    Args:
        what: a declaration such as `MuMoE(…)`, a `Layer`, or a bare `Network`.
        tokens: rows of the input (batch × sequence) to plan for; the emitted module takes any number.
        sizes: values of the declaration's symbols by name; for a bare network, of its indices.
        objective: "flops" or "macs" of the forward pass; "training": FLOPs of forward and backward, for each operand
            that needs a gradient; "saved": elements kept for the backward pass, then FLOPs of training; "inference":
            FLOPs of forward passes where what weights alone make is made once. A mapping such as
            `{"training": 1, "saved": 0.5}` is a weighted sum, a sequence such as `("saved", "flops")` decides by the
            first and between its equals by the next; as text, "training + 0.5*saved" and "saved, flops".
        calls: forward passes between two updates of the weights, for "inference"; None if they are never updated.
        planner: "subset_dp" (exact, up to 12 tensors), "search" (any number: greedy starts, and cotengra's if it is
            installed, improved by the exact planner), "greedy", "cotengra", "opt_einsum"; "auto" takes the exact one
            where it can, else the search.
        input_gradients: whether the inputs need a gradient, as they do inside a model; or the names of those that do.
        budget: seconds that the search may take for each network; None for a fixed amount of work, which gives the
            same plan on every machine.

    Raises:
        PlanError: unknown objective or planner, a network the planner cannot take, or a budget that is none.
        DeclarationError: a symbol without a value, an unknown size name, or sizes that are no sizes.
    """
    goal = as_objective(objective, calls)
    if planner != "auto" and planner not in PLANNERS:
        raise PlanError(unknown("planner", planner, ["auto", *PLANNERS]))
    if sizes is not None and not isinstance(sizes, Mapping):
        raise DeclarationError(f'sizes must be a mapping such as {{"d": 768}}, got {sizes!r}')
    layer = as_layer(what, sizes)
    values = dict(layer.values)
    for name, size in (sizes or {}).items():
        dim = as_dim(size, f"sizes[{name!r}]")
        if not isinstance(dim, int):
            raise DeclarationError(f"sizes[{name!r}] must be an integer, got {size!r}")
        if name in layer.values and layer.values[name] != dim:
            raise DeclarationError(f"{name} is declared as {layer.values[name]}, but sizes says {dim}")
        if name not in layer.values and name not in layer.free_symbols:
            known = sorted(layer.free_symbols | set(layer.values))
            raise DeclarationError(f"sizes names {name!r}, which the layer has not; it has {', '.join(known)}")
        values[name] = dim
    if layer.batched:
        values.update(_tokens(layer, tokens))
    unset = sorted(layer.free_symbols - set(values))
    if unset:
        wanted = ", ".join(f'"{name}": …' for name in unset)
        raise DeclarationError(f"{layer.name} has sizes without a value: pass sizes={{{wanted}}}")
    bound = layer.bound_sizes(values)
    chosen = _input_gradients(layer, input_gradients)
    paths: dict[str, ContractionPath] = {}
    for node in layer.contractions:
        needing = layer.network_gradients(node, chosen) if parse(goal).of_training else frozenset()
        paths[node.out.name] = _path(planner, node.network, bound, goal, needing, budget)
    return Plan(layer, paths, values, goal, chosen)


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
    planned = plan(what, tokens=tokens, sizes=sizes, planner="greedy", input_gradients=input_gradients)
    layer = planned.layer
    nodes = {n.out.name: n for n in layer.contractions}
    if network is None:
        chosen = [name for name, node in nodes.items() if len(node.network.tensors) > 2] or list(nodes)
        if len(chosen) > 1:
            raise PlanError(f"{layer.name} has several networks: pass network= one of {', '.join(chosen)}")
        (network,) = chosen
    if network not in nodes:
        raise PlanError(unknown("network", network, nodes))
    node = nodes[network]
    needing = layer.network_gradients(node, planned.input_gradients)
    return front.plan(
        node.network,
        layer.bound_sizes(planned.values),
        objectives,
        needing,
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
    value = _tokens(planned.layer, tokens)
    if value.items() <= planned.values.items():
        return planned
    paths = {name: replace(path, exact=False) for name, path in planned.paths.items()}
    return replace(planned, paths=paths, values={**planned.values, **value})


def _input_gradients(layer: Layer, wanted: object) -> tuple[str, ...]:
    names = [v.name for v in layer.inputs]
    if isinstance(wanted, bool):
        return tuple(names) if wanted else ()
    given = wanted.split() if isinstance(wanted, str) else wanted
    if not isinstance(given, Collection) or not all(name in names for name in given):
        raise DeclarationError(f"input_gradients must be true, false or some of {', '.join(names)}; got {wanted!r}")
    return tuple(name for name in names if name in given)


def as_layer(what: Planable, sizes: Mapping[str, int] | None = None) -> Layer:
    """The layer that a declaration or network stands for; a layer is one already."""
    if isinstance(what, Layer):
        return what
    if isinstance(what, Network):
        given = {k: as_dim(v, f"sizes[{k!r}]") for k, v in (sizes or {}).items()}
        return network_layer(what, given)
    if isinstance(what, Spec):
        return what.layer()
    raise DeclarationError(f"expected a layer declaration, a Layer or a Network, got {type(what).__name__}: {what!r}")


def _tokens(layer: Layer, tokens: object) -> dict[str, int]:
    """The value of the token symbol (`T`, unless the declaration uses that name itself)."""
    dim = as_dim(tokens, "tokens")
    if not isinstance(dim, int):
        raise DeclarationError(f"tokens must be an integer, got {tokens!r}; formulas keep the symbol by themselves")
    return {layer.token_symbol: dim}


def _path(
    name: str, network: Network, sizes: Mapping[str, int], goal: str, needing: Set[str], budget: float | None
) -> ContractionPath:
    check_budget(budget)
    if name == "auto":
        name = "subset_dp" if len(network.tensors) <= subset_dp.MAX_TENSORS else "search"
    if name != "search":
        return PLANNERS[name](network, sizes, goal, needing)
    with bar(f"planning {len(network.tensors)} tensors") as progress:
        return search.plan(network, sizes, goal, needing, budget=budget, progress=progress)
