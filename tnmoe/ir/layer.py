"""A layer: tensor networks joined by the primitives that are not multilinear, in static single assignment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.ir.initialise import Init, Normal
from tnmoe.ir.network import Network, Tensor
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.value import Parameter, Role, Value
from tnmoe.symbolic.dims import Dim, dim_text, evaluate, symbol_names

DYNAMIC = "t"
"""The token index of every layer: all leading axes of the input, flattened."""


@dataclass(frozen=True, slots=True)
class AxisSplit:
    """An index of a layer that its network has in parts, the first varying slowest.

    If the parts have more entries than the index (`padded`), the surplus is filled with zeros, or cut off.
    """

    index: str
    parts: tuple[str, ...]
    padded: bool = False


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Which indices of a network span the matrix of one expert, which choose the expert, and which are in parts."""

    input: str
    output: str
    experts: tuple[str, ...] = ()
    splits: tuple[AxisSplit, ...] = ()

    def parts(self, index: str) -> tuple[str, ...]:
        """What the network has in place of the input or output index."""
        return next((s.parts for s in self.splits if s.index == index), (index,))


@dataclass(frozen=True, slots=True)
class Contraction:
    """A network inside a layer; its tensors are values of the layer by name.

    Attributes:
        out: the value it defines; its indices are the network's output.
        network: what is contracted.
        expert_map: set where the network is the linear map of an expert, for rank bounds.
        names: what to call the result of contracting a subset of the tensors, where a good name is known.
    """

    out: Value
    network: Network
    expert_map: ExpertMap | None = None
    names: Mapping[frozenset[str], str] = field(default_factory=dict)


Node = Contraction | Op


def reads(node: Node) -> tuple[Tensor | Value, ...]:
    """What a node of a layer reads."""
    return node.network.leaves if isinstance(node, Contraction) else operands(node)


def writes(node: Node) -> tuple[Value, ...]:
    """What a node of a layer defines."""
    return (node.out,) if isinstance(node, Contraction) else results(node)


@dataclass(frozen=True, slots=True)
class Layer:
    """A declared layer, before any order is chosen.

    Attributes:
        inputs: data; the first index of a layer's input is the token index, unless the layer is a bare network.
        parameters, buffers: stored values, by name.
        nodes: networks and primitives in an order of evaluation; each name is defined once.
        outputs: what `forward` returns.
        coefficients: names of the expert coefficients, for analysis: one (t, n_e) value a level, or the shares of the
            chosen experts and which they are; the token index comes first.
        sizes: every index's size: a symbol, or an expression in symbols.
        values: the integers of those symbols that the declaration fixed.
        declaration: the plain mapping (as in a TOML file's `[layer]`) that this layer came from.
        summary: the same in one line, e.g. for `extra_repr`.
        batched: True if the input takes any leading axes, `(..., I)`; False for a bare network.
        diagnostics: ops beside the forward pass: of scalars, e.g. a load-balancing loss, and of coefficients that the
            forward pass has in another form.
        couples_tokens: True if the output for one token may depend on other tokens of the batch.
        lowerings: declarations of the same function and parameters in other programs, by name, this one among them;
            empty if the declaration leaves no choice.
        only_lowering: why a routed layer has no other lowering, as half a sentence; else empty.
    """

    name: str
    inputs: tuple[Value, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Parameter, ...]
    nodes: tuple[Node, ...]
    output: Value
    sizes: Mapping[str, Dim]
    values: Mapping[str, int]
    declaration: Mapping[str, Any]
    summary: str
    coefficients: tuple[str, ...] = ()
    batched: bool = True
    diagnostics: tuple[Op, ...] = ()
    couples_tokens: bool = False
    lowerings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only_lowering: str = ""

    def __post_init__(self) -> None:
        defined: dict[str, frozenset[str]] = {}

        def define(name: str, indices: tuple[str, ...]) -> None:
            if name in defined:
                raise DeclarationError(f"value {name!r} of layer {self.name!r} is defined twice")
            lost = [i for i in indices if i not in self.sizes]
            if lost:
                raise DeclarationError(f"index {lost[0]!r} of {name!r} has no size; sizes has {sorted(self.sizes)}")
            defined[name] = frozenset(indices)

        for value in self.inputs:
            define(value.name, value.indices)
        for parameter in self.parameters + self.buffers:
            define(parameter.name, parameter.indices)
        for node in self.nodes + self.diagnostics:
            for read in reads(node):
                if defined.get(read.name) != frozenset(read.indices):
                    raise DeclarationError(
                        f"{read.name!r} has indices {read.indices} where it is used, but "
                        f"{sorted(defined.get(read.name, ()))} where it is defined"
                    )
            for value in writes(node):
                define(value.name, value.indices)
        if self.output.name not in defined:
            raise DeclarationError(f"the output {self.output.name!r} of layer {self.name!r} is never defined")

    @property
    def contractions(self) -> tuple[Contraction, ...]:
        """The nodes that need an order."""
        return tuple(n for n in self.nodes if isinstance(n, Contraction))

    @property
    def free_symbols(self) -> frozenset[str]:
        """Symbols that still need a value, e.g. the tokens `T`."""
        return symbol_names(self.sizes.values()) - frozenset(self.values)

    @property
    def token_symbol(self) -> str:
        """Name of the symbol that counts the rows of the input; only of a batched layer."""
        return str(self.sizes[self.inputs[0].indices[0]])

    def gradient_names(self, inputs: Collection[str]) -> frozenset[str]:
        """Names of the values that need a gradient: trained weights, those of `inputs`, and what depends on them."""
        names = {p.name for p in self.parameters if p.role is Role.WEIGHT} | set(inputs)
        for node in self.nodes:
            if any(v.name in names for v in reads(node)):
                names |= {v.name for v in writes(node) if not v.integer}
        return frozenset(names)

    def network_gradients(self, node: Contraction, inputs: Collection[str]) -> frozenset[str]:
        """Names of the tensors of one network that need a gradient."""
        return self.gradient_names(inputs) & node.network.leaf_names

    def bound_sizes(self, values: Mapping[str, int] | None = None) -> dict[str, int]:
        """Every index's size as an integer, under the declared values and `values` (by symbol name)."""
        known = {**self.values, **(values or {})}
        return {index: evaluate(size, known, "size") for index, size in self.sizes.items()}


