"""How a plan's module is emitted where it has a backward pass of its own: what that keeps, its products, its chunks."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, Self

from tnmoe.autodiff.adjoint import Adjoint, adjoint
from tnmoe.autodiff.rematerialise import Memory, check_memory, choose, front
from tnmoe.errors import PlanError, unknown
from tnmoe.io.json_fields import Field
from tnmoe.ir.program import Program
from tnmoe.lowering.fuse_products import fusible
from tnmoe.symbolic.dims import LARGEST

FLAVOURS = ("portable", "fast", "triton")
"""torch's public products alone; or oneDNN's, or Triton kernels, where they are there and the operands allow it."""

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Function:
    """The end of a layer as one function, whose backward pass computes again what it has not kept.

    Attributes:
        kept: names of the results that are kept.
        flavour: of the matrix products, one of `FLAVOURS`.
        chunk: tokens that it takes at once; None for all.
        fused: names of results that its forward pass computes inside what reads them, if they are not kept.
        aside: under autocast plain statements run in its place: it is there for float32 products of the flavour `fast`
            alone, of which autocast leaves none, and nobody asked that it keep less.

    Raises:
        PlanError: an unknown flavour, a chunk that is no number of tokens, or a flavour that cannot fuse or step aside.
    """

    kept: tuple[str, ...]
    flavour: str = "portable"
    chunk: int | None = None
    fused: tuple[str, ...] = ()
    aside: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.flavour, str) or self.flavour not in FLAVOURS:
            raise PlanError(unknown("flavour", self.flavour, FLAVOURS))
        if self.chunk is not None and (type(self.chunk) is not int or not 1 <= self.chunk <= LARGEST):
            raise PlanError(f"chunk must be a number of tokens, at least 1, or None; got {self.chunk!r}")
        if self.fused and self.flavour != "triton":
            raise PlanError(f"only the flavour 'triton' fuses products, not {self.flavour!r}")
        if self.aside and (self.flavour != "fast" or self.chunk is not None):
            raise PlanError("only a function of the flavour 'fast' without chunks steps aside under autocast")

    def adjoint(self, program: Program, requires_grad: Set[str]) -> Adjoint:
        """Its forward and backward pass; sizes may be symbolic."""
        chunked = self.chunk is not None
        return adjoint(program, requires_grad, frozenset(self.kept), frozenset(self.fused), chunked=chunked)

    def to_mapping(self) -> dict[str, Any]:
        """The function as plain data, for JSON."""
        fused = {"fused": list(self.fused)} if self.fused else {}
        aside = {"aside": True} if self.aside else {}
        return {"kept": list(self.kept), "flavour": self.flavour, "chunk": self.chunk, **fused, **aside}

    @classmethod
    def read(cls, data: Field, program: Program, requires_grad: Set[str]) -> Self:
        """The function that `to_mapping` wrote, of that program.

        Raises:
            PlanError: if it is no such data, or keeps what the program's end does not make, or fuses what it cannot.
        """
        fields = data.keys("kept", "flavour", "chunk", optional=("fused", "aside"))
        ops = adjoint(program, requires_grad, chunked=fields["chunk"].value is not None).ops
        kept = fields["kept"].texts(op.out.name for op in ops)
        able = sorted(fusible(ops, {program.output.name}, _integers(program)))
        return cls(
            kept,
            fields["flavour"].choice(FLAVOURS),
            fields["chunk"].maybe(lambda tokens: tokens.integer(1, LARGEST)),
            fields["fused"].maybe(lambda names: names.texts(able)) or (),
            fields["aside"].maybe(Field.flag) or False,
        )


def plan_function(
    program: Program,
    requires_grad: Set[str],
    memory: Memory = None,
    flavour: str = "portable",
    chunk: int | None = None,
) -> Function | None:
    """The function that keeps what `memory` says; None if nothing asks for one.

    Args:
        program: bound.
        requires_grad: names of all values that need a gradient.
        memory, flavour, chunk: as in `tnmoe.plan`.

    Raises:
        PlanError: no such policy, flavour or chunk, a budget that cannot be met, or a program whose end has no adjoint.
    """
    unchosen = Function((), flavour, chunk, aside=memory is None and flavour == "fast" and chunk is None)
    if check_memory(memory) is None:
        if unchosen == Function(()):
            return None
        memory = "save"
    assert memory is not None
    whole = adjoint(program, requires_grad, chunked=chunk is not None)
    if chunk is not None:
        _ = whole.token  # raises where the tokens cannot be split
    sizes = _integers(program)
    choices = front(whole.ops, sizes, {v.name for v in whole.reads})

    def saved_bytes(kept: frozenset[str]) -> int:
        return FLOAT32_BYTES * int(replace(whole, kept=kept).saved_elements())

    choice = choose(choices, memory, int(whole.training_cost().flops), lambda c: saved_bytes(c.kept))
    able = fusible(whole.ops, {program.output.name}, sizes) if flavour == "triton" else frozenset()

    def named(names: Set[str]) -> tuple[str, ...]:
        return tuple(op.out.name for op in whole.ops if op.out.name in names)

    return replace(unchosen, kept=named(choice.kept), fused=named(able))


def _integers(program: Program) -> dict[str, int]:
    return {index: int(size) for index, size in program.sizes.items()}
