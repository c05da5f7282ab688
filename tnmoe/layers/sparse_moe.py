"""Token choice: every token runs through the experts of its largest logits (arXiv 1701.06538, 2101.03961)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Factorization
from tnmoe.ir.layer import DYNAMIC, Layer
from tnmoe.ir.pointwise_ops import Softmax
from tnmoe.ir.routing_ops import CapacitySlots, Dropped, LoadBalance, Noise, Normalise, TopK, ZLoss
from tnmoe.ir.value import Value
from tnmoe.layers.builder import Builder
from tnmoe.layers.dispatch import BLOCK, chosen_experts, slot_experts
from tnmoe.layers.parts import LOWERINGS, Declaration
from tnmoe.symbolic.dims import Dim, Size

SHARES = ("after", "before", "normalised")


@dataclass(frozen=True, slots=True)
class SparseMoE(Declaration):
    """Token-choice mixture: y = Σ over the k experts of the largest logits of share · expert(x).

    Maps (..., inputs) to (..., outputs). Experts are MLPs with a GELU, or single linear maps if `hidden` is None.

    Args:
        experts, active: number of experts N, and k of them for each token.
        hidden: width of an expert.
        shares: "after": softmax over the k chosen logits; "before": the chosen entries of a softmax over all experts;
            "normalised": the same, divided by their sum.
        noise: add softplus(x · G_noise) times standard normal noise to the logits in training (arXiv 1701.06538).
        capacity: slots of an expert as a percentage of its even share k·T/N, rounded up; what finds no place is dropped
            (`diagnostics` counts it). None: dropless.
        shared: hidden width of an MLP that every token runs through besides (DeepSeekMoE, arXiv 2401.06066).
        null: experts that compute nothing and can be chosen too; shares are those of the true ones chosen, divided
            by their sum (AdaMoE, arXiv 2406.13233). Their cost is expected: k·N/(N + null) true choices.
        factorization: of every W[n, i, o]; None for full matrices.
        lowering: as `tnmoe.layers.parts.LOWERINGS` tells; `expert_coefficients` gives (shares, positions) of the
            gathered form and all shares of the masked one.
        block: gathered full matrices: where there are more than two choices an expert, every expert has a multiple of
            so many rows, up to (block - 1) · N more in all, and they run whatever is chosen. With 4, a token's result
            is the same to the bit on a CPU, whatever the other tokens of a batch of its size are, if the library's
            matrix product treats rows in groups of up to 4 (MKL with AVX2 does; float64 needs even widths besides).
            The figures are then no polynomials, which `tnmoe.crossover` needs; those of 1 are.
            1 runs the chosen rows alone, k·T of them, and a token's last bits may change with the number of rows that
            share its expert. Fewer choices are multiplied one by one, which no other changes.

    Full matrices loop over experts, in eager and in compiled and exported modules; in bfloat16 on CUDA devices that
    have it, torch's grouped product takes all experts at once.

    Raises:
        DeclarationError: sizes that do not fit, or options that exclude one another.
    """

    inputs: Size
    outputs: Size
    experts: Size
    active: Size
    hidden: Size | None = None
    bias: bool = True
    input_norm: bool = False
    shares: str = "after"
    noise: bool = False
    capacity: int | None = None
    shared: Size | None = None
    null: Size | None = None
    factorization: Factorization | None = None
    lowering: str = "auto"
    block: int = BLOCK
    kind: ClassVar[str] = "sparse_moe"

    def __post_init__(self) -> None:
        optional = [k for k in ("hidden", "capacity", "shared", "null") if getattr(self, k) is not None]
        self.check_sizes("inputs", "outputs", "experts", "active", *optional)
        self.check_flags("bias", "input_norm", "noise")
        self.check_choice("shares", SHARES)
        self.check_choice("lowering", LOWERINGS)
        self.check_factorization()
        experts, active = self.dim("experts"), self.dim("active")
        choices = experts if self.null is None else experts + self.dim("null")
        if isinstance(active, int) and isinstance(choices, int) and active > choices:
            raise DeclarationError(f"active must be at most experts = {choices}, got {active}")
        if self.capacity is not None and not isinstance(self.capacity, int):
            raise DeclarationError(f"capacity must be a percentage, an integer such as 125, got {self.capacity!r}")
        if self.capacity is not None and self.lowering == "masked":
            raise DeclarationError("capacity bounds the gathered form; the masked one has no slots: leave one out")
        if self.null is not None and (self.lowering == "masked" or self.capacity is not None or self.factorization):
            raise DeclarationError("null experts need the gathered form with full matrices and no capacity")
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise DeclarationError(f"block must be an integer of at least 1, got {self.block!r}")
        factorized = self.factorization is not None and self.factorization.kind != "dense"
        if self.block not in (1, BLOCK) and (self.lowering == "masked" or self.capacity or factorized):
            raise DeclarationError("block needs the gathered form with full matrices and no capacity: leave it out")
        if self.null is not None and self.shares != "normalised":
            raise DeclarationError('null experts divide the true shares by their sum: set shares="normalised"')

    @classmethod
    def fine_grained(
        cls, inputs: Size, hidden: int, outputs: Size, experts: int, active: int, granularity: int, **options: object
    ) -> SparseMoE:
        """Experts cut into `granularity` parts each, with as many times more of them chosen (arXiv 2402.07871).

        Raises:
            DeclarationError: if `granularity` does not divide `hidden`.
        """
        if hidden % granularity:
            raise DeclarationError(f"granularity = {granularity} must divide hidden = {hidden}")
        g = granularity
        return cls(inputs, outputs, g * experts, g * active, hidden // g, **options)  # type: ignore[arg-type]

    def layer(self) -> Layer:
        """The layer, before any order is chosen."""
        keys = ("inputs", "outputs", "experts", "active", "hidden", "shared", "null")
        b = Builder(self.dims(*keys), self.dim("inputs"))
        b.size("o", "O", self.dim("outputs"))
        experts = b.size("n", "N", self.dim("experts"))
        b.size("k", "k", self.dim("active"))
        if self.hidden is not None:
            b.size("h", "H", self.dim("hidden"))
        y = self._routed(b, experts)
        if self.shared is not None:
            b.size("g", "H_s", self.dim("shared"))
            base = b.feed_forward("shared_", b.x, "g", Value("shared", (DYNAMIC, "o"), "shared_down"), bias=self.bias)
            y = b.sum("y", y, base, "combine")
        return b.layer(
            "SparseMoE",
            y,
            self,
            couples_tokens=self.capacity is not None,
        )

    def lowerings(self) -> dict[str, dict[str, Any]]:
        """As of every declaration; but a masked form has neither slots, nor null experts, nor blocks of rows."""
        if self.capacity is not None or self.null is not None or self.block not in (1, BLOCK):
            return {}
        lowerings = Declaration.lowerings(self)
        return lowerings and lowerings | {"masked": {k: v for k, v in lowerings["masked"].items() if k != "block"}}

    def only_lowering(self) -> str:
        """As of every declaration."""
        if self.capacity is not None:
            return "its slots bound what runs, and a masked one has none"
        if self.null is not None:
            return "null experts compute nothing only where they are not run"
        if self.block not in (1, BLOCK):
            return "the declaration asks for blocks of rows, which a masked one has not"
        return Declaration.only_lowering(self)

    def _routed(self, b: Builder, experts: Dim) -> Value:
        shares, positions, column = route(b, self, experts)
        b.norm(self.input_norm)
        hidden = "h" if self.hidden is not None else None
        y = Value("routed" if self.shared is not None else "y", (DYNAMIC, "o"), "combine")
        if self.capacity is not None:
            b.coefficients = (shares.name, positions.name)
            return self._in_slots(b, experts, shares, positions, hidden, y)
        return chosen_experts(
            b,
            "",
            b.x,
            shares,
            positions,
            hidden,
            y,
            bias=self.bias,
            factorization=self.factorization,
            column=column,
            block=self.block,
            lowering=self.lowering,
        )

    def _in_slots(
        self, b: Builder, experts: Dim, shares: Value, positions: Value, hidden: str | None, y: Value
    ) -> Value:
        """A table of slots for each expert, full or not; batched products over it."""
        even = b.sizes.sizes["k"] * b.tokens / experts
        b.length("c", sympy.ceiling(sympy.Rational(self.capacity, 100) * even))
        held, rows = Value("held", ("n", "c"), "dispatch"), Value("rows", ("n", "c"), "dispatch", True)
        b.add(CapacitySlots(held, rows, shares, positions))
        b.diagnostics.append(Dropped(Value("dropped", (), "diagnostics", True), positions, rows))
        return slot_experts(b, b.x, held, rows, hidden, y, bias=self.bias, factorization=self.factorization)


def route(b: Builder, spec: SparseMoE, experts: Dim) -> tuple[Value, Value, str]:
    """Shares and positions (t, k) of the chosen experts, and the index that positions count along.

    Adds the load-balancing loss and the z-loss to the diagnostics.
    """
    column = "n"
    if spec.null is not None:
        null = b.size("null", "M", spec.dim("null"))
        column = "e"
        b.length("e", experts + null)
    logits = b.logits(b.x, column)
    chosen_from = logits
    if spec.noise:
        scale = Value("noise_scale", logits.indices, "gate")
        b.linear("noise_", b.x, scale, name="projection")
        chosen_from = Value("noisy_logits", logits.indices, "gate")
        b.add(Noise(chosen_from, logits, scale))
    probabilities = Value("probabilities", logits.indices, "gate")
    softmax = Softmax(probabilities, chosen_from, column)
    positions = Value("chosen", (DYNAMIC, "k"), "gate", True)
    shares = Value("shares", (DYNAMIC, "k"), "gate")
    if spec.shares == "after":
        top = Value("top_logits", shares.indices, "gate")
        b.add(TopK(top, positions, chosen_from, column), Softmax(shares, top, "k"))
        b.diagnostics.append(softmax)
    elif spec.shares == "before":
        b.add(softmax, TopK(shares, positions, probabilities, column))
    else:
        top = Value("top_probabilities", shares.indices, "gate")
        counted = positions if spec.null is not None else None
        b.add(softmax, TopK(top, positions, probabilities, column), Normalise(shares, top, counted, "n"))
    balance = LoadBalance(Value("load_balance_loss", (), "diagnostics"), probabilities, positions)
    b.diagnostics += [balance, ZLoss(Value("z_loss", (), "diagnostics"), logits)]
    return shares, positions, column
