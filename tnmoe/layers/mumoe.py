"""The multilinear mixture of experts (μMoE, arXiv 2402.12550): a layer, and a block of two that share a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Factorization, Sizes
from tnmoe.ir.layer import DYNAMIC, Layer, Node
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.value import Parameter, Value
from tnmoe.layers.factorized import FactorizedMap, check_factorization, factorized_map
from tnmoe.layers.gate import Gate, GateNodes, gate_nodes
from tnmoe.layers.parts import Declaration, NormedInput, input_layer_norm
from tnmoe.symbolic.dims import Dim, Size, as_dim


@dataclass(frozen=True, slots=True)
class MuMoE(Declaration):
    """One μMoE layer: y_o = Σ_{n1…nE, i} a¹_{n1} … a^E_{nE} x̃_i W_{n1…nE, i, o}, with x̃ = (x, 1) if it has a bias.

    W is never formed: it is a tensor network. Maps (..., inputs) to (..., outputs).

    Args:
        inputs, outputs: widths; ints, symbols or expressions in text such as `"4*d"`.
        experts: number of experts, or one number a level of a hierarchy, e.g. `(64, 8)`.
        factorization: of W, e.g. `CP(rank)` or `TensorRing(ranks)`; see `tnmoe.factorizations`.
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
        opening = _Opening(self, ("inputs", "outputs"), "io")
        y = opening.map("", opening.norm.out, Value("y", (DYNAMIC, "o")))
        return opening.layer((y,), "MuMoE")


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
        opening = _Opening(self, ("inputs", "hidden", "outputs"), "iho")
        up = opening.map("up_", opening.norm.out, Value("hidden", (DYNAMIC, "h")))
        active = Value("activated", (DYNAMIC, "h"), "up")
        down = opening.map("down_", active, Value("y", (DYNAMIC, "o")))
        return opening.layer((up, Gelu(active, up.out), down), "MuMoEBlock")


class _Opening:
    """What a layer and a block have in common: sizes, gate, input norm, and maps that share the coefficients."""

    def __init__(self, spec: MuMoE | MuMoEBlock, widths: Sequence[str], indices: str) -> None:
        dims = [spec.dim(key) for key in widths]
        self.spec = spec
        self.sizes = Sizes((*dims, *spec.levels, *spec.factorization.dims()))
        self.sizes.add(DYNAMIC, "T", None)
        for index, dim in zip(indices, dims, strict=True):
            self.sizes.add(index, index.upper(), dim)
        self.x = Value("x", (DYNAMIC, "i"))
        self.gates: GateNodes = _gates(spec.gate, self.x, spec.levels, self.sizes)
        self.norm: NormedInput = input_layer_norm(self.x, spec.input_norm)

    def map(self, prefix: str, x: Value, out: Value) -> FactorizedMap:
        """The map from `x` to `out`, mixed by the coefficients."""
        coefficients = self.gates.coefficients
        sums = tuple(self.spec.gate.initial_sums(self.sizes.sizes[a.indices[-1]]) for a in coefficients)
        return factorized_map(
            self.spec.factorization,
            self.sizes,
            prefix=prefix,
            x=x,
            out=out,
            coefficients=coefficients,
            gate_sums=sums,
            bias=self.spec.bias,
        )

    def layer(self, body: Sequence[FactorizedMap | Node], name: str) -> Layer:
        """The layer whose nodes after gate and norm are `body`; the last one is its output."""
        nodes: list[Node] = []
        parameters: tuple[Parameter, ...] = ()
        for piece in body:
            nodes += piece.nodes if isinstance(piece, FactorizedMap) else [piece]
            parameters += piece.parameters if isinstance(piece, FactorizedMap) else ()
        return Layer(
            name=type(self.spec.factorization).__name__ + name,
            inputs=(self.x,),
            parameters=self.gates.parameters + self.norm.parameters + parameters,
            buffers=self.gates.buffers,
            nodes=(*self.gates.nodes, *self.norm.nodes, *nodes),
            output=nodes[-1].out,
            sizes=self.sizes.sizes,
            values=self.sizes.values,
            declaration=self.spec.declaration(),
            summary=str(self.spec),
            coefficients=tuple(a.name for a in self.gates.coefficients),
        )


def _as_experts(experts: object) -> tuple[Dim, ...]:
    if isinstance(experts, list | tuple):
        if not experts:
            raise DeclarationError("experts must name at least one level, got an empty list")
        return tuple(as_dim(n, f"experts[{k}]") for k, n in enumerate(experts))
    return (as_dim(experts, "experts"),)


def _check_parts(factorization: object, gate: object, levels: tuple[Dim, ...]) -> None:
    check_factorization(factorization, len(levels))
    if not isinstance(gate, Gate):
        raise DeclarationError(f"gate must be a Gate(activation, norm), got {gate!r}")


def _gates(gate: Gate, x: Value, levels: tuple[Dim, ...], sizes: Sizes) -> GateNodes:
    single = len(levels) == 1
    indices = tuple("n" if single else f"n{e + 1}" for e in range(len(levels)))
    for index, experts in zip(indices, levels, strict=True):
        sizes.add(index, index.upper(), experts)
    return gate_nodes(gate, x, indices)
