"""What is told about a whole model: one line for each module, and what no line contains."""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.counting.work import Uncounted, Work
from tnmoe.errors import CostError, unknown
from tnmoe.render.table import Cell, Table

FIGURES = (
    ("matmul_flops", "matmul FLOPs"),
    ("elementwise_flops", "element-wise FLOPs"),
    ("special_flops", "special FLOPs"),
)
MOVED = (("read_bytes", "bytes read"), ("written_bytes", "bytes written"))


@dataclass(frozen=True, slots=True)
class ModuleCost(Work):
    """One pass of one module, what is inside it included; the figures of `Work` are those of the forward pass.

    Attributes:
        path: its name in the model, "" for the model itself.
        kind: its class.
        parameters: numbers in its parameters, shared ones once.
        weight_bytes: of parameters and buffers.
        backward: of the backward pass, if it was asked for.
        by_formula: True if it is a layer that tnmoe built.
    """

    path: str = ""
    kind: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    backward: Work | None = None
    by_formula: bool = False


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model's modules, each before what is inside it; the first is the model.

    Attributes:
        modules: their costs.
        uncounted: what ran and has no formula, or could not run; no figure contains it. Empty if all was counted.
    """

    modules: tuple[ModuleCost, ...]
    uncounted: tuple[Uncounted, ...] = ()

    @property
    def total(self) -> ModuleCost:
        """The whole model."""
        return self.modules[0]

    def __getitem__(self, path: str) -> ModuleCost:
        for module in self.modules:
            if module.path == path:
                return module
        raise CostError(unknown("module", path, [m.path for m in self.modules[1:]]))

    def table(self, depth: int | None = None) -> Table:
        """One row for each module, indented, down to `depth` (the model itself is at depth 0)."""
        differentiated = self.total.backward is not None
        columns = [("module", "module"), ("kind", "kind"), ("parameters", "parameters"), *FIGURES]
        if differentiated:
            columns += [(f"backward_{key}", f"backward {heading}") for key, heading in FIGURES]
        columns += [("weight_bytes", "weight bytes"), *MOVED, ("counted", "counted by")]
        rows: list[tuple[Cell, ...]] = []
        for m in self.modules:
            level = m.path.count(".") + 1 if m.path else 0
            if depth is None or level <= depth:
                name = "  " * level + (m.path.rpartition(".")[2] or "model")
                figures = [getattr(m, key) for key, _ in FIGURES]
                if m.backward is not None:
                    figures += [getattr(m.backward, key) for key, _ in FIGURES]
                moved = (m.weight_bytes, m.read_bytes, m.written_bytes)
                by = "formula" if m.by_formula else "torch's operations"
                rows.append((name, m.kind, m.parameters, *figures, *moved, by))
        return Table(f"Cost of {self.total.kind}", tuple(columns), tuple(rows), self._notes())

    def _notes(self) -> tuple[str, ...]:
        passes = "One forward pass" if self.total.backward is None else "One forward pass, and its backward pass"
        notes = (
            f"{passes}. matmul FLOPs: 2 per multiplication of matrix products, convolutions and attention, attention "
            "in full (what masks leave out counts). element-wise: 1 for each product, sum or comparison of elements. "
            "special: norms, softmax, gates and functions, 1 for each operation on an element.",
            "Each row includes the rows indented below it; parameters that modules share count once.",
        )
        if not self.uncounted:
            return notes
        return (*notes, f"not counted: {'; '.join(map(str, self.uncounted))}.")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().render("html")
