"""How long a search may go on: for a fixed amount of work, the same on every machine, or for some seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tnmoe.errors import PlanError

Progress = Callable[[float, float], None]
"""Called with what is done and what there is to do, in any unit."""


def check_budget(budget: object) -> None:
    """Raise `PlanError` unless `budget` is None or a positive number of seconds."""
    if budget is None or (isinstance(budget, int | float) and budget is not True and 0 < budget < math.inf):
        return
    raise PlanError(f"budget must be a positive number of seconds, got {budget!r}")


class Effort:
    """What a search may spend.

    Args:
        budget: seconds; None for `units` of work.
        units: of work that are allowed without a budget.
        progress: is told how much is spent.

    Raises:
        PlanError: a budget that is no positive number.
    """

    def __init__(self, budget: float | None, units: float, progress: Progress | None = None) -> None:
        check_budget(budget)
        self.budget, self.units, self.progress = budget, units, progress
        self.spent = 0.0
        self.start = time.monotonic()

    def spend(self, units: float) -> None:
        """Take note of work that was done."""
        self.spent += units
        self.tell()

    def tell(self) -> None:
        """Report how far the search is."""
        if self.progress is not None:
            self.progress(min(self._done, self._all), self._all)

    @property
    def over(self) -> bool:
        """True if nothing is left."""
        return self._done >= self._all

    @property
    def late(self) -> bool:
        """True if there is a time, and it is up: then even what comes before the work proper must end."""
        return self.budget is not None and self.over

    @property
    def _done(self) -> float:
        return self.spent if self.budget is None else time.monotonic() - self.start

    @property
    def _all(self) -> float:
        return self.units if self.budget is None else self.budget
