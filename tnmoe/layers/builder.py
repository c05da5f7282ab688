"""Puts a routed layer together: sizes, parameters and nodes, and the steps that all families share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy

from tnmoe.factorizations.base import Factorization, Factors, Modes, Sizes
from tnmoe.ir.contractions import Add, Split
from tnmoe.ir.initialise import Init, Uniform
from tnmoe.ir.layer import DYNAMIC, Contraction, ExpertMap, Layer, Node
from tnmoe.ir.network import FoldedBias, Network, Tensor
from tnmoe.ir.ops import Op, results
from tnmoe.ir.pointwise_ops import Gelu, Softmax
from tnmoe.ir.routing_ops import Gather, GroupedContract
from tnmoe.ir.value import Parameter, Role, Value
from tnmoe.layers.parts import Declaration, input_layer_norm
from tnmoe.symbolic.dims import Dim

ONE_HOT: tuple[tuple[Dim, Dim], ...] = ((1, 1),)
"""Sum and sum of squares of the coefficients of an expert that runs alone (see `Modes`)."""


@dataclass
class Builder:
    """A layer in the making. `x` is the current value of its input.

    Args:
        declared: every size that the declaration has, so that symbols are not taken twice.
        inputs: width of the input.
    """

    declared: Iterable[Dim]
    inputs: Dim
    sizes: Sizes = field(init=False)
    parameters: list[Parameter] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    diagnostics: list[Op] = field(default_factory=list)
    coefficients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.sizes = Sizes(self.declared)
        self.tokens = self.sizes.add(DYNAMIC, "T", None)
        self.sizes.add("i", "I", self.inputs)
        self.input = self.x = Value("x", (DYNAMIC, "i"))

    def size(self, index: str, name: str, dim: Dim) -> Dim:
        """Give `index` a size; returns the symbol."""
        return self.sizes.add(index, name, dim)

    def length(self, index: str, formula: sympy.Expr) -> None:
        """Give `index` a size that follows from others."""
        self.sizes.sizes[index] = formula

    def add(self, *nodes: Node) -> None:
        """Append nodes."""
        self.nodes += nodes

    def norm(self, wanted: bool) -> None:
        """Normalise the input from here on."""
        normed = input_layer_norm(self.x, wanted)
        self.parameters += normed.parameters
        self.add(*normed.nodes)
        self.x = normed.out

    def weight(self, name: str, indices: tuple[str, ...], init: Init, part: str, role: Role = Role.WEIGHT) -> Tensor:
        """A stored tensor."""
        self.parameters.append(Parameter(name, indices, init, part, role))
        return Tensor(name, indices, role)

    def fan_in(self, index: str) -> Uniform:
        """The initialisation of `torch.nn.Linear` for a matrix whose input index is `index`."""
        return Uniform(1 / sympy.sqrt(self.sizes.sizes[index]))

    def network(self, out: Value, *tensors: Tensor | Value, bias: FoldedBias | None = None, **options: Any) -> Value:
        """A contraction of values and stored tensors."""
        leaves = tuple(t if isinstance(t, Tensor) else Tensor(t.name, t.indices) for t in tensors)
        self.add(Contraction(out, Network(leaves, out.indices, bias), **options))
        return out

    def linear(
        self, prefix: str, x: Value, out: Value, *, bias: bool = False, name: str = "weight", ranked: bool = False
    ) -> Value:
        """A matrix (and bias) from the last index of `x` to the last of `out`; `ranked` if it counts as an expert's."""
        i, o = x.indices[-1], out.indices[-1]
        weight = self.weight(prefix + name, (i, o), self.fan_in(i), out.part)
        folded = None
        if bias:
            offset = self.weight(prefix + "bias", (o,), self.fan_in(i), out.part)
            folded = FoldedBias(i, x.name, weight.name, offset)
        return self.network(out, x, weight, bias=folded, expert_map=ExpertMap(i, o) if ranked else None)

    def logits(self, x: Value, index: str, prefix: str = "") -> Value:
        """x · G with G starting as in `torch.nn.Linear`."""
        out = Value(prefix + "logits", (*x.indices[:-1], index), prefix + "gate")
        return self.linear(prefix, x, out, name="gate_projection")

    def softmax(self, name: str, x: Value, index: str) -> Value:
        """Softmax over `index`."""
        out = Value(name, x.indices, x.part)
        self.add(Softmax(out, x, index))
        return out

    def sum(self, name: str, lhs: Value, rhs: Value, part: str) -> Value:
        """Sum of two values."""
        out = Value(name, lhs.indices, part)
        self.add(Add(out, lhs, rhs))
        return out

    # ---- experts ---------------------------------------------------------------------------------------------

    def feed_forward(
        self, prefix: str, x: Value, hidden: str | None, out: Value, *, bias: bool, ranked: bool = False
    ) -> Value:
        """Linear, GELU, linear over the last index of `x`; one linear map if `hidden` is None."""
        if hidden is None:
            return self.linear(prefix, x, out, bias=bias, ranked=ranked)
        up = Value(f"{prefix}hidden", (*x.indices[:-1], hidden), f"{prefix}up")
        active = Value(f"{prefix}activated", up.indices, up.part)
        self.linear(f"{prefix}up_", x, up, bias=bias, ranked=ranked)
        self.add(Gelu(active, up))
        return self.linear(f"{prefix}down_", active, out, bias=bias, ranked=ranked)

    def experts(
        self,
        prefix: str,
        u: Value,
        hidden: str | None,
        out: Value,
        *,
        bias: bool,
        last_bias: bool | None = None,
        factorization: Factorization | None = None,
        mix: Value | None = None,
    ) -> Value:
        """Every expert `n` on its own slice (or the whole) of `u`; with `mix`, the result is mixed by it over `n`.

        A linear map each, or with `hidden` two with a GELU between them (`last_bias`: whether the second has a bias, by
        default as the first); `factorization` is that of each W[n, i, o].
        """
        x = u
        if hidden is not None:
            lead = tuple(dict.fromkeys(i for i in (*out.indices[:-1], "n") if i in (*u.indices, "n")))
            up = Value(f"{prefix}hidden", (*lead, hidden), f"{prefix}up")
            self._expert_map(f"{prefix}up_", (u,), up, bias, factorization)
            x = Value(f"{prefix}activated", up.indices, up.part)
            self.add(Gelu(x, up))
        stem = f"{prefix}down_" if hidden is not None else prefix
        last = bias if last_bias is None else last_bias
        return self._expert_map(stem, (mix, x) if mix else (x,), out, last, factorization)

    def _expert_map(
        self, prefix: str, data: tuple[Value, ...], out: Value, bias: bool, factorization: Factorization | None
    ) -> Value:
        x = data[-1]
        i, o = x.indices[-1], out.indices[-1]
        factors = self._factors(prefix, x, o, bias, factorization)
        folded = self._folded(x, factors)
        return self.network(out, *data, *factors.tensors, bias=folded, expert_map=ExpertMap(i, o, ("n",)))

    def _factors(self, prefix: str, x: Value, o: str, bias: bool, factorization: Factorization | None) -> Factors:
        """The stored factors of W[n, i, o], each expert starting as in `torch.nn.Linear`."""
        i = x.indices[-1]
        if factorization is not None:
            modes = Modes(("n",), i, o, self.sizes.sizes[i], ONE_HOT)
            factors = factorization.factors(modes, self.sizes, prefix=prefix, bias=bias)
        else:
            init, part = self.fan_in(i), prefix.rstrip("_") or "experts"
            weight = Parameter(f"{prefix}weight", ("n", i, o), init, part)
            offset = Parameter(f"{prefix}bias", ("n", o), init, part) if bias else None
            factors = Factors((weight,), offset, weight.name)
        self.parameters += [*factors.parameters, *((factors.bias,) if factors.bias else ())]
        return factors

    def _folded(self, x: Value, factors: Factors) -> FoldedBias | None:
        if factors.bias is None:
            return None
        tensor = Tensor(factors.bias.name, factors.bias.indices, Role.WEIGHT)
        return FoldedBias(x.indices[-1], x.name, factors.input, tensor)

    def grouped_experts(
        self, prefix: str, u: Value, counts: Value, hidden: str | None, out: Value, *, bias: bool, last_bias: bool
    ) -> Value:
        """Experts with full matrices on rows sorted by expert."""
        x, row = u, u.indices[0]
        stem = prefix
        if hidden is not None:
            up = Value(f"{prefix}hidden", (row, hidden), f"{prefix}up")
            self._grouped(f"{prefix}up_", x, counts, up, bias)
            x = Value(f"{prefix}activated", up.indices, up.part)
            self.add(Gelu(x, up))
            stem = f"{prefix}down_"
        return self._grouped(stem, x, counts, out, last_bias)

    def _grouped(self, prefix: str, x: Value, counts: Value, out: Value, bias: bool) -> Value:
        factors = self._factors(prefix, x, out.indices[-1], bias, None)
        (weight,) = factors.parameters
        offset = Value(factors.bias.name, factors.bias.indices, out.part) if factors.bias else None
        self.add(GroupedContract(out, x, Value(weight.name, weight.indices, out.part), offset, counts))
        return out

    def gathered_experts(
        self,
        prefix: str,
        u: Value,
        positions: Value,
        hidden: str | None,
        out: Value,
        *,
        bias: bool,
        factorization: Factorization,
    ) -> Value:
        """Factorized experts: the chosen entries of every factor that has the expert index meet `u`."""
        x, stem = u, prefix
        if hidden is not None:
            up = Value(f"{prefix}hidden", (*positions.indices, hidden), f"{prefix}up")
            self._gathered(f"{prefix}up_", x, positions, up, bias, factorization)
            x = Value(f"{prefix}activated", up.indices, up.part)
            self.add(Gelu(x, up))
            stem = f"{prefix}down_"
        return self._gathered(stem, x, positions, out, bias, factorization)

    def _gathered(
        self, prefix: str, x: Value, positions: Value, out: Value, bias: bool, factorization: Factorization
    ) -> Value:
        factors = self._factors(prefix, x, out.indices[-1], bias, factorization)
        tensors: list[Tensor] = []
        for tensor in factors.tensors:
            if "n" in tensor.indices:
                rest = tuple(j for j in tensor.indices if j != "n")
                chosen = Value(f"{tensor.name}_chosen", positions.indices + rest, out.part)
                stored = Value(tensor.name, ("n", *rest), out.part)
                self.add(Gather(chosen, stored, positions, "n"))
                tensors.append(Tensor(chosen.name, chosen.indices))
            else:
                tensors.append(tensor)
        expert_map = ExpertMap(x.indices[-1], out.indices[-1], ("n",))
        return self.network(out, x, *tensors, bias=self._folded(x, factors), expert_map=expert_map)

    # ---- the layer -------------------------------------------------------------------------------------------

    def coefficients_of_tokens(self, index: str, parts: tuple[str, ...]) -> None:
        """Coefficients with `index` first are shown with the tokens first, beside the forward pass."""
        made = {
            v.name: v for node in self.nodes for v in ((node.out,) if isinstance(node, Contraction) else results(node))
        }
        shown = []
        for name in self.coefficients:
            x = made[name]
            out = Value(f"{name}_of_tokens", (*parts, *x.indices[1:]), x.part, x.integer)
            self.diagnostics.append(Split(out, x, index, parts))
            shown.append(out.name)
        self.coefficients = tuple(shown)

    def layer(
        self,
        name: str,
        output: Value,
        spec: Declaration,
        *,
        couples_tokens: bool = False,
    ) -> Layer:
        """The finished layer that `spec` declares."""
        return Layer(
            name=name,
            inputs=(self.input,),
            parameters=tuple(self.parameters),
            buffers=(),
            nodes=tuple(self.nodes),
            output=output,
            sizes=self.sizes.sizes,
            values=self.sizes.values,
            declaration=spec.declaration(),
            summary=str(spec),
            coefficients=self.coefficients,
            diagnostics=tuple(self.diagnostics),
            couples_tokens=couples_tokens,
            lowerings=spec.lowerings(),
            only_lowering=spec.only_lowering(),
        )
