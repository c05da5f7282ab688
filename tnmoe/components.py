"""The parts of a network that share no index: in every order an outer product joins them."""

from __future__ import annotations

from tnmoe.network import Network


def components(network: Network) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors of each connected part, in order of first appearance."""
    found: list[tuple[set[str], list[str]]] = []
    for tensor in network.tensors:
        touched = [part for part in found if part[0] & set(tensor.indices)]
        found = [part for part in found if part not in touched]
        indices = set(tensor.indices).union(*(part[0] for part in touched))
        found.append((indices, [name for part in touched for name in part[1]] + [tensor.name]))
    place = {t.name: k for k, t in enumerate(network.tensors)}
    parts = [tuple(sorted(names, key=place.__getitem__)) for _, names in found]
    return tuple(sorted(parts, key=lambda part: place[part[0]]))


def note(network: Network) -> str:
    """A sentence on a network in several parts; empty if it is in one."""
    parts = components(network)
    if len(parts) == 1:
        return ""
    shown = "; ".join(", ".join(part) for part in parts)
    return f"{len(parts)} parts share no index, so outer products join them: {shown}."
