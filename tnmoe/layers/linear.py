"""The baselines: a linear layer, and the two-layer MLP with a GELU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.factorizations.base import Sizes
from tnmoe.ir.initialise import Uniform
from tnmoe.ir.layer import DYNAMIC, Contraction, ExpertMap, Layer
from tnmoe.ir.network import FoldedBias, Network, Tensor
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.value import Parameter, Role, Value
from tnmoe.layers.parts import Declaration, input_layer_norm
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class Linear(Declaration):
    """y = x W + b, mapping (..., inputs) to (..., outputs); initialised like `torch.nn.Linear`."""

    inputs: Size
    outputs: Size
    bias: bool = True
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs")
        self.check_flags("bias")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        inputs, outputs = self.dim("inputs"), self.dim("outputs")
        sizes = Sizes((inputs, outputs))
        sizes.add(DYNAMIC, "T", None)
        sizes.add("i", "I", inputs)
        sizes.add("o", "O", outputs)
        x = Value("x", (DYNAMIC, "i"))
        node, parameters = _affine(sizes, "", x, Value("y", (DYNAMIC, "o")), self.bias)
        return Layer(
            name="Linear",
            inputs=(x,),
            parameters=parameters,
            buffers=(),
            nodes=(node,),
            output=node.out,
            sizes=sizes.sizes,
            values=sizes.values,
            declaration=self.declaration(),
            summary=str(self),
        )


@dataclass(frozen=True, slots=True)
class MLP(Declaration):
    """Linear, GELU, linear, mapping (..., inputs) to (..., outputs); optionally a LayerNorm of the input first."""

    inputs: Size
    hidden: Size
    outputs: Size
    bias: bool = True
    input_norm: bool = False
    kind: ClassVar[str] = "mlp"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "hidden", "outputs")
        self.check_flags("bias", "input_norm")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        dims = [self.dim(k) for k in ("inputs", "hidden", "outputs")]
        sizes = Sizes(dims)
        sizes.add(DYNAMIC, "T", None)
        for index, dim in zip("iho", dims, strict=True):
            sizes.add(index, index.upper(), dim)
        x = Value("x", (DYNAMIC, "i"))
        norm = input_layer_norm(x, self.input_norm)
        up, up_parameters = _affine(sizes, "up_", norm.out, Value("hidden", (DYNAMIC, "h"), "up"), self.bias)
        active = Value("activated", (DYNAMIC, "h"), "up")
        down, down_parameters = _affine(sizes, "down_", active, Value("y", (DYNAMIC, "o"), "down"), self.bias)
        return Layer(
            name="MLP",
            inputs=(x,),
            parameters=norm.parameters + up_parameters + down_parameters,
            buffers=(),
            nodes=(*norm.nodes, up, Gelu(active, up.out), down),
            output=down.out,
            sizes=sizes.sizes,
            values=sizes.values,
            declaration=self.declaration(),
            summary=str(self),
        )


def _affine(sizes: Sizes, prefix: str, x: Value, out: Value, bias: bool) -> tuple[Contraction, tuple[Parameter, ...]]:
    """The network x̃ W̃ of one linear layer, and its stored weights."""
    (t, i), (_, o) = x.indices, out.indices
    part = prefix.rstrip("_")
    init = Uniform(1 / sympy.sqrt(sizes.sizes[i]))
    weight = Parameter(prefix + "weight", (i, o), init, part)
    stored: tuple[Parameter, ...] = (weight,)
    folded = None
    if bias:
        stored += (Parameter(prefix + "bias", (o,), init, part),)
        folded = FoldedBias(i, x.name, weight.name, Tensor(stored[1].name, (o,), Role.WEIGHT))
    leaves = (Tensor(x.name, (t, i)), Tensor(weight.name, (i, o), Role.WEIGHT))
    return Contraction(out, Network(leaves, out.indices, folded), ExpertMap(i, o)), stored
