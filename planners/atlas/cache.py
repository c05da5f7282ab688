"""Atlases between processes: kept under the structure of the network, read back under the names of the one at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tnmoe._version import __version__
from tnmoe.errors import PlanError, TnmoeError
from tnmoe.io import cache
from tnmoe.io.json_fields import Field
from tnmoe.ir.network import Network
from tnmoe.planners.atlas.atlas import Atlas
from tnmoe.planners.atlas.dominance import Domain
from tnmoe.planners.atlas.json_form import plain_network, renamed
from tnmoe.planners.atlas.multipliers import INSTALLED
from tnmoe.planners.atlas.symbolic_dp import Pricing
from tnmoe.planners.structure import structure

VERSION = 1
"""To be raised when atlases come to hold other orders or proofs."""


@dataclass(frozen=True)
class AtlasRequest:
    """All that an atlas depends on."""

    network: Network
    domain: Domain
    pricing: Pricing
    seconds: float
    most: int

    def _key(self) -> str:
        bounds = {i: list(pair) for i, pair in self.domain.bounds.items()}
        depends = {
            **structure(self.network, bounds, self.pricing.constant),
            "objective": self.pricing.objective,
            "calls": self.pricing.calls,
            "effort": [str(self.seconds), self.most, INSTALLED],
            "version": [VERSION, __version__],
        }
        return cache.key("atlas", depends)

    def keep(self, atlas: Atlas) -> None:
        """Put an atlas into the cache, its indices numbered."""
        data = json.loads(atlas.to_json())
        numbers = {i: str(k) for k, i in enumerate(self.network.indices)}
        cache.put(self._key(), {**renamed(data, numbers), "closed": data["closed"]})

    def kept(self) -> Atlas | None:
        """The atlas in the cache, its costs and witnesses checked; None if there is none."""
        entry = cache.get(self._key())
        if entry is None:
            return None
        try:
            names = {str(k): i for k, i in enumerate(self.network.indices)}
            return Atlas.read(Field({**renamed(entry, names), **self._own()}, "a kept atlas", PlanError))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, TnmoeError):
            return None

    def _own(self) -> Mapping[str, Any]:
        return {
            "network": plain_network(self.network),
            "bounds": {i: list(pair) for i, pair in self.domain.bounds.items()},
            "objective": self.pricing.objective,
            "calls": self.pricing.calls,
            "constant": sorted(self.pricing.constant),
        }
