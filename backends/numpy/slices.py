"""An outer loop over slices of a contraction: in NumPy, and as a torch module around the one of a slice."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.backends.numpy import execute as numpy
from tnmoe.ir.network import Network
from tnmoe.ir.program import Program


def execute(
    network: Network,
    part: Program,
    indices: Sequence[str],
    sizes: Mapping[str, int],
    arrays: Mapping[str, Any],
) -> NDArray[Any]:
    """The value of a network, by its slices.

    Args:
        network: the whole.
        part: the bound program of one slice, whose inputs are the network's tensors without `indices`.
        indices: those that are sliced.
        sizes: of all indices.
        arrays: an array for every tensor.
    """
    given = {t.name: np.asarray(arrays[t.name]) for t in network.tensors}
    total = np.zeros([sizes[i] for i in network.output], np.result_type(*given.values()))
    for values in itertools.product(*(range(sizes[i]) for i in indices)):
        at: dict[str, Any] = dict(zip(indices, values, strict=True))
        env = {t.name: given[t.name][tuple(at.get(i, slice(None)) for i in t.indices)] for t in network.tensors}
        total[tuple(at.get(i, slice(None)) for i in network.output)] += numpy.execute(part, env)[part.output.name]
    return total
