"""Slicing: fix some indices at one value at a time, so that no array of a contraction exceeds a limit.

The network without the sliced indices is contracted once for every combination of their values; results are added
where the index is summed and put side by side where it is kept. Memory falls, work grows: steps that do not hold a
sliced index are repeated (their loop could be moved, which an outer loop does not do). Which indices to slice is chosen
greedily, the one with the least work next, and the tree is improved again for the smaller network each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import replace

from tnmoe.costing.objective import FLOPS, Objective
from tnmoe.errors import PlanError
from tnmoe.ir.dataflow import elements
from tnmoe.ir.layer import network_layer
from tnmoe.ir.network import Network
from tnmoe.ir.ops import results
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role, Value
from tnmoe.lowering.lower import lower
from tnmoe.planners.effort import Effort
from tnmoe.planners.reconfigure import reconfigure
from tnmoe.planners.splits import Splits, Steps, path_of, splits_of

_UNITS = 500_000
_PIECE = 8


def without(network: Network, sliced: Set[str]) -> Network:
    """The network of one slice: the indices gone, and all tensors data, for they are handed in slice by slice."""
    tensors = tuple(
        replace(t, indices=tuple(i for i in t.indices if i not in sliced), role=Role.DATA) for t in network.tensors
    )
    return Network(tensors, tuple(i for i in network.output if i not in sliced))


def written(network: Network, path: ContractionPath) -> tuple[Value, ...]:
    """Every array that the program of a contraction writes: intermediates, the result, copies in other layouts."""
    layer = network_layer(network)
    program = lower(layer, {layer.output.name: path}, {})  # which has no weights to lay out
    return tuple(v for op in program.ops for v in results(op))


def plan(
    network: Network,
    sizes: Mapping[str, int],
    limit: int,
    start: ContractionPath,
    objective: Objective = FLOPS,
) -> tuple[frozenset[str], ContractionPath]:
    """Indices to slice, and an order of the network without them.

    Args:
        network: any number of tensors, without a folded bias.
        sizes: an integer for every index.
        limit: elements that no array which a slice writes, nor the whole result, may exceed.
        start: a good order of the whole network.
        objective: "flops" or "macs".

    Raises:
        PlanError: a limit below the size of the result, with the smallest limit there is; a folded bias.
    """
    if network.bias is not None:
        raise PlanError("a network with a folded bias cannot be sliced; add the bias to the result instead")
    least = max(1, int(elements(network.output, sizes)))
    if type(limit) is not int or limit < least:
        raise PlanError(
            f"the limit must be an integer of at least {least:,}, the number of elements of the result itself; "
            f"got {limit!r}"
        )
    n = len(network.tensors)
    tree = splits_of(start, n)
    sliced: set[str] = set()
    while _largest(network, sizes, sliced, tree) > limit:
        choices = _choices(network, sizes, sliced, tree)
        sliced.add(min(choices, key=lambda i: _ranking(network, sizes, sliced | {i}, tree, objective)))
        steps = Steps(without(network, sliced), sizes, objective)
        better = reconfigure(steps, tree, _PIECE, Effort(None, _UNITS))
        if _largest(network, sizes, sliced, tree) > limit or _largest(network, sizes, sliced, better) <= limit:
            tree = better
    for index in sorted(sliced, key=lambda i: (-sizes[i], i)):  # what later slices have made needless
        if _largest(network, sizes, sliced - {index}, tree) <= limit:
            sliced.remove(index)
    return frozenset(sliced), path_of(tree, n, "slicing")


def _written(network: Network, sliced: Set[str], tree: Splits) -> tuple[Value, ...]:
    return written(without(network, sliced), path_of(tree, len(network.tensors), "slicing"))


def _largest(network: Network, sizes: Mapping[str, int], sliced: Set[str], tree: Splits) -> int:
    return max(int(elements(v.indices, sizes)) for v in _written(network, sliced, tree))


def _choices(network: Network, sizes: Mapping[str, int], sliced: Set[str], tree: Splits) -> list[str]:
    """Indices of the largest array, of more than one value."""
    top = max(_written(network, sliced, tree), key=lambda v: elements(v.indices, sizes))
    return [i for i in top.indices if sizes[i] > 1]


def _ranking(
    network: Network, sizes: Mapping[str, int], sliced: Set[str], tree: Splits, objective: Objective
) -> tuple[float, int, list[str]]:
    """The work of all slices, in units of the memory that is saved; the largest array; the names, to be definite."""
    rest = without(network, sliced)
    work = Steps(rest, sizes, objective).total(tree) * math.prod([sizes[i] for i in sliced])
    peak = _largest(network, sizes, sliced, tree)
    return math.log2(max(work, 1)) + math.log2(peak), peak, sorted(sliced)
