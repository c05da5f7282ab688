"""The options that ask something of a plan: how they are written, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from tnmoe.autodiff.backward_plan import FLAVOURS
from tnmoe.cli.inputs import parse_layout, parse_sizes
from tnmoe.costing.objective import FLOPS, NAMES, TIME, Objective, as_objective
from tnmoe.errors import DeclarationError
from tnmoe.ir.layer import Layer
from tnmoe.lowering.orient import LAYOUTS, Layout
from tnmoe.planning.plan import Plan
from tnmoe.planning.plan_layer import plan
from tnmoe.planning.request import PLANNERS


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is asked of every plan of a command; None, or nothing, is what was not given.

    The fields are named as the options are; `tnmoe.plan` says what they mean.

    Attributes:
        profile: a calibration's file, for the objective "time".
    """

    tokens: int | None = None
    profile: str | None = None
    size: Mapping[str, int] = field(default_factory=dict)
    objective: Objective | None = None
    calls: int | None = None
    saved_limit: int | None = None
    memory_limit: int | None = None
    planner: str | None = None
    budget: float | None = None
    keep: str | int | None = None
    flavour: str | None = None
    chunk: int | None = None
    layout: Layout | None = None

    @classmethod
    def of(cls, given: argparse.Namespace, *, own_profile: bool = False) -> PlanOptions:
        """What the command line says; all of its texts are read here.

        Args:
            given: as argparse gives it, of a parser that `add_plan_options` was called for.
            own_profile: True if the command has its own use for `--profile`; then plans take it if they need it.
        """
        size = parse_sizes(given.size)
        objective = None if given.objective is None else as_objective(given.objective)
        keep = given.keep
        return cls(
            tokens=given.tokens,
            profile=None if own_profile and objective != TIME else given.profile,
            size=size,
            objective=objective,
            calls=given.calls,
            saved_limit=given.saved_limit,
            memory_limit=given.memory_limit,
            planner=given.planner,
            budget=given.budget,
            keep=int(keep) if keep is not None and keep.isdecimal() else keep,
            flavour=given.flavour,
            chunk=given.chunk,
            layout=None if given.layout is None else parse_layout(given.layout),
        )

    @property
    def instructions(self) -> tuple[str, ...]:
        """The options given that say how to plan: a plan that is made already has no use for them."""
        named = [f.name for f in fields(self) if f.name not in ("tokens", "profile")]
        return tuple(f"--{name.replace('_', '-')}" for name in named if getattr(self, name) not in (None, {}))

    def plan(self, layer: Layer, sizes: Mapping[str, int], tokens: int) -> Plan:
        """A plan of a layer.

        Args:
            layer: what to plan.
            sizes: values of its symbols, besides those that the options give.
            tokens: if the options do not say.

        Raises:
            DeclarationError: a symbol without a value; and whatever `tnmoe.plan` raises.
        """
        known = {**sizes, **self.size}
        own = {layer.token_symbol} if layer.batched else set()
        for name in sorted(layer.free_symbols - own - set(known)):
            raise DeclarationError(f"{name} has no value: add --size {name}=…, or a table [sizes] to the file")
        return plan(
            layer,
            tokens=tokens if self.tokens is None else self.tokens,
            sizes=known,
            objective=FLOPS if self.objective is None else self.objective,
            calls=self.calls,
            saved_limit=self.saved_limit,
            memory_limit=self.memory_limit,
            profile=self.profile,
            planner=self.planner or "auto",
            budget=self.budget,
            memory=self.keep,
            flavour=self.flavour or "portable",
            chunk=self.chunk,
            layout="auto" if self.layout is None else self.layout,
        )


def add_plan_options(sub: argparse.ArgumentParser, *, own_profile: bool = False) -> None:
    """Add the options that `PlanOptions.of` reads, but for `--profile` where a command has its own use for it."""
    sub.add_argument("--tokens", type=int, metavar="T", help="rows of input (default: the preset's, else 1024)")
    sub.add_argument("--size", action="append", default=[], metavar="NAME=N", help="value of a symbol; may be repeated")
    sub.add_argument(
        "--objective",
        metavar="WHAT",
        help=f"what the planner minimises: {', '.join(NAMES)}; a sum such as "
        "'training + 0.5*saved', or several such as 'saved, flops', the first deciding (default: flops)",
    )
    sub.add_argument(
        "--calls", type=int, metavar="N", help="forward passes between updates of the weights, for inference"
    )
    sub.add_argument(
        "--saved-limit", type=int, metavar="N", help="elements that may be kept for the backward pass at most"
    )
    sub.add_argument(
        "--memory-limit", type=int, metavar="BYTES", help="bytes alive at once in a forward pass (float32) at most"
    )
    if not own_profile:
        sub.add_argument("--profile", metavar="FILE", help="a calibration, for --objective time")
    sub.add_argument("--planner", choices=["auto", *PLANNERS], help="default: auto")
    sub.add_argument(
        "--keep",
        metavar="WHAT",
        help="a backward pass of the module's own: save, recompute, or the bytes that it may keep at most",
    )
    sub.add_argument("--flavour", choices=FLAVOURS, help="products of that (default: portable)")
    sub.add_argument("--chunk", type=int, metavar="T", help="tokens that it takes at once")
    sub.add_argument(
        "--layout",
        metavar="WHAT",
        help=f"how weights are stored: {', '.join(LAYOUTS)}, or NAME,… of those that are (columns, inner)",
    )
    sub.add_argument("--budget", type=float, metavar="S", help="seconds to search orders of a large network")
