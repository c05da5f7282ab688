"""Paths between processes: kept under the structure of the network and all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from tnmoe._version import __version__
from tnmoe.costing.objective import Objective
from tnmoe.errors import PlanError
from tnmoe.io import cache
from tnmoe.io.json_fields import Field
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planners.structure import structure


def kept_path(
    kind: str,
    network: Network,
    sizes: Mapping[str, int],
    objective: Objective,
    requires_grad: Set[str],
    effort: Mapping[str, Any],
    make: Callable[[], ContractionPath],
) -> ContractionPath:
    """The path in the cache, else the one that `make` finds, which is then kept.

    Args:
        kind: of entry, one for each planner.
        network, sizes, objective, requires_grad: as planners take them.
        effort: plain data, whatever else the path depends on, the planner's version included.
        make: plans.
    """
    depends = {**structure(network, sizes, requires_grad), "objective": str(objective), **effort, "tnmoe": __version__}
    key = cache.key(kind, depends)
    path = _read(cache.get(key), len(network.tensors))
    if path is None:
        path = make()
        cache.put(key, path.to_mapping())
    return path


def _read(entry: Mapping[str, Any] | None, tensors: int) -> ContractionPath | None:
    """The path of a cache entry, if that is what it holds."""
    try:
        path = Field(entry, "a kept path", PlanError).maybe(ContractionPath.read)
        if path is not None:
            path.check(tensors)
    except PlanError:
        return None
    return path
