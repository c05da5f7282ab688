"""Splitting an axis into two, exactly or padded: what Kronecker and Monarch factors need."""

from __future__ import annotations

import sympy

from tnmoe.errors import DeclarationError
from tnmoe.factorizations.base import Sizes
from tnmoe.ir.layer import AxisSplit
from tnmoe.symbolic.dims import Dim


def split_axis(sizes: Sizes, index: str, blocks: Dim, *, pad: bool, what: str) -> AxisSplit:
    """`index` as `blocks` parts of equal length: two new indices, the first counting the blocks.

    Args:
        sizes: get the two parts' sizes.
        index: of the layer.
        blocks: the size of the first part.
        pad: append zeros where `blocks` does not divide the size (or cut off the surplus of an output).
        what: the declared field, for the error.

    Raises:
        DeclarationError: the blocks do not divide the size and `pad` is not set, or outnumber its entries.
    """
    whole = sizes.number(index)
    rest: Dim
    padded = pad
    if isinstance(whole, int) and isinstance(blocks, int):
        rest, over = divmod(whole, blocks)
        if rest == 0:
            raise DeclarationError(f"{what} = {blocks} is more than the {whole} entries of axis {index!r}")
        if over and not pad:
            below = max(d for d in range(1, blocks) if whole % d == 0)
            above = next(d for d in range(blocks + 1, whole + 1) if whole % d == 0)
            raise DeclarationError(
                f"{what} = {blocks} does not divide axis {index!r} of size {whole} (= {blocks}·{rest} + {over}); "
                f"take {below} or {above}, or set pad = true, which rounds it up to {blocks * (rest + 1)}"
            )
        padded = bool(over)
        rest += padded
    else:
        rest = sympy.ceiling(whole / sympy.sympify(blocks)) if pad else whole / sympy.sympify(blocks)
    taken = "_" if f"{index}1" in sizes.sizes else ""  # the hidden index is an output here and an input there
    parts = (f"{index}1{taken}", f"{index}2{taken}")
    for part, size in zip(parts, (blocks, rest), strict=True):
        sizes.add(part, part[0].upper() + part[1:], size)
    return AxisSplit(index, parts, padded)
