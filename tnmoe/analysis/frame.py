"""A table of many rows, by columns: filtered, sorted, reduced to its Pareto front, and handed to other libraries."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tnmoe.errors import CostError, unknown
from tnmoe.render.table import Cell, Table
from tnmoe.symbolic.columns import Column, Columns
from tnmoe.symbolic.constraints import parse_constraint

SHOWN = 20
"""Rows that are printed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Columns of one length.

    Attributes:
        title: what it shows.
        columns: exact integers (64-bit, or Python's where those do not suffice) and ratios, by name.
        orders: what the numbers in the column `order`, if there is one, stand for.
        notes: what holds for every row.
    """

    title: str
    columns: Mapping[str, Column]
    orders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Column:
        if name not in self.columns:
            raise CostError(unknown("column", name, self.columns))
        return self.columns[name]

    def where(self, *constraints: str) -> Frame:
        """The rows that satisfy every constraint, e.g. "parameters <= 5*10**6", "64 <= max_rank < I".

        Raises:
            DeclarationError: a constraint that cannot be read.
            CostError: a name without a column.
        """
        whole = Columns({k: v for k, v in self.columns.items() if v.dtype.kind != "f"})
        keep = np.ones(len(self), dtype=bool)
        for text in constraints:
            keep &= parse_constraint(text).holds(whole)
        return self._rows(keep)

    def pareto(self, *columns: str) -> Frame:
        """The rows that no other row beats: none is at least as good in every column and better in one.

        Args:
            columns: what to minimise; with a minus in front what to maximise, e.g. "parameters", "-max_rank".

        Raises:
            CostError: no columns, or one that does not exist.
        """
        if not columns:
            raise CostError(
                "name the columns to minimise, or with a minus to maximise: pareto('parameters', '-max_rank')"
            )
        ranks = [self._rank(name) for name in columns]
        return self._rows(_undominated(np.stack(ranks, axis=1)))

    def sorted(self, *columns: str) -> Frame:
        """The rows in ascending order of the columns, the first one first; "-name" in descending order.

        Raises:
            CostError: a column that does not exist.
        """
        ranks = [self._rank(name) for name in reversed(columns)]
        return self._rows(np.lexsort(ranks)) if ranks else self

    def head(self, rows: int = SHOWN) -> Frame:
        """The first rows."""
        return self._rows(np.arange(min(rows, len(self))))

    def _rank(self, name: str) -> Column:
        """Dense ranks of a column: small integers in the same order, reversed for "-name"."""
        values = self[name.removeprefix("-")]
        ranks: Column = np.unique(values, return_inverse=True)[1].astype(np.int64).ravel()
        return -ranks if name.startswith("-") else ranks

    def _rows(self, chosen: Column) -> Frame:
        return replace(self, columns={name: values[chosen] for name, values in self.columns.items()})

    # ---- other forms -----------------------------------------------------------------------------------------

    def table(self, rows: int = SHOWN) -> Table:
        """The first rows, to print."""
        cells: list[list[Cell]] = [[_cell(v) for v in values[:rows]] for values in self.columns.values()]
        left = (f"{len(self):,} rows." if len(self) <= rows else f"The first {rows} of {len(self):,} rows.",)
        orders = tuple(f"Order {k}: {o}." for k, o in enumerate(self.orders)) if "order" in self.columns else ()
        fixed = (", ".join(self.notes) + ".",) if self.notes else ()
        return Table(
            self.title,
            tuple((name, name) for name in self.columns),
            tuple(zip(*cells, strict=True)),
            left + fixed + orders,
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().render("html")

    def to_csv(self) -> str:
        """A line of names, then one a row."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*(values.tolist() for values in self.columns.values()), strict=True))
        return buffer.getvalue()

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`; it needs pandas."""
        return _library("pandas", "to_csv()").DataFrame(dict(self.columns))

    def to_polars(self) -> Any:
        """A `polars.DataFrame`; it needs polars. Integers beyond 64 bits become 128-bit ones."""
        polars = _library("polars", "to_csv()")
        wide = {k: polars.Int128 for k, v in self.columns.items() if v.dtype.kind == "O"}
        return polars.DataFrame({k: v.tolist() for k, v in self.columns.items()}, schema_overrides=wide)

    def to_parquet(self, path: str) -> None:
        """Write a Parquet file; it needs pyarrow. Integers beyond 64 bits become decimals of 76 digits."""
        pyarrow, parquet = _library("pyarrow", "to_csv()"), _library("pyarrow.parquet", "to_csv()")
        kinds = {"i": pyarrow.int64(), "f": pyarrow.float64(), "O": pyarrow.decimal256(76)}
        arrays = {k: pyarrow.array(v.tolist(), type=kinds[v.dtype.kind]) for k, v in self.columns.items()}
        parquet.write_table(pyarrow.table(arrays), path)


def _cell(value: Any) -> Cell:
    return float(value) if isinstance(value, float | np.floating) else int(value)


def _library(name: str, instead: str) -> Any:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        package = name.partition(".")[0]
        raise CostError(f"{package} is not installed: pip install {package}, or use {instead}") from None


def _undominated(points: Column) -> Column:
    """True for each point that no other one beats: below or equal in every coordinate, and below in one."""
    order = np.lexsort(points.T[::-1])  # by the first coordinate, then the second …
    ahead = points[order]
    new = np.ones(len(ahead), dtype=bool)
    new[1:] = (ahead[1:] != ahead[:-1]).any(axis=1)  # equal points share one fate
    distinct = ahead[new]
    front = _staircase(distinct) if distinct.shape[1] <= 2 else _culled(distinct)
    kept: Column = np.empty(len(points), dtype=bool)
    kept[order] = front[np.cumsum(new) - 1]
    return kept


def _staircase(points: Column) -> Column:
    """Of distinct sorted points with one or two coordinates: those whose last coordinate is the least so far."""
    least = np.minimum.accumulate(points[:, -1])
    if points.shape[1] == 1:
        return np.asarray(np.arange(len(points)) == 0)
    return np.concatenate([[True], points[1:, -1] < least[:-1]])[: len(points)]


def _culled(points: Column) -> Column:
    """Of distinct points those that stay when each in turn removes what it beats."""
    alive = np.argsort(points.sum(axis=1), kind="stable")  # likely to beat many first
    k = 0
    while k < len(alive):
        stays = (points[alive] < points[alive[k]]).any(axis=1)
        stays[k] = True
        alive, k = alive[stays], int(stays[:k].sum()) + 1
    front: Column = np.zeros(len(points), dtype=bool)
    front[alive] = True
    return front
