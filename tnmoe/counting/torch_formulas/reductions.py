"""Sums, extremes, orders, pooling and resampling: FLOPs for each element that is read."""

from __future__ import annotations

import math
from typing import Any

from tnmoe.counting.torch_formulas.call import Call, Formula, reduction, words
from tnmoe.counting.work import Flops
from tnmoe.symbolic.dims import ceil_log2

ONCE = words(
    "sum mean amax amin max min prod any all argmax argmin nansum count_nonzero cummax cummin _cummax_helper "
    "_cummin_helper median nanmedian mode bincount histc trace equal is_nonzero _is_all_true _is_any_true "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
    "adaptive_max_pool2d adaptive_max_pool3d embedding_dense_backward bucketize searchsorted kthvalue "
    "nll_loss_forward nll_loss2d_forward segment_reduce isin"
)
"""One for each element of the first operand."""

SQUARES = ["norm", "linalg_vector_norm", "linalg__powsum", "native_norm", "dist"]
"""Square and sum."""

SPREADS = ["var", "std", "var_mean", "std_mean"]
"""Sum, difference, square, sum."""


def _extremes_of_two(call: Call) -> Flops:
    """`max` and `min`, also of two tensors, one by one."""
    return Flops(elementwise=call.size if call["other"] is not None else call.first)


def _order(call: Call) -> Flops:
    """A sort, or the best of them, as in `tnmoe.costing.op_cost`: ⌈log2⌉ of the length for each element; special."""
    dim = call["dim"] if isinstance(call["dim"], int) else -1
    shape: Any = call.tensors[0].shape
    length = int(shape[dim]) if len(shape) else 1
    return Flops(special=call.first * ceil_log2(max(1, length)))


def _unique(call: Call) -> Flops:
    return Flops(special=call.first * ceil_log2(max(1, call.first)))


def _added(name: str) -> Formula:
    """What is added at chosen places: one sum for each element of the source."""

    def formula(call: Call) -> Flops:
        given = call[name]
        return Flops(elementwise=given.numel() if hasattr(given, "numel") else call.size)

    return formula


def _put(call: Call) -> Flops:
    """Adds only where it is asked to accumulate."""
    return Flops(elementwise=call["values"].numel() if call["accumulate"] else 0)


def _pool(call: Call) -> Flops:
    """Each window of each result."""
    kernel = call["kernel_size"]
    spatial = len(call.tensors[-1].shape) - 2
    window = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** max(1, spatial)
    return Flops(elementwise=window * call.size)


def _pool_backward(call: Call) -> Flops:
    return Flops(elementwise=call.tensors[0].numel())


def _resample(points: int) -> Formula:
    """A weighted sum of so many points for each element; weights are made once an axis and left out."""
    return lambda call: Flops(elementwise=(2 * points - 1) * call.size)


def _resample_backward(points: int) -> Formula:
    return lambda call: Flops(elementwise=2 * points * call.tensors[0].numel())


def _bag(call: Call) -> Flops:
    """A sum of rows, and a product each where they are weighted."""
    rows = call["indices"].numel() * call.shape("weight")[-1]
    return Flops(elementwise=rows * (1 + (call["per_sample_weights"] is not None)))


def _bag_backward(call: Call) -> Flops:
    """Each row of a bag gets its gradient added."""
    return Flops(elementwise=call["indices"].numel() * call.shape("grad")[-1])


POINTS = {
    "upsample_nearest1d": 0,
    "upsample_nearest2d": 0,
    "upsample_nearest3d": 0,
    "_upsample_nearest_exact1d": 0,
    "_upsample_nearest_exact2d": 0,
    "_upsample_nearest_exact3d": 0,
    "upsample_linear1d": 2,
    "upsample_bilinear2d": 4,
    "upsample_trilinear3d": 8,
    "upsample_bicubic2d": 16,
    "grid_sampler_2d": 4,
    "grid_sampler_3d": 8,
    "cudnn_grid_sampler": 4,
}

FORMULAS: dict[str, Formula] = {
    **{f"aten::{name}": reduction() for name in ONCE},
    **{f"aten::{name}": reduction(2) for name in SQUARES},
    **{f"aten::{name}": reduction(4) for name in SPREADS},
    "aten::max": _extremes_of_two,
    "aten::min": _extremes_of_two,
    "aten::aminmax": reduction(2),
    "aten::_aminmax": reduction(2),
    **dict.fromkeys(("aten::sort", "aten::topk"), _order),
    **dict.fromkeys(("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"), _unique),
    **dict.fromkeys(("aten::index_add", "aten::index_add_"), _added("source")),
    **dict.fromkeys((f"aten::scatter_{kind}{tail}" for kind in ("add", "reduce") for tail in ("", "_")), _added("src")),
    **dict.fromkeys(("aten::index_reduce", "aten::index_reduce_"), _added("source")),
    **dict.fromkeys(("aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put"), _put),
    **dict.fromkeys(
        (
            "aten::avg_pool2d",
            "aten::avg_pool3d",
            "aten::max_pool2d_with_indices",
            "aten::max_pool3d_with_indices",
            "aten::mkldnn_max_pool2d",
            "aten::mkldnn_max_pool3d",
        ),
        _pool,
    ),
    **dict.fromkeys(
        (
            "aten::avg_pool2d_backward",
            "aten::avg_pool3d_backward",
            "aten::max_pool2d_with_indices_backward",
            "aten::max_pool3d_with_indices_backward",
            "aten::adaptive_max_pool2d_backward",
            "aten::adaptive_max_pool3d_backward",
        ),
        _pool_backward,
    ),
    **{f"aten::{name}": _resample(n) if n else reduction(0) for name, n in POINTS.items()},
    **{f"aten::{name}_backward": _resample_backward(max(n, 1)) for name, n in POINTS.items()},
    "aten::_embedding_bag": _bag,
    "aten::_embedding_bag_forward_only": _bag,
    "aten::_embedding_bag_backward": _bag_backward,
    "aten::_embedding_bag_dense_backward": _bag_backward,
    "aten::col2im": reduction(),
    "aten::unfold_backward": reduction(),
}
