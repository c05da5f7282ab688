"""Strides that a gradient or an input may have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def filled(make: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """The views that `make` makes of zeros, of random numbers."""

    def view(rows: int, cols: int) -> Tensor:
        like = make(rows, cols)
        store = torch.randn(like.untyped_storage().nbytes() // 4, generator=torch.Generator().manual_seed(7))
        return store.as_strided(like.shape, like.stride(), like.storage_offset())

    return view


STRIDES = {
    "one_number": filled(lambda t, n: torch.zeros(1, 1).expand(t, n)),
    "one_row": filled(lambda t, n: torch.zeros(1, n).expand(t, n)),
    "one_column": filled(lambda t, n: torch.zeros(t, 1).expand(t, n)),
    "transposed": filled(lambda t, n: torch.zeros(n, t).mT),
    "sliced": filled(lambda t, n: torch.zeros(t, n + 3)[:, 2 : n + 2]),
    "sliced_transposed": filled(lambda t, n: torch.zeros(n, t + 3)[:, 2 : t + 2].mT),
    "second_rows": filled(lambda t, n: torch.zeros(2 * t, n)[::2]),
    "second_columns": filled(lambda t, n: torch.zeros(t, 2 * n)[:, ::2]),
    "channels_last": filled(lambda t, n: torch.zeros(2, n, 2, t // 4).permute(0, 2, 3, 1)),
}
"""Tensors of t × n numbers; the last has four axes, as images whose channels come first have them."""
