"""Variants: how one order may be emitted, in all that changes its time and not its result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tnmoe.autodiff.backward_plan import FLAVOURS, FLOAT32_BYTES, Function, plan_function
from tnmoe.autodiff.rematerialise import Memory, check_memory
from tnmoe.costing.backward import gradient_names
from tnmoe.errors import PlanError, unknown
from tnmoe.lowering.orient import LAYOUTS
from tnmoe.planning.plan import Plan

PLANNED = "planned"
"""A memory policy: what the given plan keeps, for its own order; for another one, at most as many bytes."""

CHUNKS = (256, 512, 1024, 2048)
"""Tokens at once that are tried by default: temporaries of a block fit into caches, and products are large still."""

LIMITED = {
    "fast": frozenset({("cpu", "float32")}),
    "triton": frozenset({("cuda", "float32"), ("cuda", "bfloat16"), ("cuda", "float16")}),
}
"""Devices and dtypes to which a flavour is limited; elsewhere it runs what "portable" runs."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Everything about a candidate but its order.

    Attributes:
        layout: of its weights, as in `Plan.store`.
        flavour, chunk: as in `plan`.
        memory: as in `plan`, or `PLANNED`.
    """

    layout: str | tuple[str, ...] = "auto"
    flavour: str = "portable"
    chunk: int | None = None
    memory: Memory = None

    def of(self, planned: Plan) -> Plan:
        """The plan, emitted that way.

        Raises:
            PlanError: a name or number that is none, or a layer that cannot be emitted so.
        """
        planned = planned.store(self.layout)
        memory = None if self.memory == PLANNED else self.memory
        if self.memory == PLANNED and planned.function is not None:
            aside = planned.function.aside and self.flavour == "fast" and self.chunk is None
            own = replace(planned.function, flavour=self.flavour, chunk=self.chunk, aside=aside)
            same = replace(planned, function=own)
            if self.chunk is not None:
                _ = same.adjoint.token  # type: ignore[union-attr]  # raises without one
            if same.saved <= planned.saved:
                return same
            memory = FLOAT32_BYTES * planned.saved  # in chunks, autograd keeps what weights alone make
        requires_grad = gradient_names(planned.bound, planned.input_gradients)
        function = plan_function(planned.bound, requires_grad, memory, self.flavour, self.chunk)
        return replace(planned, function=function)


def variant_of(planned: Plan) -> Variant:
    """How a plan is emitted."""
    turned, function = planned.turned, planned.function
    layout: str | tuple[str, ...] = "auto" if turned is None else turned or "rows"
    if function is None:
        return Variant(layout)
    return Variant(layout, function.flavour, function.chunk, PLANNED)


@dataclass(frozen=True, slots=True)
class Choices:
    """What may vary; each a tuple without repetitions, what is tried first in front."""

    layouts: tuple[str | tuple[str, ...], ...] = LAYOUTS
    flavours: tuple[str, ...] = FLAVOURS
    chunks: tuple[int | None, ...] = (None,)
    memory: tuple[Memory, ...] = (None,)

    def all(self) -> Iterator[Variant]:
        """All of them, that which comes first everywhere in front."""
        return (v for chunk in self.chunks for v in self.wide(chunk))

    def wide(self, chunk: int | None) -> Iterator[Variant]:
        """All layouts, flavours and memory policies, with one chunk."""
        for layout, memory, flavour in product(self.layouts, self.memory, self.flavours):
            yield Variant(layout, flavour, chunk, memory)

    def deep(self, variant: Variant) -> Iterator[Variant]:
        """One variant with every chunk."""
        return (replace(variant, chunk=chunk) for chunk in self.chunks)


def choices(
    given: Variant,
    *,
    tokens: int | None,
    device: str,
    dtype: str,
    training: bool,
    layouts: Iterable[str | Iterable[str]] | None = None,
    flavours: Iterable[str] | None = None,
    chunks: Iterable[int | None] | None = None,
    memory: Iterable[Memory] | None = None,
) -> Choices:
    """What is allowed by name, or by default; what the given plan has comes first where it is among that.

    Raises:
        PlanError: a name or number that is none, or nothing to choose from.
    """
    offered = [f for f in FLAVOURS if f not in LIMITED or (device, dtype) in LIMITED[f]]
    sizes = [c for c in CHUNKS if tokens is not None and c < tokens]
    policies: list[Memory] = [PLANNED] if given.memory == PLANNED else [None, "save"] if training else [None]
    allowed = Choices(
        _listed("layouts", [given.layout, *LAYOUTS] if layouts is None else map(_plain, _many("layouts", layouts))),
        _listed("flavours", [given.flavour, *offered] if flavours is None else _many("flavours", flavours)),
        _listed("chunks", [given.chunk, None, *sizes] if chunks is None else _many("chunks", chunks)),
        _listed("memory", policies if memory is None else _many("memory", memory)),
    )
    for flavour, chunk in product(allowed.flavours, allowed.chunks):
        Function((), flavour, chunk)  # which checks them
    for layout in allowed.layouts:
        if isinstance(layout, str) and layout not in LAYOUTS:
            raise PlanError(unknown("layout", layout, LAYOUTS))
    for policy in allowed.memory:
        if policy != PLANNED:
            check_memory(policy)
    return Choices(
        _led(allowed.layouts, given.layout),
        _led(allowed.flavours, given.flavour),
        _led(allowed.chunks, given.chunk),
        _led(allowed.memory, given.memory),
    )


def _many(what: str, given: object) -> Iterable[object]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise PlanError(f"{what} must be several, such as a tuple; got {given!r}")
    return given


def _plain(layout: object) -> object:
    """A layout, with names as a tuple."""
    return tuple(layout) if isinstance(layout, Iterable) and not isinstance(layout, str) else layout


def _listed(what: str, given: Iterable[object]) -> tuple[Any, ...]:
    """The members, each once (True is not 1)."""
    members = list({(type(member), member): member for member in given}.values())
    if not members:
        raise PlanError(f"{what} names nothing to choose from")
    return tuple(members)


def _led(members: tuple[Any, ...], first: object) -> tuple[Any, ...]:
    """With `first` in front, if it is one of them."""
    return (*(m for m in members if m == first), *(m for m in members if m != first))
