"""Bytes in order of time, and the sizes of values in bytes.

A *script* is a list of signed numbers of bytes: + what is allocated, - what is freed. Its largest running sum is the
room that it needs; its sum is what stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from tnmoe.cost import INTEGER_BYTES, elements
from tnmoe.dims import Dim
from tnmoe.errors import CostError
from tnmoe.values import Value

Script = tuple[int, ...]


def room(script: Script) -> int:
    """The most bytes that a script holds at once."""
    return max(accumulate(script, initial=0))


def size(value: Value, sizes: Mapping[str, Dim], item: int) -> int:
    """Bytes of a value whose elements take `item` bytes each, or those of an integer."""
    return (INTEGER_BYTES if value.integer else item) * entries(value.indices, sizes)


def entries(indices: tuple[str, ...], sizes: Mapping[str, Dim]) -> int:
    """Elements of an array with these indices.

    Raises:
        CostError: a size that is no number.
    """
    return whole(elements(indices, sizes))


def lines(value: Value, index: str, sizes: Mapping[str, Dim]) -> int:
    """Elements of a value for each entry of one of its indices."""
    return entries(tuple(i for i in value.indices if i != index), sizes)


def whole(dim: Dim) -> int:
    """A size that is a number.

    Raises:
        CostError: if it is a formula.
    """
    if not isinstance(dim, int):
        raise CostError(f"memory is counted for given sizes only, not for {dim}")
    return dim