def network_layer(network: Network, sizes: Mapping[str, Dim] | None = None) -> Layer:
    """A bare network as a layer: data tensors are inputs, weights start at variance 1 / fan-in.

    Args:
        network: what to contract.
        sizes: size of each index; one that is missing becomes a symbol of the index's name.
    """
    from_text = {} if sizes is None else dict(sizes)
    unknown = sorted(set(from_text) - set(network.indices))
    if unknown:
        raise DeclarationError(
            f"sizes names {unknown[0]!r}, which is no index of {network.expression!r}; "
            f"its indices are {', '.join(network.indices)}"
        )
    symbols = {i: sympy.Symbol(i, positive=True, integer=True) for i in network.indices}
    values = {i: d for i, d in from_text.items() if isinstance(d, int)}
    dims: dict[str, Dim] = {
        i: symbols[i] if isinstance(from_text.get(i, 1), int) else from_text[i] for i in network.indices
    }
    weights = [t for t in network.leaves if t.role is not Role.DATA]
    # Unit-variance data should give unit-variance results: each summed index is paid for by one weight.
    unpaid = set(network.indices) - set(network.output)
    inits: dict[str, Init] = {}
    for t in weights:
        fan = sympy.prod([sympy.sympify(dims[i]) for i in t.indices if i in unpaid])
        unpaid -= set(t.indices)
        inits[t.name] = Normal(0, 1 / sympy.sqrt(fan))
    declaration: dict[str, Any] = {"kind": "network", **network.to_mapping()}
    if from_text:
        declaration["sizes"] = {i: dim_text(d) for i, d in from_text.items()}
    result = "result"
    while any(t.name == result or t.name.startswith(f"{result}_") for t in network.leaves):
        result += "_"  # the names of intermediate results begin with it
    out = Value(result, network.output)
    return Layer(
        name="ContractedNetwork",
        inputs=tuple(Value(t.name, t.indices) for t in network.tensors if t.role is Role.DATA),
        parameters=tuple(Parameter(t.name, t.indices, inits[t.name], role=t.role) for t in weights),
        buffers=(),
        nodes=(Contraction(out, network),),
        output=out,
        sizes=dims,
        values=values,
        declaration=declaration,
        summary=network.expression,
        batched=False,
    )
