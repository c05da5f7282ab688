"""Arrays by the names of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnmoe.ir.value import Value

Array = NDArray[Any]


def spread(env: Mapping[str, Array], value: Value, out: Value) -> Array:
    """A value with an axis (of size 1 where it lacks it) for each index of `out`."""
    array = np.transpose(env[value.name], [value.indices.index(i) for i in out.indices if i in value.indices])
    return array[tuple(slice(None) if i in value.indices else None for i in out.indices)]
