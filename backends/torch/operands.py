"""How the operands of emitted statements are written: by name, as matrices, with axes that broadcast."""

from __future__ import annotations

import keyword
from collections import Counter
from dataclasses import dataclass, field

from tnmoe.backends.torch.names import LOCALS, attribute, safe
from tnmoe.errors import EmitError
from tnmoe.ir.ops import results
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value


@dataclass
class Operands:
    """Writes the values of a program.

    Attributes:
        program: laid out.
        attributes: stored values are attributes of a module; else they are arguments of a function.
        product: function that multiplies two matrices; by default the operator.
        margin: columns by which statements will be indented.
        gelu: function that writes GELU over its operand.

    Raises:
        EmitError: two values that would be written alike, or an op without a torch form.
    """

    program: Program
    attributes: bool = True
    product: str = "@"
    margin: int = 8
    gelu: str = "torch.ops.aten.gelu_"
    stored: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        stored = (*self.program.parameters, *self.program.buffers)
        self.stored = frozenset(p.name for p in stored if self.attributes)
        names = [v.name for v in self.program.leaves] + [
            v.name for op in self.program.ops + self.program.diagnostics for v in results(op)
        ]
        written = Counter(self.ref(name) for name in names)
        clash = [name for name in names if written[self.ref(name)] > 1]
        if clash:
            raise EmitError(f"{clash[0]!r} and {clash[1]!r} would both be written {self.ref(clash[0])!r}; rename one")

    def ref(self, name: str) -> str:
        """How the value `name` is written."""
        if name in self.stored:
            return f"self.{attribute(name)}"
        if name.startswith(("size_", "room_")) or name.endswith("_all"):
            return name + "_"  # as `runtime_sizes` and streamed functions call their variables
        return safe(name, LOCALS | frozenset(keyword.softkwlist))

    def matrix(self, value: Value, batch: tuple[str, ...], rows: tuple[str, ...], cols: tuple[str, ...]) -> str:
        """`value` viewed as (batch…, rows, cols)."""
        single = tuple((i,) for i in batch)
        if value.indices == (*batch, *rows, *cols):
            return self.view(value, (*single, rows, cols))
        return self.view(value, (*single, cols, rows)) + ".mT"

    def view(self, value: Value, groups: tuple[tuple[str, ...], ...]) -> str:
        """`value` with each group of neighbouring axes merged, and an axis of size 1 for an empty group."""
        text = self.ref(value.name)
        axis = len(value.indices)
        for k in range(len(groups) - 1, -1, -1):
            size = len(groups[k])
            axis -= size
            if size > 1:
                last = "" if axis + size == len(value.indices) else str(axis + size - 1)
                text += f".flatten({', '.join(filter(None, (str(axis or '') or ('0' if last else ''), last)))})"
        for k, group in enumerate(groups):
            if not group:
                text += f".unsqueeze({k})"
        return text

    def lengths(self, group: tuple[str, ...]) -> list[str]:
        """The sizes of some axes that a view names; the first one that only the data knows is -1."""
        free = [i for i in group if i in self.program.dynamic]
        return [str(self.program.sizes[i]) if i not in free else "-1" if i == free[0] else f"size_{i}" for i in group]

    def spread(self, value: Value, out: Value) -> str:
        """`value` with axes of size 1 so that it broadcasts against `out`."""
        text = self.ref(value.name)
        first = next((k for k, i in enumerate(out.indices) if i in value.indices), len(out.indices))
        for k, index in enumerate(out.indices[first:]):
            if index not in value.indices:
                text += f".unsqueeze({k})"
        return text
