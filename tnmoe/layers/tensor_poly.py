"""TensorPoly: adapters of tensor products, with routed ranks (arXiv 2405.16671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.dims import Size
from tnmoe.errors import DeclarationError
from tnmoe.initialise import Normal
from tnmoe.layer import DYNAMIC, Layer
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.network import Tensor
from tnmoe.ops import Merge, Split, Value


@dataclass(frozen=True, slots=True)
class TensorPoly(Declaration):
    """x and y as tensors of `order` axes of ⌈inputs^(1/order)⌉ and ⌈outputs^(1/order)⌉ entries, zeros appended.

    Factors A^j[n, r, i_j] and B^j[n, r, o_j] for each axis j, with softmax gates over the modules n for each rank r:

    * variant "I": y = Σ_{n,r} g[n, r] ⊗_j (A^j[n, r] · x) B^j[n, r]: whole ranks are routed;
    * variant "II": y = Σ_r ⊗_j (A^j[r] · x) B^j[r] with factors mixed first, A^j[r] = Σ_n g^j[n, r] A^j[n, r] and B^j
      alike: every axis has gates of its own.

    Without the layer norms between the factors, which break the factored form. Maps (..., inputs) to (..., outputs).
    """

    inputs: int
    outputs: int
    experts: Size
    rank: Size
    order: int = 2
    variant: str = "I"
    kind: ClassVar[str] = "tensor_poly"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts", "rank", "order")
        self.check_choice("variant", ("I", "II"))
        for key in ("inputs", "outputs", "order"):
            if not isinstance(getattr(self, key), int):
                raise DeclarationError(f"{key} must be an integer, got {getattr(self, key)!r}")
        if not 2 <= self.order <= 4:
            raise DeclarationError(f"order must be 2, 3 or 4, got {self.order}")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "experts", "rank"), self.inputs)
        b.size("o", "O", self.outputs)
        b.size("n", "N", self.dim("experts"))
        b.size("r", "R", self.dim("rank"))
        axes = range(1, self.order + 1)
        sides = {}
        for stem, width in (("i", self.inputs), ("o", self.outputs)):
            sides[stem] = b.size(f"{stem}1", f"{stem.upper()}_1", _root(width, self.order))
            for j in axes[1:]:
                b.length(f"{stem}{j}", sides[stem])
        ins, outs = (tuple(f"{stem}{j}" for j in axes) for stem in "io")
        x = Value("x_axes", (DYNAMIC, *ins), "adapters")
        b.add(Split(x, b.x, "i", ins, _root(self.inputs, self.order) ** self.order != self.inputs))
        factors = [
            b.weight(f"{name}_{j}", ("n", "r", index), Normal(0, size ** sympy.Rational(-1, 2)), "adapters")
            for name, indices, size in (("in", ins, sides["i"]), ("out", outs, b.sizes.sizes["r"]))
            for j, index in zip(axes, indices, strict=True)
        ]
        tensors: list[Tensor | Value] = [*factors]
        if self.variant == "I":
            tensors.append(self._gate(b, "", factors))
        else:
            gates = [self._gate(b, f"_{j}", factors) for j in axes]
            tensors = [
                b.network(Value(f"{f.name}_mixed", (DYNAMIC, "r", f.indices[-1]), "adapters"), gate, f)
                for f, gate in zip(factors, [*gates, *gates], strict=True)
            ]
        product = b.network(Value("y_axes", (DYNAMIC, *outs), "adapters"), x, *tensors)
        y = Value("y", (DYNAMIC, "o"), "adapters")
        b.add(Merge(y, product, "o", outs, _root(self.outputs, self.order) ** self.order != self.outputs))
        return b.layer("TensorPoly", y, self.declaration(), str(self))

    def _gate(self, b: Builder, suffix: str, factors: list[Tensor]) -> Value:
        """Softmax over the modules of a projection of x, for each rank."""
        projection = b.weight(f"gate_projection{suffix}", ("i", "n", "r"), b.fan_in("i"), "gate")
        logits = b.network(Value(f"logits{suffix}", (DYNAMIC, "n", "r"), "gate"), b.x, projection)
        return b.softmax(f"shares{suffix}", logits, "n")


def _root(width: int, order: int) -> int:
    """The smallest integer whose power is at least `width`."""
    side = 1
    while side**order < width:
        side += 1
    return side
