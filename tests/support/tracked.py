"""Emitted modules under torch's MemTracker, with a load of the experts that is known."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tnmoe.ir.routing_ops import GroupedContract
from tnmoe.planning.plan import Plan


class Tracked(NamedTuple):
    """Bytes: the most in the pass so far, and those alive after it."""

    peak: int
    after: int


def spread_evenly(module: nn.Module, plan: Plan) -> None:
    """Make every true expert of sorted rows the choice of as many slots, and no null one.

    Choices are overwritten where they are, with the tracker off: nothing else changes.
    """
    true = {int(plan.bound.sizes[op.rhs.indices[0]]) for op in plan.bound.ops if isinstance(op, GroupedContract)}
    names: dict[str, Any] = type(module).forward.__globals__
    if "sort_slots" not in names or not true:
        return
    (experts,), sort = true, names["sort_slots"]

    def sorted_evenly(positions: Tensor, *rest: int) -> Any:
        with _disable_current_modes():
            even = torch.arange(positions.numel(), device=positions.device) % experts
            positions.data.copy_(even.view(positions.shape))
        return sort(positions, *rest)

    names["sort_slots"] = sorted_evenly


class Storages(TorchDispatchMode):
    """Bytes of all storages that an op has made, of sparse tensors those of their positions and entries."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0
        for t in known:
            self.see(t)

    def see(self, t: Tensor) -> None:
        """Count a tensor's storage until it is gone."""
        with _disable_current_modes():
            for part in (t._indices(), t._values()) if t.is_sparse else (t,):
                storage = part.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.see(t)
        return out


def track_sparse(module: nn.Module, inputs: list[Tensor]) -> tuple[Tracked, ...]:
    """As `track` with gradients, which may be sparse."""
    with Storages([*module.parameters(), *module.buffers(), *inputs]) as found:
        y: Tensor = module.forward(*inputs)
        forward = Tracked(found.peak, sum(found.live.values()))
        gradient = torch.empty_like(y)
        y.backward(gradient)
        return forward, Tracked(found.peak, sum(found.live.values()))


def track(module: nn.Module, inputs: list[Tensor], *, grad: bool) -> tuple[Tracked, ...]:
    """What torch's tracker sees of a forward pass without grad, or of a forward and then of a backward pass.

    `forward` is called past the module's hooks, for the tracker's own fail on a frozen parameter; all that they do is
    to sort the bytes into classes.
    """
    found = MemTracker()
    found.track_external(module, *inputs)

    def now() -> Tracked:
        most = found.get_tracker_snapshot("peak").values()
        alive = found.get_tracker_snapshot("current").values()
        return Tracked(sum(s["Total"] for s in most), sum(s["Total"] for s in alive))

    with found, contextlib.nullcontext() if grad else torch.no_grad():
        y: Tensor = module.forward(*inputs)
        forward = now()
        if not y.requires_grad:
            return (forward,)
        gradient = torch.empty_like(y)
        y.backward(gradient)
        return forward, now()


def ready(module: nn.Module, *, grad: bool, frozen: Collection[str] = ()) -> nn.Module:
    """The module in its mode, with the parameters `frozen` that get no gradient."""
    for name, p in module.train(grad).named_parameters():
        p.requires_grad_(p.requires_grad and name not in frozen)
    return module
