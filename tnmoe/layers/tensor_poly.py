"""TensorPoly: adapters of tensor products, with routed ranks (arXiv 2405.16671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.initialise import Normal
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.network import Tensor
from tnmoe.ir.pointwise_ops import LayerNorm
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Dim, Size


@dataclass(frozen=True, slots=True)
class TensorPoly(Declaration):
    """x and y as tensors of `order` axes of ⌈inputs^(1/order)⌉ and ⌈outputs^(1/order)⌉ entries, zeros appended.

    Factors A^j[n, r, i_j] and B^j[n, r, o_j] for each axis j, with softmax gates over the modules n for each rank r:

    * variant "I": y = Σ_{n,r} g[n, r] ⊗_j (A^j[n, r] · x) B^j[n, r]: whole ranks are routed;
    * variant "II": y = Σ_r ⊗_j (A^j[r] · x) B^j[r] with factors mixed first, A^j[r] = Σ_n g^j[n, r] A^j[n, r] and B^j
      alike: every axis has gates of its own.

    With `norm` the tensor products of either side are formed in a balanced binary tree, as in word2ket (arXiv
    1911.04975), and each product of two factors is normalised to zero mean and unit variance; the last one also has a
    weight for each entry. This breaks the factored form: the rows of A and B are formed whole, once for the modules in
    variant "I" and for every token in variant "II". Without it, the planner decides what is formed.

    Maps (..., inputs) to (..., outputs).
    """

    inputs: int
    outputs: int
    experts: Size
    rank: Size
    order: int = 2
    variant: str = "I"
    norm: bool = False
    kind: ClassVar[str] = "tensor_poly"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts", "rank", "order")
        self.check_choice("variant", ("I", "II"))
        self.check_flags("norm")
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
        factors = [
            b.weight(f"{name}_{j}", ("n", "r", index), Normal(0, size ** sympy.Rational(-1, 2)), "adapters")
            for name, indices, size in (("in", ins, sides["i"]), ("out", outs, b.sizes.sizes["r"]))
            for j, index in zip(axes, indices, strict=True)
        ]
        gates = [self._gate(b, suffix) for suffix in ([""] if self.variant == "I" else [f"_{j}" for j in axes])]
        parts: list[Tensor | Value] = [*factors]
        if self.variant == "II":
            parts = [
                b.network(Value(f"{f.name}_mixed", (DYNAMIC, "r", f.indices[-1]), "adapters"), gate, f)
                for f, gate in zip(factors, [*gates, *gates], strict=True)
            ]
        mix = gates if self.variant == "I" else []
        y = Value("y", (DYNAMIC, "o"), "adapters")
        padded_in, padded_out = (
            _root(width, self.order) ** self.order != width for width in (self.inputs, self.outputs)
        )
        if self.norm:
            down = self._rows(b, "in", "i", parts[: self.order], b.sizes.sizes["i"], padded_in)
            up = self._rows(b, "out", "o", parts[self.order :], b.sizes.sizes["r"], padded_out)
            b.network(y, b.x, down, up, *mix)
        else:
            x = Value("x_axes", (DYNAMIC, *ins), "adapters")
            b.add(Split(x, b.x, "i", ins, padded_in))
            product = b.network(Value("y_axes", (DYNAMIC, *outs), "adapters"), x, *parts, *mix)
            b.add(Merge(y, product, "o", outs, padded_out))
        return b.layer("TensorPoly", y, self)

    def _rows(self, b: Builder, name: str, index: str, factors: list[Tensor | Value], size: Dim, padded: bool) -> Value:
        """The normalised tensor products of one side's factors, cut to the width of `index`."""
        weight = f"{name}_norm_weight"
        root = self._product(b, name, factors, weight, Normal(sympy.sympify(size) ** sympy.Rational(-1, 2), 0))
        rows = Value(f"{name}_rows", (*root.indices[:-1], index), "adapters")
        b.add(Merge(rows, root, index, root.indices[-1:], padded))
        return rows

    def _product(
        self, b: Builder, name: str, factors: list[Tensor | Value], weight: str = "", start: Normal | None = None
    ) -> Value:
        """A node of the tree: the product of what its halves make, normalised; if it is the root, with a weight."""
        middle = (len(factors) + 1) // 2
        left, right = (
            half[0] if len(half) == 1 else self._product(b, f"{name}_{side}", half)
            for side, half in (("l", factors[:middle]), ("r", factors[middle:]))
        )
        lead, (p, q) = left.indices[:-1], (left.indices[-1], right.indices[-1])
        pairs = b.network(Value(f"{name}_pairs", (*lead, p, q), "adapters"), left, right)
        whole = f"{p}{q}"
        b.length(whole, b.sizes.sizes[p] * b.sizes.sizes[q])
        product = Value(f"{name}_product", (*lead, whole), "adapters")
        normed = Value(f"{name}_normed", product.indices, "adapters")
        scale = None
        if start is not None:
            stored = b.weight(weight, (whole,), start, "adapters")
            scale = Value(stored.name, stored.indices, "adapters")
        b.add(Merge(product, pairs, whole, (p, q)), LayerNorm(normed, product, whole, scale))
        return normed

    def _gate(self, b: Builder, suffix: str) -> Value:
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
