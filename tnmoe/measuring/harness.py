"""Candidates on trial: modules over the same weights and data, which have to agree before they are timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tnmoe.backends.torch.names import attribute
from tnmoe.emission.build import build
from tnmoe.errors import EmitError
from tnmoe.ir.pointwise_ops import Sparsemax
from tnmoe.ir.routing_ops import RoutingOp
from tnmoe.ir.value import Parameter
from tnmoe.measuring.race import Runner
from tnmoe.measuring.timer import of_device
from tnmoe.planning.plan import Plan

if TYPE_CHECKING:
    import torch

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 0.03, "bfloat16": 0.1}
"""How far the results of two candidates may lie apart, relative to the size of a token's result."""

SWITCHED = 0.01
"""Share of the tokens that may differ where experts are chosen: a near-tie falls as the products are rounded."""


@dataclass(slots=True)
class Bench:
    """Weights, data and results that all candidates of a layer share.

    Weights are drawn, not initialised: gates that start at zero would treat all experts alike.

    Args:
        planned: any plan of the layer at the sizes to measure.
        device, dtype, training: as in `tune`.
    """

    planned: Plan
    device: str
    dtype: str
    training: bool
    drawn: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    stored: dict[tuple[str, tuple[str, ...]], torch.Tensor] = field(init=False, default_factory=dict)
    inputs: list[torch.Tensor] = field(init=False)
    expected: list[torch.Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        import torch  # planning and costing do without

        generator = torch.Generator(self.device).manual_seed(0)
        kind: torch.dtype = getattr(torch, self.dtype)
        sizes, layer = self.planned.bound.sizes, self.planned.layer

        def draw(indices: Sequence[str]) -> torch.Tensor:
            return torch.randn([int(sizes[i]) for i in indices], device=self.device, generator=generator)

        def weight(p: Parameter) -> torch.Tensor:
            if p in layer.buffers:  # running means and variances
                return draw(p.indices).abs() + 0.5
            return draw(p.indices) / math.sqrt(max(1, math.prod(int(sizes[i]) for i in p.indices[:-1])))

        for p in (*layer.parameters, *layer.buffers):
            self.drawn[p.name] = weight(p).to(kind)
        self.inputs = [
            draw(v.indices).to(kind).requires_grad_(self.training and v.name in self.planned.input_gradients)
            for v in self.planned.bound.inputs
        ]

    def runner(self, planned: Plan) -> Runner:
        """A candidate, ready to be timed.

        Raises:
            EmitError: a layer that cannot be built, or a result that differs from that of the first candidate.
        """
        import torch  # planning and costing do without

        module = self._module(planned)
        leaves = [t for t in (*module.parameters(), *self.inputs) if self.training and t.requires_grad]

        def run() -> None:
            if leaves:
                y = module(*self.inputs)
                torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
            else:
                with torch.no_grad():
                    module(*self.inputs)

        self._compare(planned, module, leaves)
        return Runner(run, of_device(self.device))

    def _module(self, planned: Plan) -> torch.nn.Module:
        """The module, over the shared weights: each order of axes is in memory once."""
        module = build(planned, device="meta")
        declared = {p.name: p.indices for p in (*planned.layer.parameters, *planned.layer.buffers)}
        state = {}
        for p in (*planned.bound.parameters, *planned.bound.buffers):
            key = p.name, p.indices
            if key not in self.stored:
                order = [declared[p.name].index(i) for i in p.indices]
                self.stored[key] = self.drawn[p.name].permute(order).contiguous()
            state[attribute(p.name)] = self.stored[key]
        module.load_state_dict(state, assign=True)
        return module

    def _compare(self, planned: Plan, module: torch.nn.Module, leaves: Sequence[torch.Tensor]) -> None:
        import torch  # planning and costing do without

        state = {name: buffer.clone() for name, buffer in module.named_buffers()}  # which a pass may update
        with torch.random.fork_rng(enabled=True), torch.set_grad_enabled(bool(leaves)):
            torch.manual_seed(0)  # of layers that draw noise
            y = module(*self.inputs)
        rows = [y.detach().reshape(y.shape[0] if y.ndim > 1 else 1, -1)]
        chooses = any(isinstance(op, RoutingOp | Sparsemax) for op in planned.bound.ops)
        if leaves and not chooses:  # where experts are chosen, gradients jump as the choice does
            seed = torch.randn(y.shape, device="cpu", generator=torch.Generator().manual_seed(1)).to(y)
            gradients = torch.autograd.grad(y, leaves, seed, allow_unused=True)
            rows += self._declared(planned, leaves, gradients)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(state[name])
        if not self.expected:
            self.expected = rows
            return
        for got, wanted in zip(rows, self.expected, strict=True):
            apart = (got.float() - wanted.float()).norm(dim=1)
            size = wanted.float().norm(dim=1)
            reach = TOLERANCES[self.dtype] * size.clamp(min=float(size.square().mean().sqrt()))
            finite = wanted.isfinite().all(1)
            share = float((~(apart <= reach) & finite).float().mean())
            if share > (SWITCHED if chooses else 0):
                raise EmitError(
                    f"a candidate of {planned.layer.name} differs from the first one in {100 * share:.3g} % of its "
                    f"rows, by up to {float((apart / size)[finite].max()):.1e}, where {TOLERANCES[self.dtype]:.0e} is "
                    f"rounding; this is a fault of tnmoe: orders {planned.orders}, stored (columns, inner) "
                    f"{planned.turned}, {planned.function}"
                )

    def _declared(
        self, planned: Plan, leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Gradients as rows, those of weights in the order of axes of the declaration."""
        known = {t.data_ptr(): key for key, t in self.stored.items()}
        declared = {p.name: p.indices for p in planned.layer.parameters}
        named = {}
        for k, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            if gradient is None:
                continue
            name, indices = known.get(leaf.data_ptr(), ("", ()))
            if name:
                gradient = gradient.permute([indices.index(i) for i in declared[name]])
            named[name or f"input {k - len(leaves)}"] = gradient.reshape(1, -1)
        return [named[name] for name in sorted(named)]
