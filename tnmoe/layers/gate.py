"""Gates: the expert coefficients a^e = activation(norm(x · G^e)), one per level of the hierarchy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from tnmoe.errors import DeclarationError, unknown
from tnmoe.factorizations.base import numbered
from tnmoe.ir.initialise import Ones, Zeros
from tnmoe.ir.layer import Contraction, Node
from tnmoe.ir.network import Network, Tensor
from tnmoe.ir.pointwise_ops import BatchNorm, Entmax15, LayerNorm, Sigmoid, Softmax, Sparsemax
from tnmoe.ir.value import Parameter, Role, Value
from tnmoe.symbolic.dims import Dim

ACTIVATIONS = ("entmax15", "softmax", "sparsemax", "sigmoid")
NORMS = ("batch", "layer", "none")


@dataclass(frozen=True, slots=True)
class Gate:
    """How the input chooses experts. The projection starts at zero, so that all experts start with equal shares.

    Args:
        activation: "entmax15" (the paper's), "softmax", "sparsemax" or "sigmoid".
        norm: of the logits, without affine parameters: "batch", "layer" or "none".
    """

    activation: str = "entmax15"
    norm: str = "batch"

    def __post_init__(self) -> None:
        for key, value, allowed in (("activation", self.activation, ACTIVATIONS), ("norm", self.norm, NORMS)):
            if value not in allowed:
                raise DeclarationError(unknown(f"gate.{key}", value, allowed))

    def declaration(self) -> dict[str, Any]:
        """The mapping that declares it, as in a TOML file."""
        return {"activation": self.activation, "norm": self.norm}

    def __str__(self) -> str:
        return f"Gate({self.activation}, norm={self.norm})"

    def initial_sums(self, experts: Dim) -> tuple[Dim, Dim]:
        """Sum and sum of squares of the coefficients of one level when all logits are zero."""
        n = sympy.sympify(experts)
        return (n / 2, n / 4) if self.activation == "sigmoid" else (sympy.Integer(1), 1 / n)


@dataclass(frozen=True, slots=True)
class GateNodes:
    """The parameters, buffers and nodes of all levels, and the coefficients' values."""

    parameters: tuple[Parameter, ...]
    buffers: tuple[Parameter, ...]
    nodes: tuple[Node, ...]
    coefficients: tuple[Value, ...]


def gate_nodes(gate: Gate, x: Value, experts: tuple[str, ...]) -> GateNodes:
    """One projection of `x` (token, feature), norm and activation for each index in `experts`."""
    part = "gate"
    token, input_index = x.indices
    parameters: list[Parameter] = []
    buffers: list[Parameter] = []
    nodes: list[Node] = []
    coefficients: list[Value] = []
    for e, n in enumerate(experts):

        def name(stem: str, level: int = e) -> str:
            return numbered(stem, level, len(experts))

        projection = Parameter(name("gate_projection"), (input_index, n), Zeros(), part)
        parameters.append(projection)
        value = Value(name("logits"), (token, n), part)
        leaves = (Tensor(x.name, x.indices), Tensor(projection.name, projection.indices, Role.WEIGHT))
        nodes.append(Contraction(value, Network(leaves, value.indices)))
        if gate.norm == "layer":
            normal = Value(name("normalised"), (token, n), part)
            nodes.append(LayerNorm(normal, value, n))
            value = normal
        elif gate.norm == "batch":
            mean = Parameter(name("gate_running_mean"), (n,), Zeros(), part, Role.FROZEN)
            var = Parameter(name("gate_running_var"), (n,), Ones(), part, Role.FROZEN)
            buffers += [mean, var]
            normal = Value(name("normalised"), (token, n), part)
            statistics = (Value(p.name, p.indices, part) for p in (mean, var))
            nodes.append(BatchNorm(normal, value, n, *statistics))
            value = normal
        a = Value(name("coefficients"), (token, n), part)
        match gate.activation:
            case "entmax15":
                nodes.append(Entmax15(a, value, n))
            case "softmax":
                nodes.append(Softmax(a, value, n))
            case "sparsemax":
                nodes.append(Sparsemax(a, value, n))
            case _:
                nodes.append(Sigmoid(a, value))
        coefficients.append(a)
    return GateNodes(tuple(parameters), tuple(buffers), tuple(nodes), tuple(coefficients))
