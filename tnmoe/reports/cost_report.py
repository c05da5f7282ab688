"""The cost report of a planned layer: numbers and formulas, both read off the program that is emitted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from rich.text import Text

from tnmoe.costing.backward import backward_cost
from tnmoe.costing.cost import Cost
from tnmoe.costing.padding import padded_splits
from tnmoe.costing.step_table import MOVED, moved_cells, step_table
from tnmoe.costing.traffic import gradient_traffic
from tnmoe.errors import CostError, unknown
from tnmoe.ir.dataflow import elements
from tnmoe.ir.ops import operands
from tnmoe.ir.value import DTYPE_BYTES, Role
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table
from tnmoe.reports.figures import FIGURES, HEADINGS, RATIOS, Figures
from tnmoe.reports.ideal import ideal_plan
from tnmoe.reports.training_state import OPTIMIZERS, TrainingState, training_state

CONVENTIONS = (
    "MACs: products in contraction steps. matmul FLOPs: 2 per MAC of a step that sums; element-wise: 1 per product "
    "of a step that sums nothing, 1 per addition; special: norms, gates, GELU.",
    "FLOPs are the sum of the three, for one forward pass. Activation bytes: every intermediate that it writes.",
)

TRAFFIC = "Bytes: each operand read once, each result written once. Intensity: FLOPs for each of these bytes."

IDEAL = ("macs", "flops", "matmul_flops")
"""What is compared with the ideal too."""

COMPARED = ("parameters", "macs", "flops", "matmul_flops", "max_rank", "weight_bytes", "activation_bytes")
"""The figures of a comparison, unless others are chosen."""

COUPLED = "† couples tokens: the output for one token depends on others of its batch."

RANKLESS = "Max rank 0: no network of the layer is the matrix of an expert (rank-one experts, vectors, polynomials)."


@dataclass(frozen=True)
class CostReport(Figures):
    """Figures of one layer at given sizes, and their tables.

    Attributes:
        plan: what is reported on; None for what has no ideal twin to plan, as the inference form.
    """

    plan: Plan | None = None

    @classmethod
    def of(cls, plan: Plan, dtype: str = "float32", frozen: Collection[str] = ()) -> Self:
        """The report of a plan.

        Args:
            plan: what is reported on.
            dtype: of weights and activations.
            frozen: names of parameters that get no gradient, besides those declared so.

        Raises:
            CostError: an unknown dtype or parameter.
        """
        program = plan.program
        stored = {p.name: p for p in program.parameters}
        for name in frozen:
            if name not in stored:
                raise CostError(unknown("parameter", name, stored))
        since = frozenset(name for name in frozen if stored[name].role is Role.WEIGHT)
        parameters = (replace(p, role=Role.FROZEN) if p.name in since else p for p in program.parameters)
        return cls(
            plan.layer,
            replace(program, parameters=tuple(parameters)),
            plan.values,
            dtype,
            plan.input_gradients,
            plan.function,
            frozen=since,
            plan=plan,
        )

    @cached_property
    def ideal(self) -> CostReport | None:
        """Of the same layer if no token ran through an expert that it did not choose, and no axis were padded.

        None where nothing is wasted. All figures of the report itself are of what is executed. The twin is planned
        when it is first asked for.
        """
        alone = None if self.plan is None else ideal_plan(self.plan)
        report = None if alone is None else CostReport.of(alone, self.dtype, self.frozen)
        padded = report or self
        return replace(padded, without_padding=True) if padded_splits(padded.program) else report

    # ---- tables ----------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Name, tokens and dtype."""
        tokens = f", {self.values[self.layer.token_symbol]:,} tokens" if self.layer.batched else ""
        return f"{self.layer.name} ({self.layer.summary}){tokens}, {self.dtype}"

    def parts(self) -> Table:
        """Figures by part of the layer, with a total."""
        parts: dict[str, tuple[int, Cost]] = {}
        for p in self.bound.parameters:
            stored, work = parts.get(p.part, (0, Cost()))
            size = elements(p.indices, self.bound.sizes)
            assert isinstance(size, int)
            parts[p.part] = stored + size, work
        for op, cost in zip(self.executed.ops, self.numbers.per_op, strict=True):
            stored, work = parts.get(op.out.part, (0, Cost()))
            parts[op.out.part] = stored, work + cost
        rows = [self._row(part or "layer", stored, work) for part, (stored, work) in parts.items()]
        if len(rows) > 1:
            rows.append(self._row("total", self.parameters, self.numbers.total))
        keys = ("parameters", "macs", "flops", "matmul_flops", "elementwise_flops", "special_flops", "activation_bytes")
        columns = (("part", "part"), *((k, HEADINGS[k]) for k in keys))
        return Table(
            f"Cost of {self.title}",
            columns,
            tuple(rows),
            (*self._wasted, f"Max expert rank: {self.max_rank:,}.", *CONVENTIONS),
        )

    @property
    def _wasted(self) -> tuple[str, ...]:
        if self.ideal is None:
            return ()
        ideal = self.ideal
        return (
            f"Executed: {self.macs:,} MACs, {self.flops:,} FLOPs. Ideal, no expert that was not chosen and no "
            f"padded axis: {ideal.macs:,} MACs, {ideal.flops:,} FLOPs.",
        )

    def _row(self, name: str, stored: int, work: Cost) -> tuple[Cell, ...]:
        width = DTYPE_BYTES[self.dtype]
        figures = (work.macs, work.flops, work.matmul_flops, work.elementwise_flops, work.special_flops)
        return (name, stored, *(int(f) for f in figures), width * int(work.activations))

    def steps(self) -> Table:
        """One row for each op, in the order in which they run, with the bytes that it moves."""
        table = step_table(self.executed, self.numbers, f"Steps of {self.title}", DTYPE_BYTES[self.dtype])
        return replace(table, notes=(TRAFFIC,))

    def backward(self) -> Table:
        """One row for each gradient that an op's operands need: its FLOPs, and the bytes that it moves."""
        width, sizes = DTYPE_BYTES[self.dtype], self.bound.sizes
        rows: list[tuple[Cell, ...]] = []
        for k, op in enumerate(self.bound.ops, start=1):
            for v in {v.name: v for v in operands(op)}.values():
                if v.name not in self.requires_grad:
                    continue
                work, moved = backward_cost(op, sizes, {v.name}), gradient_traffic(op, v, sizes)
                figures = (int(f) for f in (work.macs, work.flops, work.matmul_flops))
                rows.append((k, type(op).__name__, v.label, *figures, *moved_cells(work, moved, width)))
        columns = (
            ("step", "step"),
            ("op", "op"),
            ("operand", "gradient of"),
            *((key, HEADINGS[key]) for key in ("macs", "flops", "matmul_flops")),
            *MOVED,
        )
        notes = (f"Gradients of trained weights and {self._inputs}.", TRAFFIC)
        return Table(f"Backward pass of {self.title}", columns, tuple(rows), notes)

    def training_state(self, optimizer: str = "adamw", precision: str = "mixed") -> TrainingState:
        """Bytes of weights, gradients, master copy and optimizer state, and the FLOPs of the optimizer's step.

        Raises:
            CostError: an optimizer or precision that `tnmoe.reports.training_state` does not have.
        """
        return training_state(self.bound, optimizer, precision)

    def training(self, precision: str = "mixed") -> Table:
        """One row for each optimizer: what training keeps besides activations, and the work of its step.

        Raises:
            CostError: an unknown precision.
        """
        rows: list[tuple[Cell, ...]] = []
        for optimizer in OPTIMIZERS:
            state = training_state(self.bound, optimizer, precision)
            kept = (state.weight_bytes, state.gradient_bytes, state.master_bytes, state.state_bytes, state.total_bytes)
            rows.append((optimizer, *(int(n) for n in (*kept, state.step_flops))))
        columns = (
            ("optimizer", "optimizer"),
            ("weight_bytes", "weight bytes"),
            ("gradient_bytes", "gradient bytes"),
            ("master_bytes", "master bytes"),
            ("state_bytes", "state bytes"),
            ("total_bytes", "total bytes"),
            ("step_flops", "FLOPs of a step"),
        )
        notes = (
            "What exists throughout training; activations come on top. FLOPs: every arithmetic operation counts 1.",
        )
        return Table(f"Training state of {self.title}, precision {precision}", columns, tuple(rows), notes)

    @property
    def _inputs(self) -> str:
        return ", ".join(self.input_gradients) or "no input"

    def symbolic(self) -> Table:
        """One row for each figure: its formula and its number."""
        rows = tuple((HEADINGS[f], str(self.formula(f)), self.number(f)) for f in FIGURES)
        given = ", ".join(f"{k} = {v:,}" for k, v in sorted(self.values.items()))
        columns = (("figure", "figure"), ("formula", "formula"), ("value", "value"))
        notes = (f"At {given}.", f"Training: all weights and {self._inputs} need a gradient.")
        return Table(f"Formulas of {self.title}", columns, rows, notes)

    def record(self, label: str | None = None, figures: Sequence[str] = COMPARED) -> dict[str, Cell]:
        """The label and figures of a comparison table's row; the keys are the JSON form's.

        Raises:
            CostError: an unknown figure.
        """
        return {"layer": label or self.layer.name, **{f: self.value(f) for f in figures}}

    def value(self, name: str) -> int | float:
        """A figure, a ratio, or `ideal_` and a figure: what that would be if nothing were wasted.

        Raises:
            CostError: if there is none of that name.
        """
        if name.startswith("ideal_"):
            return (self.ideal or self).number(name.removeprefix("ideal_"))
        return self.ratio(name) if name in RATIOS else self.number(name)

    def __str__(self) -> str:
        return str(self.parts())

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

    def __rich__(self) -> Text:
        return Text(str(self))

    def _repr_html_(self) -> str:
        return self.parts().render("html")

    def _repr_latex_(self) -> str:
        return self.to_latex()


