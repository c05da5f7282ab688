"""One order of an atlas, and one cost that is proven to be needed nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planners.atlas.multipliers import Multipliers
from tnmoe.planners.atlas.polynomial import Polynomial


@dataclass(frozen=True, slots=True)
class Order:
    """A contraction order that may be the cheapest.

    Attributes:
        path: its SSA pairs.
        tree: the same as nested products of the tensors' names.
        cost: its exact cost in the sizes of the indices.
        witness: sizes at which it is cheaper than all other listed orders; None if none were found.
    """

    path: ContractionPath
    tree: str
    cost: Polynomial
    witness: Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class Excluded:
    """A cost that no other is below everywhere, yet that is nowhere the smallest, by proof."""

    cost: Polynomial
    proof: Multipliers


def make_order(network: Network, path: ContractionPath, cost: Polynomial, witness: Mapping[str, int] | None) -> Order:
    """An order with its text."""
    return Order(path, tree_text(network, path), cost, witness)


def tree_text(network: Network, path: ContractionPath) -> str:
    """A path as nested products of the tensors' names."""
    return path.tree([t.name for t in network.tensors])
