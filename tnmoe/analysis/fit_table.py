"""The ranks that the paper's layers get from the budget of the layer they replace, beside the published ones."""

from __future__ import annotations

from dataclasses import replace

from tnmoe.analysis.fit_ranks import FittedRanks, fit_ranks
from tnmoe.factorizations.cp import CP
from tnmoe.factorizations.tensor_ring import TensorRing
from tnmoe.layers.linear import MLP, Linear
from tnmoe.layers.mumoe import MuMoE, MuMoEBlock
from tnmoe.presets.registry import FAMILIES, Preset
from tnmoe.render.table import Cell, Table
from tnmoe.reports.calls import cost


def published(family: str, *, nearest: bool = False) -> Table:
    """One row for each CP and tensor ring layer of a family: the last rank as fitted and as published.

    Args:
        family: of the presets: gpt2, mixer or clip. The budget is the parameters of its linear layer or MLP.
        nearest: as in `fit_ranks`.
    """
    title, rows = FAMILIES[family]
    budget = 0
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        if isinstance(row.spec, MLP | Linear):
            budget = cost(row.spec).parameters
        elif (fitted := _refitted(row, budget, nearest)) is not None:
            reference = cost(row.spec).parameters
            rank = row.spec.factorization.dims()[-1]  # type: ignore[union-attr]  # only these are fitted
            cells.append(
                (row.label, fitted.values["R"], int(rank), budget, fitted.reached, reference, reference - budget)
            )
    columns = (
        ("layer", "layer"),
        ("rank", "rank"),
        ("published", "published"),
        ("target", "target"),
        ("reached", "reached"),
        ("published_parameters", "published reaches"),
        ("excess", "beyond target"),
    )
    note = "Target: parameters of the layer that is replaced. " + (
        "Fitted to the nearest integer." if nearest else "Fitted to the largest rank within the target."
    )
    return Table(f"Ranks from the budget: {title}", columns, tuple(cells), (note,))


def _refitted(row: Preset, budget: int, nearest: bool) -> FittedRanks | None:
    """The row with its last rank open, fitted; None if it has no such rank."""
    if not isinstance(row.spec, MuMoE | MuMoEBlock):
        return None
    match row.spec.factorization:
        case CP():
            opened: CP | TensorRing = CP("R")
        case TensorRing(ranks):
            opened = TensorRing((*ranks[:-1], "R"))
        case _:
            return None
    return fit_ranks(replace(row.spec, factorization=opened), parameters=budget, nearest=nearest)
