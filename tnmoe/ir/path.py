"""Contraction paths in static-single-assignment (SSA) form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tnmoe.errors import PlanError
from tnmoe.io.json_fields import Field

Tree = int | tuple["Tree", "Tree"]
"""A nested order: a tensor's position, or a pair of trees to contract."""


@dataclass(frozen=True, slots=True)
class ContractionPath:
    """Pairs of operands: tensors are 0 … n-1, and step k makes operand n + k.

    Attributes:
        steps: SSA pairs, as in opt_einsum and cotengra.
        planner: name of the planner that found it.
        exact: True if the planner proves that no order costs less under its objective.
    """

    steps: tuple[tuple[int, int], ...]
    planner: str = "given"
    exact: bool = False

    @classmethod
    def from_tree(cls, tree: Tree, tensors: int, planner: str, *, exact: bool = False) -> ContractionPath:
        """The path that contracts a tree over `tensors` tensors, each part before the step that uses it."""
        steps: list[tuple[int, int]] = []

        def contract(part: Tree) -> int:
            if isinstance(part, int):
                return part
            left, right = (contract(side) for side in part)
            steps.append((left, right))
            return tensors + len(steps) - 1

        contract(tree)
        return cls(tuple(steps), planner, exact)

    def tree(self, names: Sequence[str]) -> str:
        """The order as nested products of named operands, e.g. `(a · b) · (c · d)`."""
        text = list(names)
        for i, j in self.steps:
            text.append(" · ".join(f"({t})" if " " in t else t for t in (text[i], text[j])))
        return text[-1]

    def to_mapping(self) -> dict[str, Any]:
        """The path as plain data, for JSON."""
        return {"steps": [list(step) for step in self.steps], "planner": self.planner, "exact": self.exact}

    @classmethod
    def read(cls, data: Field) -> ContractionPath:
        """The path that `to_mapping` wrote; `check` says whether it fits its tensors."""
        fields = data.keys("steps", "planner", "exact")
        return cls(read_steps(fields["steps"]), fields["planner"].text(), fields["exact"].flag())

    def check(self, tensors: int) -> None:
        """Raise `PlanError` unless the path contracts `tensors` operands to exactly one."""
        live = set(range(tensors))
        for k, (i, j) in enumerate(self.steps):
            if i == j or not {i, j} <= live:
                raise PlanError(f"step {k} contracts ({i}, {j}), but the live operands are {sorted(live)}")
            live -= {i, j}
            live.add(tensors + k)
        if len(live) != 1:
            raise PlanError(f"the path leaves {len(live)} operands of {tensors}, expected 1")


def read_steps(data: Field) -> tuple[tuple[int, int], ...]:
    """The steps of a path in JSON: a list of pairs."""
    pairs = [step.items(2, "operands") for step in data.items(of="pairs of operands")]
    return tuple((i.integer(0), j.integer(0)) for i, j in pairs)
