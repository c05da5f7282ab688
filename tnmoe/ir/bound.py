"""Programs whose sizes are integers, with what follows from their ops worked out once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import sympy

from tnmoe.errors import CostError
from tnmoe.ir.aliases import larger_storages, memory_owners
from tnmoe.ir.dataflow import gate_ops
from tnmoe.ir.initialise import bind_init
from tnmoe.ir.ops import Op
from tnmoe.ir.program import Program
from tnmoe.ir.value import INTEGER_BYTES, Value
from tnmoe.symbolic.dims import Dim, evaluate, symbol, symbol_names


@dataclass(frozen=True)
class BoundProgram(Program):
    """A program with integer sizes: what is emitted, executed, and whose memory is reported.

    `dataclasses.replace` gives a bound program again, which works anew what it is asked for.
    """

    sizes: Mapping[str, int]

    @cached_property
    def gates(self) -> tuple[Op, ...]:
        """The ops that run first, in a function of their own: see `gate_ops`."""
        return gate_ops(self)

    @cached_property
    def order(self) -> tuple[Op, ...]:
        """The ops as the emitted code runs them: those of the gates first."""
        first = set(self.gates)
        return self.gates + tuple(op for op in self.ops if op not in first)

    @cached_property
    def owner(self) -> Mapping[str, str]:
        """The value whose memory each value is, by name, in training: see `memory_owners`."""
        return memory_owners(self)

    @cached_property
    def evaluation_owner(self) -> Mapping[str, str]:
        """The same in evaluation mode."""
        return memory_owners(self, evaluation=True)

    @cached_property
    def storages(self) -> Mapping[str, Value]:
        """Results that are views of something larger, which is no value of the program: its shape, by their names."""
        return larger_storages(self)

    @cached_property
    def stored(self) -> frozenset[str]:
        """Names of parameters and buffers."""
        return frozenset(p.name for p in (*self.parameters, *self.buffers))

    def entries(self, indices: Iterable[str]) -> int:
        """Elements of an array with these indices."""
        return math.prod([self.sizes[i] for i in indices])

    def bytes(self, value: Value, itemsize: int) -> int:
        """Bytes of a value whose elements take `itemsize` bytes each, or those of an integer."""
        return (INTEGER_BYTES if value.integer else itemsize) * self.entries(value.indices)

    def resized(self, **sizes: int) -> Self:
        """The program at other sizes of some indices, e.g. of one chunk of its tokens."""
        return replace(self, sizes={**self.sizes, **sizes})


def bind(program: Program, values: Mapping[str, int]) -> BoundProgram:
    """The program with every size an integer and every initial scale a number, under `values` by symbol name."""
    bound = {f.name: getattr(program, f.name) for f in fields(Program)}
    bound |= {
        "sizes": {i: evaluate(d, values) for i, d in program.sizes.items()},
        "lengths": _bound_lengths(program, values),
        "parameters": tuple(replace(p, init=bind_init(p.init, values)) for p in program.parameters),
        "buffers": tuple(replace(p, init=bind_init(p.init, values)) for p in program.buffers),
    }
    return BoundProgram(**bound)


def as_bound(program: Program) -> BoundProgram:
    """The program, which has integer sizes.

    Raises:
        CostError: if it has formulas.
    """
    if isinstance(program, BoundProgram):
        return program
    for index, size in program.sizes.items():
        if not isinstance(size, int):
            raise CostError(f"memory is counted for given sizes only, not for {index} = {size}")
    return BoundProgram(**{f.name: getattr(program, f.name) for f in fields(Program)})


def _bound_lengths(program: Program, values: Mapping[str, int]) -> dict[str, Dim]:
    inputs = {i for v in program.inputs for i in v.indices}
    data = symbol_names(d for i, d in program.lengths.items() if i in inputs)
    known = {symbol(name): sympy.Integer(value) for name, value in values.items() if name not in data}
    return {i: d.xreplace(known) if isinstance(d, sympy.Expr) else d for i, d in program.lengths.items()}
