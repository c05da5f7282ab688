"""The multilinear mixture of experts (μMoE, arXiv 2402.12550): a layer, and a block of two that share a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tnmoe.dims import Dim, Size, as_dim
from tnmoe.errors import DeclarationError
from tnmoe.factorizations import CP, Dense, Factorization, Modes, Sizes, TensorRing
from tnmoe.layer import DYNAMIC, Contraction, ExpertMap, Layer, Parameter
from tnmoe.layers.gate import Gate, GateNodes, gate_nodes
from tnmoe.layers.parts import Declaration, input_layer_norm
from tnmoe.network import FoldedBias, Network, Role, Tensor
from tnmoe.ops import Gelu, Value


@dataclass(frozen=True, slots=True)
class MuMoE(Declaration):
    """One μMoE layer: y_o = Σ_{n1…nE, i} a¹_{n1} … a^E_{nE} x̃_i W_{n1…nE, i, o}, with x̃ = (x, 1) if it has a bias.

    W is never formed: it is a tensor network. Maps (..., inputs) to (..., outputs).

    Args:
        inputs, outputs: widths; ints, symbols or expressions in text such as `"4*d"`.
        experts: number of experts, or one number a level of a hierarchy, e.g. `(64, 8)`.
        factorization: `CP(rank)`, `TensorRing(ranks)` or `Dense()`.
        gate: activation and norm of the expert coefficients.
        bias: fold a bias per expert into W as one more input entry fixed at 1.
        input_norm: normalise the input (LayerNorm with weight and bias) first; the gate reads it before the norm.

    Raises:
        DeclarationError: a size below 1, ranks that do not fit the levels, or an unknown part.
    """

    inputs: Size
    outputs: Size
    experts: Size | Sequence[Size]
    factorization: Factorization
    gate: Gate = field(default_factory=Gate)
    bias: bool = True
    input_norm: bool = False
    kind: ClassVar[str] = "mumoe"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs")
        object.__setattr__(self, "experts", _as_experts(self.experts))
        _check_parts(self.factorization, self.gate, self.levels)
        self.check_flags("bias", "input_norm")

    @property
    def levels(self) -> tuple[Dim, ...]:
        """The number of experts of each level."""
        return _as_experts(self.experts)

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        inputs, outputs = self.dim("inputs"), self.dim("outputs")
        sizes = Sizes((inputs, outputs, *self.levels, *self.factorization.dims()))
        sizes.add(DYNAMIC, "T", None)
        sizes.add("i", "I", inputs)
        sizes.add("o", "O", outputs)
        x, y = Value("x", (DYNAMIC, "i")), Value("y", (DYNAMIC, "o"))
        gates = _gates(self.gate, x, self.levels, sizes)
        norm = input_layer_norm(x, self.input_norm)
        node, factors = _mixture(
            self.factorization,
            self.gate,
            sizes,
            prefix="",
            x=norm.out,
            out=y,
            coefficients=gates.coefficients,
            bias=self.bias,
        )
        return Layer(
            name=_NAMES[self.factorization.kind] + "MuMoE",
            inputs=(x,),
            parameters=gates.parameters + norm.parameters + factors,
            buffers=gates.buffers,
            nodes=(*gates.nodes, *norm.nodes, node),
            output=y,
            sizes=sizes.sizes,
            values=sizes.values,
            declaration=self.declaration(),
            summary=str(self),
            coefficients=tuple(a.name for a in gates.coefficients),
        )


@dataclass(frozen=True, slots=True)
class MuMoEBlock(Declaration):
    """Two μMoE layers with a GELU between them, both mixed by the same expert coefficients.

    The mix point is at each layer: Σ_n a_n W²_n σ(Σ_m a_m W¹_m x). Maps (..., inputs) to (..., outputs).

    Args:
        inputs, hidden, outputs: widths; ints, symbols or expressions in text.
        experts, factorization, gate, bias: as in `MuMoE`, the same for both layers.
        input_norm: as in `MuMoE`.

    Raises:
        DeclarationError: as `MuMoE`.
    """

    inputs: Size
    hidden: Size
    outputs: Size
    experts: Size | Sequence[Size]
    factorization: Factorization
    gate: Gate = field(default_factory=Gate)
    bias: bool = True
    input_norm: bool = False
    kind: ClassVar[str] = "mumoe_block"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs")
        object.__setattr__(self, "experts", _as_experts(self.experts))
        _check_parts(self.factorization, self.gate, self.levels)
        self.check_flags("bias", "input_norm")

    @property
    def levels(self) -> tuple[Dim, ...]:
        """The number of experts of each level."""
        return _as_experts(self.experts)

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        inputs, hidden, outputs = (self.dim(k) for k in ("inputs", "hidden", "outputs"))
        sizes = Sizes((inputs, hidden, outputs, *self.levels, *self.factorization.dims()))
        sizes.add(DYNAMIC, "T", None)
        sizes.add("i", "I", inputs)
        sizes.add("h", "H", hidden)
        sizes.add("o", "O", outputs)
        x, y = Value("x", (DYNAMIC, "i")), Value("y", (DYNAMIC, "o"))
        gates = _gates(self.gate, x, self.levels, sizes)
        norm = input_layer_norm(x, self.input_norm)
        hidden_value, active = Value("hidden", (DYNAMIC, "h"), "up"), Value("activated", (DYNAMIC, "h"), "up")
        up, up_factors = _mixture(
            self.factorization,
            self.gate,
            sizes,
            prefix="up_",
            x=norm.out,
            out=hidden_value,
            coefficients=gates.coefficients,
            bias=self.bias,
        )
        down, down_factors = _mixture(
            self.factorization,
            self.gate,
            sizes,
            prefix="down_",
            x=active,
            out=y,
            coefficients=gates.coefficients,
            bias=self.bias,
        )
        return Layer(
            name=_NAMES[self.factorization.kind] + "MuMoEBlock",
            inputs=(x,),
            parameters=gates.parameters + norm.parameters + up_factors + down_factors,
            buffers=gates.buffers,
            nodes=(*gates.nodes, *norm.nodes, up, Gelu(active, hidden_value), down),
            output=down.out,
            sizes=sizes.sizes,
            values=sizes.values,
            declaration=self.declaration(),
            summary=str(self),
            coefficients=tuple(a.name for a in gates.coefficients),
        )


_NAMES = {"cp": "CP", "tensor_ring": "TensorRing", "dense": "Dense"}


def _as_experts(experts: object) -> tuple[Dim, ...]:
    if isinstance(experts, list | tuple):
        if not experts:
            raise DeclarationError("experts must name at least one level, got an empty list")
        return tuple(as_dim(n, f"experts[{k}]") for k, n in enumerate(experts))
    return (as_dim(experts, "experts"),)


def _check_parts(factorization: object, gate: object, levels: tuple[Dim, ...]) -> None:
    if not isinstance(factorization, CP | TensorRing | Dense):
        raise DeclarationError(f"factorization must be CP(rank), TensorRing(ranks) or Dense(), got {factorization!r}")
    factorization.check_levels(len(levels))
    if not isinstance(gate, Gate):
        raise DeclarationError(f"gate must be a Gate(activation, norm), got {gate!r}")


def _gates(gate: Gate, x: Value, levels: tuple[Dim, ...], sizes: Sizes) -> GateNodes:
    single = len(levels) == 1
    indices = tuple("n" if single else f"n{e + 1}" for e in range(len(levels)))
    for index, experts in zip(indices, levels, strict=True):
        sizes.add(index, index.upper(), experts)
    return gate_nodes(gate, x, indices)


def _mixture(
    factorization: Factorization,
    gate: Gate,
    sizes: Sizes,
    *,
    prefix: str,
    x: Value,
    out: Value,
    coefficients: tuple[Value, ...],
    bias: bool,
) -> tuple[Contraction, tuple[Parameter, ...]]:
    """The network Σ a¹ … a^E x̃ W̃ of one layer, and its stored factors."""
    (_, i), (_, o) = x.indices, out.indices
    experts = tuple(a.indices[-1] for a in coefficients)
    sums = tuple(gate.initial_sums(sizes.sizes[n]) for n in experts)
    factors = factorization.factors(Modes(experts, i, o, sizes.sizes[i], sums), sizes, prefix=prefix, bias=bias)
    data = tuple(Tensor(v.name, v.indices) for v in (*coefficients, x))
    stored = factors.parameters
    folded = None
    if factors.bias is not None:
        tensor = Tensor(factors.bias.name, factors.bias.indices, Role.WEIGHT)
        folded = FoldedBias(i, x.name, factors.input, tensor)
        stored += (factors.bias,)
    network = Network(data + factors.tensors, out.indices, folded)
    stand_in = {"x": x.name} | {f"a{e + 1}": a.name for e, a in enumerate(coefficients)}
    names = {frozenset(stand_in.get(n, n) for n in subset): name for subset, name in factors.names.items()}
    part = prefix.rstrip("_")
    return Contraction(Value(out.name, out.indices, part), network, ExpertMap(i, o, experts), names), stored
