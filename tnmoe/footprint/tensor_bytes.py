"""What the allocation rules read: the bytes of a bound program's values in one dtype, and which need a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace

from tnmoe.costing.saved import saved_inside
from tnmoe.ir.bound import BoundProgram
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.value import INTEGER_BYTES, Value


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of the values of a program.

    Attributes:
        program: whose sizes they have.
        itemsize: bytes of an element.
        requires_grad: names of all values that need a gradient; none in a pass without autograd.
    """

    program: BoundProgram
    itemsize: int
    requires_grad: Set[str] = frozenset()

    def of(self, value: Value) -> int:
        """Bytes of a value, or of its gradient."""
        return self.program.bytes(value, self.itemsize)

    def size(self, index: str) -> int:
        """Entries along an axis."""
        return self.program.sizes[index]

    def entries(self, indices: Iterable[str]) -> int:
        """Elements of an array with these indices."""
        return self.program.entries(indices)

    def lines(self, value: Value, index: str) -> int:
        """Elements of a value for each entry of one of its indices."""
        return self.entries(i for i in value.indices if i != index)

    def wanted(self, op: Op) -> tuple[Value, ...]:
        """Operands of an op that need a gradient."""
        return tuple(v for v in operands(op) if v.name in self.requires_grad)

    def needs(self, value: Value) -> bool:
        """Whether a value needs a gradient."""
        return value.name in self.requires_grad

    def kept_inside(self, op: Op) -> int:
        """Bytes that the backward of an op keeps and that are no value of the program."""
        inside = saved_inside(op, self.program.sizes, self.requires_grad)
        return int(self.itemsize * inside.elements + INTEGER_BYTES * inside.integers + inside.flags)

    def without_autograd(self) -> TensorBytes:
        """The same in a pass of which nobody wants a gradient."""
        return replace(self, requires_grad=frozenset())
