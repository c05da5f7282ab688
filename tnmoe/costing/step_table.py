"""A program's steps as a table: work and moved bytes of each."""

from __future__ import annotations

from tnmoe.costing.cost import Cost
from tnmoe.costing.op_cost import Estimate
from tnmoe.costing.traffic import Traffic, forward_traffic
from tnmoe.ir.program import Program
from tnmoe.render.table import Cell, Table


def step_table(program: Program, numbers: Estimate, title: str, width: int | None = None) -> Table:
    """The ops of a bound program with operands, result, MACs, FLOPs and size in elements.

    With `width`, the bytes of an element, also what each op reads and writes, and its intensity.
    """
    table, rows = program.table(), []
    for op, row, cost in zip(program.ops, table.rows, numbers.per_op, strict=True):
        moved = moved_cells(cost, forward_traffic(op, program.sizes), width) if width else (int(cost.activations),)
        rows.append((*row, int(cost.macs), int(cost.flops), *moved))
    columns = (*table.columns, ("macs", "MACs"), ("flops", "FLOPs"), *(MOVED if width else (("size", "size"),)))
    return Table(title, columns, tuple(rows))


MOVED = (("read_bytes", "bytes read"), ("written_bytes", "bytes written"), ("intensity", "intensity"))


def moved_cells(work: Cost, moved: Traffic, width: int) -> tuple[Cell, ...]:
    """The cells of the columns `MOVED`: bytes read and written, FLOPs a byte."""
    read, written = width * int(moved.read), width * int(moved.written)
    return read, written, round(int(work.flops) / max(1, read + written), 4)  # a view moves nothing
