"""The figures of a program: each has a name, a meaning and one rule, which gives its number and its formula alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, overload

import sympy

from tnmoe.autodiff.backward_plan import Function
from tnmoe.costing.op_cost import Estimate
from tnmoe.costing.saved import saved_flags, saved_integers
from tnmoe.costing.traffic import (
    active_parameters,
    touched_parameters,
)
from tnmoe.errors import CostError, unknown
from tnmoe.ir.bound import BoundProgram, bind
from tnmoe.ir.layer import Layer
from tnmoe.ir.program import Program
from tnmoe.ir.rank import layer_rank
from tnmoe.ir.value import DTYPE_BYTES, INTEGER_BYTES
from tnmoe.reports.counted import Counted
from tnmoe.symbolic.dims import Dim
from tnmoe.symbolic.formulas import simplify


class Figure:
    """A figure as an attribute of `Figures`: reading it there gives the number.

    Attributes:
        heading: in tables.
        of: its rule, for integers and for symbols.
    """

    def __init__(self, heading: str, meaning: str, of: Callable[[Counted], Dim]) -> None:
        self.heading, self.of, self.__doc__ = heading, of, meaning
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, report: None, owner: type) -> Self: ...
    @overload
    def __get__(self, report: Figures, owner: type) -> int: ...
    def __get__(self, report: Figures | None, owner: type) -> Self | int:
        return self if report is None else report.number(self.name)


@dataclass(frozen=True)
class Figures:
    """Figures of one layer at given sizes, as attributes; each has its formula as well.

    Attributes:
        layer: what is costed.
        program: laid out, with symbolic sizes.
        values: the integer of every symbol, the tokens `T` included.
        dtype: of weights and activations, for the byte counts.
        input_gradients: names of the inputs that need a gradient, for the figures about training.
        function: what the emitted module computes with a backward pass of its own; None if autograd does it.
        without_padding: count a forward pass as if no axis were padded.
        frozen: parameters that were frozen since the function was planned; the program has them as such.

    Raises:
        CostError: an unknown dtype, or a symbol without a value.
    """

    layer: Layer
    program: Program
    values: Mapping[str, int]
    dtype: str = "float32"
    input_gradients: tuple[str, ...] = ()
    function: Function | None = None
    without_padding: bool = False
    frozen: frozenset[str] = frozenset()

    parameters = Figure("parameters", "Stored weights, biases included, buffers not.", lambda c: c.estimate.parameters)
    trained_parameters = Figure("trained", "Stored weights that are not frozen.", lambda c: c.trained)
    active_parameters = Figure(
        "active",
        "Weights that one token meets: of routed experts those that it chooses.",
        lambda c: active_parameters(c.program),
    )
    touched_parameters = Figure(
        "touched",
        "Weights that the whole batch reads at most, if its tokens choose differently.",
        lambda c: touched_parameters(c.program),
    )
    macs = Figure("MACs", "Products in contraction steps, of one forward pass.", lambda c: c.work.macs)
    flops = Figure("FLOPs", "FLOPs of all classes, of one forward pass.", lambda c: c.work.flops)
    matmul_flops = Figure(
        "matmul",
        "FLOPs of contractions that sum; what `torch.utils.flop_counter` counts.",
        lambda c: c.work.matmul_flops,
    )
    elementwise_flops = Figure(
        "element-wise", "FLOPs of products without a sum, and of additions.", lambda c: c.work.elementwise_flops
    )
    special_flops = Figure("special", "FLOPs of norms, gates and GELU.", lambda c: c.work.special_flops)
    max_rank = Figure(
        "max rank",
        "Largest rank an expert's matrix can have; of several maps the smallest. 0 for a bare network.",
        lambda c: layer_rank(c.layer, c.program.sizes),
    )
    weight_bytes = Figure(
        "weight bytes",
        "Bytes of parameters and buffers.",
        lambda c: c.width * (c.estimate.parameters + c.estimate.buffers),
    )
    activation_bytes = Figure(
        "activation bytes",
        "Bytes of every intermediate that one forward pass writes, the result included.",
        lambda c: c.width * c.work.activations,
    )
    read_bytes = Figure(
        "read bytes",
        "Bytes of every op's operands in one forward pass, each operand once an op.",
        lambda c: c.width * c.read,
    )
    training_flops = Figure(
        "training FLOPs", "FLOPs of all classes, of one forward and backward pass.", lambda c: c.training.flops
    )
    training_matmul_flops = Figure(
        "training matmul",
        "Matmul FLOPs of one forward and backward pass; what `torch.utils.flop_counter` counts.",
        lambda c: c.training.matmul_flops,
    )
    backward_flops = Figure(
        "backward FLOPs",
        "FLOPs of all classes, of one backward pass, each gradient that is needed.",
        lambda c: c.training.flops - c.work.flops,
    )
    backward_matmul_flops = Figure(
        "backward matmul",
        "Matmul FLOPs of one backward pass.",
        lambda c: c.training.matmul_flops - c.work.matmul_flops,
    )
    backward_elementwise_flops = Figure(
        "backward element-wise",
        "Element-wise FLOPs of one backward pass.",
        lambda c: c.training.elementwise_flops - c.work.elementwise_flops,
    )
    backward_special_flops = Figure(
        "backward special",
        "Special FLOPs of one backward pass.",
        lambda c: c.training.special_flops - c.work.special_flops,
    )
    backward_read_bytes = Figure(
        "backward read bytes",
        "Bytes that one backward pass reads: of each op its operands, and what was saved for it.",
        lambda c: c.width * c.backward_traffic.read,
    )
    backward_written_bytes = Figure(
        "backward written bytes",
        "Bytes of the gradients that one backward pass writes, those in between included.",
        lambda c: c.width * c.backward_traffic.written,
    )
    saved_bytes = Figure(
        "saved bytes",
        "Bytes kept for the backward pass, parameters, buffers and inputs aside; what saved-tensor hooks see, and "
        "is there when the forward pass is done. "
        "The formula is for T > 1: one row has no statistics of a batch norm, and needs no copies of what it chooses.",
        lambda c: (
            c.width * c.saved
            + INTEGER_BYTES * saved_integers(c.program, c.requires_grad)
            + saved_flags(c.program, c.requires_grad)
        ),
    )
    gradient_bytes = Figure(
        "gradient bytes",
        "Bytes of the trained weights' gradients; of sparse ones the rows that they hold, with their positions.",
        lambda c: c.gradients,
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise CostError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPE_BYTES)}")

    @cached_property
    def bound(self) -> BoundProgram:
        """The program with integer sizes."""
        return bind(self.program, self.values)

    @cached_property
    def _integers(self) -> Counted:
        return self._counted(self.bound)

    @cached_property
    def _symbols(self) -> Counted:
        return self._counted(self.program)

    def _counted(self, program: Program) -> Counted:
        width = DTYPE_BYTES[self.dtype]
        function, frozen = self.function, self.frozen
        return Counted(self.layer, program, width, self.input_gradients, function, self.without_padding, frozen)

    @property
    def executed(self) -> Program:
        """The program with integer sizes as its forward pass runs, whose ops `numbers` counts."""
        return self._integers.executed

    @property
    def numbers(self) -> Estimate:
        """The cost of each op, in integers."""
        return self._integers.estimate

    @property
    def formulas(self) -> Estimate:
        """The same code, run on the symbols."""
        return self._symbols.estimate

    @property
    def requires_grad(self) -> frozenset[str]:
        """Names of the values that need a gradient."""
        return self._integers.requires_grad

    @property
    def intensity(self) -> float:
        """FLOPs of one forward pass for each byte that its ops read and write."""
        return self.ratio("intensity")

    def ratio(self, name: str) -> float:
        """A quotient of figures, one of `RATIOS`, e.g. the parameters for each unit of an expert's maximal rank.

        Raises:
            CostError: if there is no such ratio, or its divisor is 0.
        """
        if name not in RATIOS:
            raise CostError(unknown("ratio", name, RATIOS))
        above, below = (sum(map(self.number, parts)) for parts in RATIOS[name].parts)
        if not below:
            raise CostError(f"{name} divides by {' + '.join(RATIOS[name].below)}, which is 0 here")
        return above / below

    def number(self, figure: str) -> int:
        """A figure by its name.

        Raises:
            CostError: if there is no such figure.
        """
        number = _rule(figure)(self._integers)
        assert isinstance(number, int), (figure, number)
        return number

    def expression(self, figure: str) -> Dim:
        """A figure in the layer's symbols, as it is counted; `formula` is the same to read.

        Raises:
            CostError: if there is no such figure.
        """
        return _rule(figure)(self._symbols)

    def formula(self, figure: str, *, part: str | None = None) -> sympy.Expr:
        """A figure as a formula in the layer's symbols, e.g. `R*(I + N + O)`.

        Args:
            figure: its name.
            part: count one part alone, e.g. "gate", "up"; "" is what has no name of its own. The figures that add up
                over parts have it: parameters, MACs, FLOPs by class, weight and activation bytes.

        Raises:
            CostError: if there is no such figure, or no such part of it.
        """
        if part is None:
            return simplify(self.expression(figure))
        executed = self._symbols.executed
        parts = sorted({p.part for p in executed.parameters} | {op.out.part for op in executed.ops})
        if figure not in ADDITIVE or part not in parts:
            raise CostError(
                f"no part {part!r} of {figure}; parts are {', '.join(map(repr, parts))}, of {', '.join(ADDITIVE)}"
            )
        program = replace(
            executed,
            parameters=tuple(p for p in executed.parameters if p.part == part),
            buffers=tuple(p for p in executed.buffers if p.part == part),
            ops=tuple(op for op in executed.ops if op.out.part == part),
        )
        return simplify(_rule(figure)(replace(self._symbols, program=program, function=None)))


FIGURES: tuple[str, ...] = tuple(name for name, value in vars(Figures).items() if isinstance(value, Figure))
"""Names of the figures: attributes of a report, and arguments of `formula`."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A quotient of two sums of figures."""

    heading: str
    above: tuple[str, ...]
    below: tuple[str, ...]

    @property
    def parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Both sums."""
        return self.above, self.below


RATIOS = {
    "intensity": Ratio("FLOPs a byte", ("flops",), ("read_bytes", "activation_bytes")),
    "parameters_per_rank": Ratio("parameters a rank", ("parameters",), ("max_rank",)),
    "flops_per_rank": Ratio("FLOPs a rank", ("flops",), ("max_rank",)),
}
"""What `Figures.ratio` divides, by name."""

ADDITIVE = (
    *("parameters", "macs", "flops", "matmul_flops", "elementwise_flops", "special_flops"),
    *("weight_bytes", "activation_bytes"),
)
"""Figures that are sums over the parts of a layer."""

HEADINGS = {name: vars(Figures)[name].heading for name in FIGURES} | {name: r.heading for name, r in RATIOS.items()}


def _rule(figure: str) -> Callable[[Counted], Dim]:
    if figure not in FIGURES:
        raise CostError(f"unknown figure {figure!r}; there are {', '.join(FIGURES)}")
    descriptor: Any = vars(Figures)[figure]
    rule: Callable[[Counted], Dim] = descriptor.of
    return rule
