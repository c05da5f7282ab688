"""What a time can be predicted for: a device that knows how long ops take, measured or by its data sheet."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Protocol, runtime_checkable

from tnmoe.errors import CostError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import Op, operands, results
from tnmoe.symbolic.dims import Dim


@runtime_checkable
class Device(Protocol):
    """A device; `DeviceProfile` (by calibration) and `Datasheet` are its two makers."""

    @property
    def name(self) -> str:
        """Of the device."""
        ...

    @property
    def source(self) -> str:
        """Where its figures come from."""
        ...

    @property
    def device(self) -> str:
        """The kind, "cpu" or "cuda"."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether its figures were measured, with as many threads as `source` says; else they are peaks."""
        ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that it has figures for, in the order of preference for planning."""
        ...

    def op_seconds(
        self, op: Op, sizes: Mapping[str, Dim], dtype: str, *, working_set: int = 0, fast: bool = False
    ) -> float:
        """Seconds of one op, without gradients; see `tnmoe.timing.predict.op_seconds`."""
        ...

    def call_seconds(self, dtype: str, *, parameters: int, calls: int, functions: int) -> float:
        """Seconds of a module's call itself.

        Args:
            dtype: of all values.
            parameters: uses of stored values, each of which is looked up.
            calls: of torch.
            functions: emitted functions with a backward pass of their own, called without gradients.
        """
        ...

    def graph_seconds(self, dtype: str, *, nodes: int, functions: int, leaves: int) -> float:
        """Seconds that autograd itself takes: nodes recorded and visited, functions in Python, gradients handed out."""
        ...

    def gradient_seconds(self, kind: str, dtype: str, *, count: int, length: int | None, passes: int) -> float | None:
        """Seconds of a gradient that has a kernel of its own; None where the device knows of none.

        Args:
            kind: of the forward op, one of `tnmoe.timing.rates.BACKWARD_STREAMS` and `BACKWARD_ROWWISE`.
            dtype: of all values.
            count: elements of the operand.
            length: of the index that it works along; None for one that works entry by entry.
            passes: values of that shape that it reads and writes.
        """
        ...

    def fill_seconds(self, dtype: str, count: int) -> float:
        """Seconds of so many elements of zeros."""
        ...


def check_bound(op: Op, sizes: Mapping[str, Dim]) -> None:
    """Raise `CostError` if a size of the op is no integer."""
    named: Set[str] = {i for v in (*operands(op), *results(op)) for i in v.indices}
    for index in named:
        if not isinstance(sizes[index], int):
            raise CostError(f"the size of {index!r} is {sizes[index]}, not an integer: bind the program first")


def entries(indices: tuple[str, ...], sizes: Mapping[str, Dim]) -> int:
    """Elements of an array with these indices, whose sizes are integers."""
    return int(elements(indices, sizes))
