"""A network as the key of an answer that can be kept: its structure in plain data, whatever its names are."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from tnmoe.ir.network import Network


def structure(network: Network, per_index: Mapping[str, Any], marked: Set[str] = frozenset()) -> dict[str, Any]:
    """Everything about a network that decides on its orders, without names: equal for equal questions.

    Indices are numbered as they appear, so renaming indices or tensors changes nothing; the order of the tensors
    does, since paths count them.

    Args:
        network: the network; the order of its output's indices is immaterial.
        per_index: plain data for every index, e.g. its size or its bounds.
        marked: names of tensors in which a property matters, e.g. those that need a gradient.
    """
    number = {index: k for k, index in enumerate(network.indices)}
    place = {t.name: k for k, t in enumerate(network.leaves)}
    plain: dict[str, Any] = {
        "tensors": [sorted(number[i] for i in t.indices) for t in network.tensors],
        "roles": [t.role.value for t in network.leaves],
        "output": sorted(number[i] for i in network.output),
        "indices": [per_index[i] for i in network.indices],
        "marked": [place[t.name] for t in network.leaves if t.name in marked],
    }
    if (bias := network.bias) is not None:
        plain["bias"] = [number[bias.index], place[bias.data], place[bias.weight]]
    return plain
