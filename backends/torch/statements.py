"""Statements of emitted source: one for each op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tnmoe.backends.torch import contractions, kernels, pointwise
from tnmoe.backends.torch.lines import WIDTH, axes_comment, broken, nested
from tnmoe.backends.torch.operands import Operands
from tnmoe.backends.torch.routing import routing_expression
from tnmoe.errors import no_rule
from tnmoe.ir.contractions import Contract, ContractAdd, ContractionOp, MatmulGroups, matmul_groups
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands, results
from tnmoe.ir.pointwise_ops import BatchNorm, PointwiseOp
from tnmoe.ir.routing_ops import RoutingOp


@dataclass
class Writer(Operands):
    """Writes the ops of a program, and the values that they read, as `Operands` does."""

    def runtime_sizes(self, ops: Sequence[Op]) -> dict[str, str]:
        """Sizes that only the data knows and that some view has to name: variable to expression."""
        needed: set[str] = set()
        for op in ops:
            g = _groups(op)
            if g is not None:
                for group in (g.outer, g.rows, g.cols):
                    free = [i for i in group if i in self.program.dynamic]
                    if len(group) > 1 and len(free) > 1:
                        needed.update(free[1:])
        variables: dict[str, str] = {}
        for index in sorted(needed):
            holder = next(v for v in self.program.inputs if index in v.indices)
            variables[f"size_{index}"] = f"{self.ref(holder.name)}.shape[{holder.indices.index(index)}]"
        return variables

    def releases(self, op: Op) -> list[str]:
        """`del` of the values that are released before the op runs, so that they do not add to its memory."""
        return self.deleted(self.program.released.get(op.out.name, ()))

    def deleted(self, names: Sequence[str]) -> list[str]:
        """`del` of some values, in as few lines as have room for them."""
        lines: list[str] = []
        for name in map(self.ref, names):
            if lines and len(lines[-1]) + len(name) + 2 + self.margin <= WIDTH:
                lines[-1] += f", {name}"
            else:
                lines.append(f"del {name}")
        return lines

    def statement(self, op: Op) -> list[str]:
        """`out = expression  # indices`; a view of the result goes on a line of its own if both are too long."""
        target, comment = self.ref(op.out.name), axes_comment(op.out.indices)
        if isinstance(op, BatchNorm):
            statistics = f"mean, var = {self.ref(op.mean.name)}, {self.ref(op.var.name)}"
            return [statistics, f"{target} = {pointwise.expression(op, self)}{comment}"]
        if isinstance(op, RoutingOp):
            target = ", ".join(self.ref(v.name) for v in results(op))
            comment = "  # " + ", ".join(" ".join(v.indices) or "scalar" for v in results(op))
            return broken(f"{target} = {self.viewed(op)}", comment, self.margin)
        expression, views = self.expression(op)
        whole = f"{target} = {self.viewed(op)}{comment}"
        if len(whole) + self.margin <= WIDTH:
            return [whole]
        g = _groups(op)
        if views and g is not None:
            product = broken(f"{target} = {expression}", f"  # {contractions.merged_axes(g)}", self.margin)
            return [*product, *broken(f"{target} = {target}{views}", comment, self.margin)]
        return broken(f"{target} = {expression}", comment, self.margin)

    def expression(self, op: Op) -> tuple[str, str]:
        """What the op computes, and the view (if any) that gives the result its axes."""
        g = _groups(op)
        view = "" if g is None else contractions.result_view(g, self)
        if isinstance(op, ContractionOp):
            return contractions.expression(op, self), view
        if isinstance(op, PointwiseOp):
            return pointwise.expression(op, self), view
        if isinstance(op, FusedOp):
            return kernels.call(op, self), view
        if isinstance(op, RoutingOp):
            read = {v.name: self.ref(v.name) for v in (*self.program.inputs, *operands(op))}
            return routing_expression(op, self.program, read), view
        no_rule(op, "its torch form")

    def viewed(self, op: Op) -> str:
        """What the op computes, with the axes of its result."""
        expression, views = self.expression(op)
        operator = isinstance(op, Contract) and not expression.startswith((f"{self.product}(", "torch."))
        return f"({expression}){views}" if views and operator else f"{expression}{views}"


def _groups(op: Op) -> MatmulGroups | None:
    """The groups of the matrix product whose shape an op's result has; None if it is none."""
    if isinstance(op, FusedOp):
        return kernels.product_groups(op)
    return matmul_groups(op) if isinstance(op, Contract | ContractAdd) else None


def conditional(writer: Writer, op: Op, condition: str) -> list[str]:
    """`out = expression if condition else None  # indices`."""
    value = writer.viewed(op)
    target, comment = writer.ref(op.out.name), axes_comment(op.out.indices)
    whole = f"{target} = {value} if {condition} else None{comment}"
    if len(whole) + 8 <= WIDTH:
        return [whole]
    inside = f"{value} if {condition} else None"
    if len(inside) + 12 <= WIDTH:
        return [f"{target} = (", f"    {inside}", f"){comment}"]
    ending = [f"    if {condition}", "    else None"]
    if len(value) + 12 <= WIDTH:
        return [f"{target} = (", f"    {value}", *ending, f"){comment}"]
    expression, views = writer.expression(op)
    if not views:
        return [f"{target} = (", *nested(broken(value, margin=12)), *ending, f"){comment}"]
    lines = [f"{target} = (", *nested(broken(expression, margin=12)), *ending, ")"]
    return [*lines, *broken(f"{target} = {target}{views} if {condition} else None", comment)]
