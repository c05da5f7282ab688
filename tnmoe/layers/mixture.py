"""The classic mixtures to compare with: every expert is a two-layer MLP, or one linear map, with full matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from tnmoe.dims import Dim, Size, as_dim
from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Sizes
from tnmoe.initialise import Uniform
from tnmoe.layer import DYNAMIC, Contraction, ExpertMap, Layer, Node, Parameter
from tnmoe.layers.parts import Declaration, input_layer_norm
from tnmoe.network import FoldedBias, Network, Role, Tensor
from tnmoe.ops import Gelu, RoutedContract, Softmax, TopK, Value


@dataclass(frozen=True, slots=True)
class DenseMoE(Declaration):
    """Soft mixture of MLP experts, all of them run: y = Σ_n softmax(x G)_n · (GELU(x W¹_n + b¹_n) W²_n + b²_n).

    Maps (..., inputs) to (..., outputs).
    """

    inputs: Size
    hidden: Size
    outputs: Size
    experts: Size
    bias: bool = True
    input_norm: bool = False
    kind: ClassVar[str] = "dense_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs", "experts")
        self.check_flags("bias", "input_norm")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        parts = _Parts(self.declaration(), "ihon", ("inputs", "hidden", "outputs", "experts"))
        parts.route(self.input_norm, active=False)
        hidden, active = Value("hidden", (DYNAMIC, "n", "h"), "up"), Value("activated", (DYNAMIC, "n", "h"), "up")
        up = parts.weight("up_", ("n", "i", "h"), self.bias)
        down = parts.weight("down_", ("n", "h", "o"), self.bias)
        nodes = (
            *parts.nodes,
            _mixed((parts.x,), up, "i", hidden, ExpertMap("i", "h", ("n",))),
            Gelu(active, hidden),
            _mixed((parts.shares, active), down, "h", Value("y", (DYNAMIC, "o"), "down"), ExpertMap("h", "o", ("n",))),
        )
        return parts.layer("DenseMoE", nodes, str(self))


@dataclass(frozen=True, slots=True)
class SparseMoE(Declaration):
    """Token-choice mixture: each token runs through its `active` experts of the largest logits, none dropped.

    Experts are MLPs with a GELU, or single linear maps if `hidden` is None; the shares are a softmax over the
    chosen logits. Maps (..., inputs) to (..., outputs). Can be costed and executed in NumPy; not emitted yet.
    """

    inputs: Size
    outputs: Size
    experts: Size
    active: Size
    hidden: Size | None = None
    bias: bool = True
    input_norm: bool = False
    kind: ClassVar[str] = "sparse_moe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts", "active", *(["hidden"] if self.hidden is not None else []))
        self.check_flags("bias", "input_norm")
        experts, active = self.dim("experts"), self.dim("active")
        if isinstance(active, int) and isinstance(experts, int) and active > experts:
            raise DeclarationError(f"active must be at most experts = {experts}, got {active}")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        with_hidden = self.hidden is not None
        keys = ("inputs", "outputs", "experts", "active") + (("hidden",) if with_hidden else ())
        parts = _Parts(self.declaration(), "ionkh"[: len(keys)], keys)
        parts.route(self.input_norm, active=True)
        y = Value("expert_outputs", (DYNAMIC, "k", "o"), "down" if with_hidden else "experts")
        nodes: tuple[Node, ...] = tuple(parts.nodes)
        if with_hidden:
            up, down = (
                parts.weight("up_", ("n", "i", "h"), self.bias),
                parts.weight("down_", ("n", "h", "o"), self.bias),
            )
            hidden, act = Value("hidden", (DYNAMIC, "k", "h"), "up"), Value("activated", (DYNAMIC, "k", "h"), "up")
            nodes += (_routed(hidden, parts.x, up, parts.positions), Gelu(act, hidden))
            nodes += (_routed(y, act, down, parts.positions),)
        else:
            nodes += (_routed(y, parts.x, parts.weight("", ("n", "i", "o"), self.bias), parts.positions),)
        leaves = tuple(Tensor(v.name, v.indices) for v in (parts.shares, y))
        nodes += (Contraction(Value("y", (DYNAMIC, "o"), "combine"), Network(leaves, (DYNAMIC, "o"))),)
        return parts.layer("SparseMoE", nodes, str(self))


class _Parts:
    """Sizes, parameters and the router of a mixture while it is put together."""

    def __init__(self, declaration: dict[str, Any], indices: str, keys: tuple[str, ...]) -> None:
        dims: list[Dim] = [as_dim(declaration[k], k) for k in keys]
        self.declaration = declaration
        self.sizes = Sizes(dims)
        self.sizes.add(DYNAMIC, "T", None)
        for index, dim in zip(indices, dims, strict=True):
            self.sizes.add(index, "k" if index == "k" else index.upper(), dim)
        self.input = self.x = Value("x", (DYNAMIC, "i"))
        self.parameters: list[Parameter] = []
        self.nodes: list[Node] = []

    def route(self, input_norm: bool, *, active: bool) -> None:
        """Logits of the raw input, and shares over all experts or over the active ones; then the norm."""
        init = Uniform(1 / sympy.sqrt(self.sizes.sizes["i"]))
        projection = Parameter("gate_projection", ("i", "n"), init, "gate")
        self.parameters.append(projection)
        logits = Value("logits", (DYNAMIC, "n"), "gate")
        leaves = (Tensor("x", (DYNAMIC, "i")), Tensor(projection.name, projection.indices, Role.WEIGHT))
        self.nodes.append(Contraction(logits, Network(leaves, logits.indices)))
        slot = "k" if active else "n"
        if active:
            top = Value("top_logits", (DYNAMIC, "k"), "gate")
            self.positions = Value("chosen", (DYNAMIC, "k"), "gate")
            self.nodes.append(TopK(top, self.positions, logits, "n"))
            logits = top
        self.shares = Value("coefficients", (DYNAMIC, slot), "gate")
        self.nodes.append(Softmax(self.shares, logits, slot))
        norm = input_layer_norm(self.x, input_norm)
        self.parameters += norm.parameters
        self.nodes += norm.nodes
        self.x = norm.out

    def weight(self, prefix: str, indices: tuple[str, str, str], bias: bool) -> tuple[Parameter, Parameter | None]:
        """A matrix (and bias) per expert, initialised like `torch.nn.Linear`."""
        n, i, o = indices
        init, part = Uniform(1 / sympy.sqrt(self.sizes.sizes[i])), prefix.rstrip("_") or "experts"
        weight = Parameter(prefix + "weight", indices, init, part)
        offset = Parameter(prefix + "bias", (n, o), init, part) if bias else None
        self.parameters += [weight, *((offset,) if offset else ())]
        return weight, offset

    def layer(self, name: str, nodes: tuple[Node, ...], summary: str) -> Layer:
        return Layer(
            name=name,
            inputs=(self.input,),
            parameters=tuple(self.parameters),
            buffers=(),
            nodes=nodes,
            output=nodes[-1].out,
            sizes=self.sizes.sizes,
            values=self.sizes.values,
            declaration=self.declaration,
            summary=summary,
            coefficients=(self.shares.name,),
        )


def _mixed(
    data: tuple[Value, ...],
    stored: tuple[Parameter, Parameter | None],
    index: str,
    out: Value,
    expert_map: ExpertMap,
) -> Contraction:
    """The network of `data` (the last one contracted over `index`) and all experts' weights."""
    weight, bias = stored
    leaves = (*(Tensor(v.name, v.indices) for v in data), Tensor(weight.name, weight.indices, Role.WEIGHT))
    folded = None
    if bias is not None:
        folded = FoldedBias(index, data[-1].name, weight.name, Tensor(bias.name, bias.indices, Role.WEIGHT))
    return Contraction(out, Network(leaves, out.indices, folded), expert_map)


def _routed(out: Value, x: Value, stored: tuple[Parameter, Parameter | None], positions: Value) -> RoutedContract:
    weight, bias = stored
    offset = Value(bias.name, bias.indices, bias.part) if bias else None
    return RoutedContract(out, x, Value(weight.name, weight.indices, weight.part), offset, positions, "n")
