"""How a plan's module is emitted where it has a backward pass of its own: what that keeps, its products, its chunks."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Self

from tnmoe.adjoint import Adjoint, adjoint
from tnmoe.dims import LARGEST
from tnmoe.errors import PlanError, unknown
from tnmoe.program import Program
from tnmoe.rematerialise import Memory, check_memory, choose, front

FLAVOURS = ("portable", "fast")
"""torch's public products alone; or oneDNN's where torch has them and the operands allow it."""

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Function:
    """The end of a layer as one function, whose backward pass computes again what it has not kept.

    Attributes:
        kept: names of the results that are kept.
        flavour: of the matrix products, one of `FLAVOURS`.
        chunk: tokens that it takes at once; None for all.

    Raises:
        PlanError: an unknown flavour, or a chunk that is no number of tokens.
    """

    kept: tuple[str, ...]
    flavour: str = "portable"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.flavour, str) or self.flavour not in FLAVOURS:
            raise PlanError(unknown("flavour", self.flavour, FLAVOURS))
        if self.chunk is not None and (type(self.chunk) is not int or not 1 <= self.chunk <= LARGEST):
            raise PlanError(f"chunk must be a number of tokens, at least 1, or None; got {self.chunk!r}")

    def adjoint(self, program: Program, needing: Set[str]) -> Adjoint:
        """Its forward and backward pass; sizes may be symbolic."""
        return adjoint(program, needing, frozenset(self.kept), chunked=self.chunk is not None)

    def to_mapping(self) -> dict[str, Any]:
        """The function as plain data, for JSON."""
        return {"kept": list(self.kept), "flavour": self.flavour, "chunk": self.chunk}

    @classmethod
    def from_mapping(cls, data: Any, program: Program, needing: Set[str]) -> Self:
        """The function that `to_mapping` wrote.

        Raises:
            PlanError: if it is no such data, or keeps what the program's end does not make.
        """
        if not isinstance(data, Mapping) or set(data) != {"kept", "flavour", "chunk"}:
            raise PlanError(f"the function of a plan must have kept, flavour and chunk; got {data!r}")
        made = [op.out.name for op in adjoint(program, needing, chunked=data["chunk"] is not None).ops]
        kept = data["kept"]
        if not isinstance(kept, list) or not all(isinstance(name, str) and name in made for name in kept):
            raise PlanError(f"kept must be some of {', '.join(made)}; got {kept!r}")
        return cls(tuple(kept), data["flavour"], data["chunk"])


def plan_function(
    program: Program, needing: Set[str], memory: Memory = None, flavour: str = "portable", chunk: int | None = None
) -> Function | None:
    """The function that keeps what `memory` says; None if nothing asks for one.

    Args:
        program: bound.
        needing: names of all values that need a gradient.
        memory, flavour, chunk: as in `tnmoe.plan`.

    Raises:
        PlanError: no such policy, flavour or chunk, a budget that cannot be met, or a program whose end has no adjoint.
    """
    unchosen = Function((), flavour, chunk)
    if check_memory(memory) is None:
        if unchosen == Function(()):
            return None
        memory = "save"
    assert memory is not None
    whole = adjoint(program, needing, chunked=chunk is not None)
    if chunk is not None:
        _ = whole.token  # raises where the tokens cannot be split
    sizes = {index: int(size) for index, size in program.sizes.items()}
    choices = front(whole.ops, sizes, {v.name for v in whole.reads})

    def saved_bytes(kept: frozenset[str]) -> int:
        return FLOAT32_BYTES * int(replace(whole, kept=kept).saved_elements())

    found = choose(choices, memory, int(whole.training_cost().flops), lambda c: saved_bytes(c.kept))
    return replace(unchosen, kept=tuple(op.out.name for op in whole.ops if op.out.name in found.kept))