def comparison(
    reports: Mapping[str, CostReport],
    title: str,
    notes: tuple[str, ...] = (),
    figures: Sequence[str] = COMPARED,
    *,
    beside: bool = True,
) -> Table:
    """One row for each report, under its label, with the chosen figures; `ideal_macs` and the like can be among them.

    Where a layer wastes something, the ideal MACs and FLOPs stand beside the executed ones, unless `beside`
    is false: then the columns are the chosen figures whatever the layers, so that tables can be joined.

    Raises:
        CostError: an unknown figure.
    """
    if beside and any(report.ideal for report in reports.values()):
        pairs = ((f, f"ideal_{f}") if f in IDEAL else (f,) for f in figures)
        figures = list(dict.fromkeys(name for pair in pairs for name in pair))
    coupled = [label for label, report in reports.items() if report.layer.couples_tokens]
    if coupled:
        notes += (COUPLED,)
    if "max_rank" in figures and any(report.max_rank == 0 for report in reports.values()):
        notes += (RANKLESS,)
    rows = tuple(
        tuple(report.record(f"{label} †" if label in coupled else label, figures).values())
        for label, report in reports.items()
    )
    headings = {**HEADINGS, "matmul_flops": "matmul FLOPs"}
    headings |= {f"ideal_{f}": f"ideal {heading}" for f, heading in headings.items()}
    columns = (("layer", "layer"), *((f, headings[f]) for f in figures))
    return Table(title, columns, rows, (*notes, *CONVENTIONS))
