"""How the weights of a plan are stored, where a matrix product reads them equally well in two orders of axes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tnmoe.errors import PlanError, unknown

LAYOUTS = ("auto", "rows", "columns")
"""By the weights' sizes; all (inner, columns); all (columns, inner)."""

Layout = str | Collection[str]
"""One of `LAYOUTS`, or the names of the weights that are stored (columns, inner)."""


def resolve(layout: Layout, turnable: Sequence[str]) -> tuple[str, ...] | None:
    """Names of the weights stored (columns, inner), in the order of `turnable`; None for "auto".

    Raises:
        PlanError: another text, or a name that is none of `turnable`.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise PlanError(f"{unknown('layout', layout, LAYOUTS)}; or names of weights, as a list")
        return {"auto": None, "rows": (), "columns": tuple(turnable)}[layout]
    if not isinstance(layout, Collection) or not all(isinstance(name, str) for name in layout):
        raise PlanError(f"layout must be one of {', '.join(LAYOUTS)}, or names of weights; got {layout!r}")
    for name in layout:
        if name not in turnable:
            raise PlanError(
                f"{unknown('weight', name, turnable)}; the others are no right operand of just one matrix product, "
                "so how they are stored follows from the order of contraction"
            )
    return tuple(name for name in turnable if name in layout)
