"""Amounts of work: FLOPs in the three classes of `tnmoe.costing.op_cost`, and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one operation.

    Attributes:
        matmul: 2 per multiplication in products of matrices, convolutions and attention.
        elementwise: 1 per product, sum or comparison of single elements.
        special: norms, softmax, gates and transcendental functions, each arithmetic operation on an element 1.
    """

    matmul: int = 0
    elementwise: int = 0
    special: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass through something takes.

    Attributes:
        matmul_flops, elementwise_flops, special_flops: as in `Flops`.
        read_bytes: of every operation's operands, each once an operation; elements of views that repeat count once.
        written_bytes: of every operation's results, views aside.
    """

    matmul_flops: int = 0
    elementwise_flops: int = 0
    special_flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def other_flops(self) -> int:
        """Element-wise and special FLOPs."""
        return self.elementwise_flops + self.special_flops

    @property
    def flops(self) -> int:
        """FLOPs of all classes."""
        return self.matmul_flops + self.other_flops

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmul_flops + other.matmul_flops,
            self.elementwise_flops + other.elementwise_flops,
            self.special_flops + other.special_flops,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
        )


@dataclass(frozen=True, slots=True)
class Uncounted:
    """Something that ran, or would run, and that no figure contains.

    Attributes:
        what: an operation, e.g. "aten.linalg_eigh", or the class of a module.
        path: of the module in which it ran; "" for the model itself.
        calls: how often.
        why: in a few words.
    """

    what: str
    path: str
    calls: int
    why: str

    def __str__(self) -> str:
        place = f" in {self.path}" if self.path else ""
        return f"{self.what}, {self.calls:,} call{'s' * (self.calls != 1)}{place} ({self.why})"
