"""The cost report of a planned layer: numbers and formulas, both read off the program that is emitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import sympy

from tnmoe.backward import gradient_names, saved_elements, training_cost
from tnmoe.cost import DTYPE_BYTES, Cost, Estimate, elements, estimate
from tnmoe.dims import Dim
from tnmoe.errors import CostError
from tnmoe.formulas import simplify
from tnmoe.layer import Layer
from tnmoe.program import Program, bind
from tnmoe.rank import layer_rank
from tnmoe.report import Cell, Table

CONVENTIONS = (
    "MACs: products in contraction steps. matmul FLOPs: 2 per MAC of a step that sums; element-wise: 1 per product "
    "of a step that sums nothing, 1 per addition; special: norms, gates, GELU.",
    "FLOPs are the sum of the three, for one forward pass. Activation bytes: every intermediate that it writes.",
)

FIGURES = (
    "parameters",
    "macs",
    "flops",
    "matmul_flops",
    "elementwise_flops",
    "special_flops",
    "max_rank",
    "weight_bytes",
    "activation_bytes",
    "training_flops",
    "training_matmul_flops",
    "saved_bytes",
)
"""Names of the figures: properties of a report, and arguments of `formula`."""

_HEADINGS = {
    "parameters": "parameters",
    "macs": "MACs",
    "flops": "FLOPs",
    "matmul_flops": "matmul",
    "elementwise_flops": "element-wise",
    "special_flops": "special",
    "max_rank": "max rank",
    "weight_bytes": "weight bytes",
    "activation_bytes": "activation bytes",
    "training_flops": "training FLOPs",
    "training_matmul_flops": "training matmul",
    "saved_bytes": "saved bytes",
}


@dataclass(frozen=True)
class CostReport:
    """Figures of one layer at given sizes.

    Attributes:
        layer: what is costed.
        program: laid out, with symbolic sizes.
        values: the integer of every symbol, the tokens `T` included.
        dtype: of weights and activations, for the byte counts.
        input_gradients: names of the inputs that need a gradient, for the figures about training.

    Raises:
        CostError: an unknown dtype, or a symbol without a value.
    """

    layer: Layer
    program: Program
    values: Mapping[str, int]
    dtype: str = "float32"
    input_gradients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise CostError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPE_BYTES)}")

    @cached_property
    def bound(self) -> Program:
        """The program with integer sizes."""
        return bind(self.program, self.values)

    @cached_property
    def numbers(self) -> Estimate:
        """Integers."""
        return estimate(self.bound)

    @cached_property
    def formulas(self) -> Estimate:
        """The same code, run on the symbols."""
        return estimate(self.program)

    @property
    def parameters(self) -> int:
        """Stored weights, biases included, buffers not."""
        return self._number("parameters")

    @property
    def macs(self) -> int:
        """Products in contraction steps, of one forward pass."""
        return self._number("macs")

    @property
    def flops(self) -> int:
        """FLOPs of all classes, of one forward pass."""
        return self._number("flops")

    @property
    def matmul_flops(self) -> int:
        """FLOPs of contractions that sum; what `torch.utils.flop_counter` counts."""
        return self._number("matmul_flops")

    @property
    def elementwise_flops(self) -> int:
        """FLOPs of products without a sum, and of additions."""
        return self._number("elementwise_flops")

    @property
    def special_flops(self) -> int:
        """FLOPs of norms, gates and GELU."""
        return self._number("special_flops")

    @property
    def max_rank(self) -> int:
        """Largest rank an expert's matrix can have; of several maps the smallest. 0 for a bare network."""
        return self._number("max_rank")

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return self._number("weight_bytes")

    @property
    def activation_bytes(self) -> int:
        """Bytes of every intermediate that one forward pass writes, the result included."""
        return self._number("activation_bytes")

    @property
    def training_flops(self) -> int:
        """FLOPs of all classes, of one forward and backward pass."""
        return self._number("training_flops")

    @property
    def training_matmul_flops(self) -> int:
        """Matmul FLOPs of one forward and backward pass; what `torch.utils.flop_counter` counts."""
        return self._number("training_matmul_flops")

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for the backward pass, parameters, buffers and inputs aside; what saved-tensor hooks see."""
        return self._number("saved_bytes")

    def formula(self, figure: str) -> sympy.Expr:
        """A figure as a formula in the layer's symbols, e.g. `R*(I + N + O)`.

        Raises:
            CostError: if there is no such figure.
        """
        return simplify(self._figure(figure, self.formulas, self.program))

    def _number(self, figure: str) -> int:
        number = self._figure(figure, self.numbers, self.bound)
        assert isinstance(number, int)
        return number

    def _figure(self, figure: str, found: Estimate, program: Program) -> Dim:
        width = DTYPE_BYTES[self.dtype]
        match figure:
            case "parameters":
                return found.parameters
            case "max_rank":
                return layer_rank(self.layer, program.sizes)
            case "weight_bytes":
                return width * (found.parameters + found.buffers)
            case "activation_bytes":
                return width * found.total.activations
            case "training_flops":
                return self._training(program).flops
            case "training_matmul_flops":
                return self._training(program).matmul_flops
            case "saved_bytes":
                return width * saved_elements(program, gradient_names(program, self.input_gradients))
            case _ if figure in FIGURES:
                result: Dim = getattr(found.total, figure)
                return result
        raise CostError(f"unknown figure {figure!r}; there are {', '.join(FIGURES)}")

    def _training(self, program: Program) -> Cost:
        return training_cost(program.ops, program.sizes, gradient_names(program, self.input_gradients))

    # ---- tables ----------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Name, tokens and dtype."""
        tokens = f", {self.values[self.layer.token_symbol]:,} tokens" if self.layer.batched else ""
        return f"{self.layer.name} ({self.layer.summary}){tokens}, {self.dtype}"

    def parts(self) -> Table:
        """Figures by part of the layer, with a total."""
        found: dict[str, tuple[int, Cost]] = {}
        for p in self.bound.parameters:
            stored, work = found.get(p.part, (0, Cost()))
            size = elements(p.indices, self.bound.sizes)
            assert isinstance(size, int)
            found[p.part] = stored + size, work
        for op, cost in zip(self.bound.ops, self.numbers.per_op, strict=True):
            stored, work = found.get(op.out.part, (0, Cost()))
            found[op.out.part] = stored, work + cost
        rows = [self._row(part or "layer", stored, work) for part, (stored, work) in found.items()]
        if len(rows) > 1:
            rows.append(self._row("total", self.parameters, self.numbers.total))
        keys = ("parameters", "macs", "flops", "matmul_flops", "elementwise_flops", "special_flops", "activation_bytes")
        columns = (("part", "part"), *((k, _HEADINGS[k]) for k in keys))
        return Table(
            f"Cost of {self.title}", columns, tuple(rows), (f"Max expert rank: {self.max_rank:,}.", *CONVENTIONS)
        )

    def _row(self, name: str, stored: int, work: Cost) -> tuple[Cell, ...]:
        width = DTYPE_BYTES[self.dtype]
        figures = (work.macs, work.flops, work.matmul_flops, work.elementwise_flops, work.special_flops)
        return (name, stored, *(int(f) for f in figures), width * int(work.activations))

    def steps(self) -> Table:
        """One row for each op, in the order in which they run."""
        return step_table(self.bound, self.numbers, f"Steps of {self.title}", DTYPE_BYTES[self.dtype])

    def symbolic(self) -> Table:
        """One row for each figure: its formula and its number."""
        rows = tuple((_HEADINGS[f], str(self.formula(f)), self._number(f)) for f in FIGURES)
        given = ", ".join(f"{k} = {v:,}" for k, v in sorted(self.values.items()))
        inputs = ", ".join(self.input_gradients) or "no input"
        columns = (("figure", "figure"), ("formula", "formula"), ("value", "value"))
        notes = (f"At {given}.", f"Training: all weights and {inputs} need a gradient.")
        return Table(f"Formulas of {self.title}", columns, rows, notes)

    def record(self, label: str | None = None) -> dict[str, Cell]:
        """The figures of a comparison table's row; the keys are the JSON form's."""
        keys = ("parameters", "macs", "flops", "matmul_flops", "max_rank", "weight_bytes", "activation_bytes")
        return {"layer": label or self.layer.name, **{k: self._number(k) for k in keys}}

    def __str__(self) -> str:
        return str(self.parts())

    def _repr_html_(self) -> str:
        return self.parts().render("html")

    def _repr_latex_(self) -> str:
        return self.to_latex()

    def to_markdown(self) -> str:
        """The table by part, in Markdown."""
        return self.parts().render("markdown")

    def to_latex(self) -> str:
        """The table by part, in LaTeX with booktabs."""
        return self.parts().render("latex")

    def to_csv(self) -> str:
        """The table by part, in CSV."""
        return self.parts().render("csv")

    def to_json(self) -> str:
        """The table by part, as a JSON list."""
        return self.parts().render("json")


def step_table(program: Program, numbers: Estimate, title: str, width: int | None = None) -> Table:
    """The ops of a bound program with operands, result, MACs, FLOPs and size (in elements, or bytes of `width`)."""
    table = program.table()
    figures = [(int(cost.macs), int(cost.flops), int(cost.activations) * (width or 1)) for cost in numbers.per_op]
    size = ("bytes", "bytes") if width else ("size", "size")
    columns = (*table.columns, ("macs", "MACs"), ("flops", "FLOPs"), size)
    rows = tuple((*row, *found) for row, found in zip(table.rows, figures, strict=True))
    return Table(title, columns, rows)


def comparison(reports: Mapping[str, CostReport], title: str, notes: tuple[str, ...] = ()) -> Table:
    """One row for each report, under its label."""
    records = [report.record(label) for label, report in reports.items()]
    keys = ("layer", "parameters", "macs", "flops", "matmul_flops", "max_rank", "weight_bytes", "activation_bytes")
    headings = {**_HEADINGS, "layer": "layer", "matmul_flops": "matmul FLOPs"}
    columns = tuple((k, headings[k]) for k in keys)
    return Table(title, columns, tuple(tuple(r[k] for k in keys) for r in records), (*notes, *CONVENTIONS))
