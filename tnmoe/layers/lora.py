"""Mixtures of low-rank adapters: MoLORA and MoV (arXiv 2309.05444), and MoSLoRA (arXiv 2406.11909)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnmoe.ir.initialise import Normal, Zeros
from tnmoe.ir.layer import DYNAMIC, ExpertMap, Layer
from tnmoe.ir.value import Role, Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.parts import Declaration
from tnmoe.symbolic.dims import Size


@dataclass(frozen=True, slots=True)
class MoLoRA(Declaration):
    """y = Σ_n softmax(x G)_n · x A_n B_n, with A of `rank` columns; with `base`, plus x W₀ with frozen W₀.

    Maps (..., inputs) to (..., outputs). B starts at zero, so that training starts from the base. Where the gate enters
    is the planner's choice; before B it saves the experts' outputs.
    """

    inputs: Size
    outputs: Size
    experts: Size
    rank: Size
    base: bool = False
    kind: ClassVar[str] = "molora"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "experts", "rank")
        self.check_flags("base")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "experts", "rank"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("n", "N", self.dim("experts"))
        b.size("r", "r", self.dim("rank"))
        shares = b.softmax("coefficients", b.logits(b.x, "n"), "n")
        b.coefficients = (shares.name,)
        down = b.weight("down_factor", ("n", "i", "r"), b.fan_in("i"), "adapters")
        up = b.weight("up_factor", ("n", "r", "o"), Zeros(), "adapters")
        y = Value("adapted" if self.base else "y", (DYNAMIC, "o"), "adapters")
        b.network(y, shares, b.x, down, up, expert_map=ExpertMap("i", "o", ("n",)))
        return b.layer("MoLoRA", _with_base(b, y, self.base), self)


@dataclass(frozen=True, slots=True)
class MoV(Declaration):
    """y_i = x_i Σ_n softmax(x G)_n S_ni: a mixture of vectors that rescale (IA³). Maps (..., inputs) to itself."""

    inputs: Size
    experts: Size
    kind: ClassVar[str] = "mov"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "experts")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "experts"), self.dim("inputs"))
        b.size("n", "N", self.dim("experts"))
        shares = b.softmax("coefficients", b.logits(b.x, "n"), "n")
        b.coefficients = (shares.name,)
        vectors = b.weight("vectors", ("n", "i"), Normal(1, 0.02), "vectors")
        y = b.network(Value("y", (DYNAMIC, "i"), "vectors"), b.x, shares, vectors)
        return b.layer("MoV", y, self)


@dataclass(frozen=True, slots=True)
class MoSLoRA(Declaration):
    """y = x A M B: the mixer M joins every subspace of A with every one of B; with `base`, plus x W₀ with frozen W₀.

    Maps (..., inputs) to (..., outputs). B starts at zero.
    """

    inputs: Size
    outputs: Size
    rank: Size
    base: bool = False
    kind: ClassVar[str] = "moslora"

    def __post_init__(self) -> None:
        self.check_sizes("inputs", "outputs", "rank")
        self.check_flags("base")

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        b = Builder(self.dims("inputs", "outputs", "rank"), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        b.size("q", "r", self.dim("rank"))
        b.length("r", b.sizes.sizes["q"])
        down = b.weight("down_factor", ("i", "r"), b.fan_in("i"), "adapter")
        mixer = b.weight("mixer", ("r", "q"), b.fan_in("r"), "adapter")
        up = b.weight("up_factor", ("q", "o"), Zeros(), "adapter")
        y = Value("adapted" if self.base else "y", (DYNAMIC, "o"), "adapter")
        b.network(y, b.x, down, mixer, up, expert_map=ExpertMap("i", "o"))
        return b.layer("MoSLoRA", _with_base(b, y, self.base), self)


def _with_base(b: Builder, adapted: Value, wanted: bool) -> Value:
    """`adapted`, plus the frozen layer that it adapts."""
    if not wanted:
        return adapted
    weight = b.weight("base_weight", ("i", "o"), b.fan_in("i"), "base", Role.FROZEN)
    base = b.network(Value("base", (DYNAMIC, "o"), "base"), b.x, weight)
    return b.sum("y", base, adapted, "base")
