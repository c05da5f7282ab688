"""What planning is asked: a layer, a value for each of its symbols, and which inputs need a gradient; and of whom."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tnmoe.costing.objective import Objective
from tnmoe.errors import DeclarationError
from tnmoe.io.progress import bar
from tnmoe.ir.layer import Contraction, Layer, network_layer
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.layers.kinds import Spec
from tnmoe.planners import cotengra, greedy, opt_einsum, search, subset_dp
from tnmoe.symbolic.dims import as_dim

Planable = Spec | Layer | Network


class Planner(Protocol):
    """An algorithm that orders contractions: from a network and an integer for each of its indices to a path."""

    def __call__(
        self, network: Network, sizes: Mapping[str, int], objective: Objective, requires_grad: Set[str], /
    ) -> ContractionPath:
        """The order; `requires_grad` names the tensors that need a gradient, if the objective is about training."""


PLANNERS: dict[str, Planner] = {
    "subset_dp": subset_dp.plan,
    "greedy": greedy.plan,
    "cotengra": cotengra.plan,
    "opt_einsum": opt_einsum.plan,
    "search": search.plan,
}

DEFAULT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A layer, with everything that planning it depends on besides the objective."""

    layer: Layer
    values: Mapping[str, int]
    sizes: Mapping[str, int]
    inputs: tuple[str, ...]

    def requires_grad(self, node: Contraction, objective: Objective) -> frozenset[str]:
        """Names of the tensors of a network that need a gradient, if the objective is about training."""
        return self.layer.network_gradients(node, self.inputs) if objective.of_training else frozenset()


def plan_request(
    what: Planable, tokens: int, sizes: Mapping[str, int] | None, input_gradients: bool | Collection[str]
) -> PlanRequest:
    """Check what `plan` was given, and bind every size.

    Raises:
        DeclarationError: a symbol without a value, an unknown size name, or sizes that are no sizes.
    """
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
        values.update(token_value(layer, tokens))
    unset = sorted(layer.free_symbols - set(values))
    if unset:
        wanted = ", ".join(f'"{name}": …' for name in unset)
        raise DeclarationError(f"{layer.name} has sizes without a value: pass sizes={{{wanted}}}")
    return PlanRequest(layer, values, layer.bound_sizes(values), _input_gradients(layer, input_gradients))


def _input_gradients(layer: Layer, wanted: object) -> tuple[str, ...]:
    names = [v.name for v in layer.inputs]
    if isinstance(wanted, bool):
        return tuple(names) if wanted else ()
    given = wanted.split() if isinstance(wanted, str) else wanted
    if not isinstance(given, Collection) or not all(name in names for name in given):
        raise DeclarationError(f"input_gradients must be true, false or some of {', '.join(names)}; got {wanted!r}")
    return tuple(name for name in names if name in given)


def as_layer(what: Planable, sizes: Mapping[str, int] | None = None) -> Layer:
    """The layer of a declaration or of a bare network."""
    if isinstance(what, Layer):
        return what
    if isinstance(what, Network):
        given = {k: as_dim(v, f"sizes[{k!r}]") for k, v in (sizes or {}).items()}
        return network_layer(what, given)
    if isinstance(what, Spec):
        return what.layer()
    raise DeclarationError(f"expected a layer declaration, a Layer or a Network, got {type(what).__name__}: {what!r}")


def token_value(layer: Layer, tokens: object) -> dict[str, int]:
    """The value of the token symbol (`T`, unless the declaration uses that name itself)."""
    dim = as_dim(tokens, "tokens")
    if not isinstance(dim, int):
        raise DeclarationError(f"tokens must be an integer, got {tokens!r}; formulas keep the symbol by themselves")
    return {layer.token_symbol: dim}


def planner_of(name: str, network: Network, budget: float | None = None) -> Planner:
    """The planner of that name; "auto" depends on the network. `budget` is for the search, which shows its progress."""
    if name == "auto":
        name = "subset_dp" if len(network.tensors) <= subset_dp.MAX_TENSORS else "search"
    return partial(_search, budget) if name == "search" else PLANNERS[name]


def _search(
    budget: float | None, network: Network, sizes: Mapping[str, int], objective: Objective, requires_grad: Set[str]
) -> ContractionPath:
    with bar(f"planning {len(network.tensors)} tensors") as progress:
        return search.plan(network, sizes, objective, requires_grad, budget=budget, progress=progress)
