"""What moves data, reserves memory or draws numbers: no FLOPs, and what it reads and writes."""

from __future__ import annotations

from tnmoe.counting.torch_formulas.call import Call, Formula, Moved, nothing, tensor_bytes, words

RESERVES = words(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided empty_quantized resize_ set_"
)
"""Memory, of which nothing is written."""

FILLS = words(
    "zeros ones full arange range linspace logspace eye scalar_tensor zeros_like ones_like full_like new_zeros "
    "new_ones new_full fill fill_ zero zero_ tril_indices triu_indices bartlett_window blackman_window hamming_window "
    "hann_window kaiser_window rand randn randint randperm rand_like randn_like randint_like uniform uniform_ normal "
    "normal_ normal_functional bernoulli bernoulli_ exponential exponential_ random random_ log_normal_ cauchy_ "
    "geometric_ multinomial poisson binomial fft_fftfreq fft_rfftfreq _efficientzerotensor _standard_gamma "
    "_sample_dirichlet"
)
"""Written without reading; random numbers, whose generators differ by device, count as nothing but bytes."""

COPIES = words(
    "_to_copy copy_ cat stack _stack _unsafe_view _reshape_copy repeat flip roll rot90 constant_pad_nd "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
    "replication_pad2d_backward replication_pad3d_backward im2col tril triu tril_ triu_ diag_embed block_diag "
    "slice_scatter select_scatter diagonal_scatter as_strided_scatter slice_backward select_backward "
    "diagonal_backward unsafe_split unsafe_split_with_sizes pixel_shuffle pixel_unshuffle channel_shuffle "
    "masked_scatter masked_scatter_ masked_scatter_backward masked_select index_fill index_fill_ index_copy "
    "index_copy_ nonzero nonzero_static lift lift_fresh lift_fresh_copy detach alias detach_ as_strided_ squeeze_ "
    "unsqueeze_ t_ transpose_ put put_ _pack_padded_sequence _chunk_cat _copy_from expand_copy view_copy int_repr "
    "to_mkldnn _to_dense _mkldnn_reshape _mkldnn_transpose _nested_from_padded _nested_tensor_from_mask "
    "to_padded_tensor _pin_memory record_stream repeat_interleave max_unpool2d max_unpool3d nll_loss_backward "
    "nll_loss2d_backward _lazy_clone view_as_real_copy view_as_complex_copy permute_copy "
    "_jagged_to_padded_dense_forward _padded_dense_to_jagged_forward _nested_get_values_copy unbind_copy"
)
"""Elements are read and written as they are, or with others between them."""

ASKS = words(
    "_local_scalar_dense _assert_async _functional_assert_async _assert_scalar _functional_assert_scalar "
    "_assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size _fused_sdp_choice is_same_size "
    "is_pinned _has_same_storage_numel _nested_tensor_size _nested_tensor_strides _nested_tensor_storage_offsets "
    "_nested_tensor_from_mask_left_aligned _make_dep_token is_coalesced dense_dim sparse_dim _nnz q_scale "
    "q_zero_point q_per_channel_scales q_per_channel_zero_points q_per_channel_axis qscheme allclose _print size "
    "stride numel sym_size sym_stride sym_numel sym_storage_offset storage_offset dim is_contiguous sym_is_contiguous "
    "_linalg_check_errors _amp_update_scale_"
)
"""Questions about tensors: neither FLOPs nor bytes to speak of."""

PICKS = ("embedding", "index_select", "gather", "index", "take", "_unsafe_index", "_unsafe_masked_index")
"""Chosen elements are read, not all of what they are chosen from."""

PLACES = {
    "index_add_": "source",
    "index_copy_": "source",
    "scatter_": "src",
    "scatter_add_": "src",
    "index_put_": "values",
    "_index_put_impl_": "values",
}
"""Written in place at chosen positions, as many elements as this operand has."""


def _reserve(_: Call) -> tuple[int, int]:
    return 0, 0


def _fill(call: Call) -> tuple[int, int]:
    return 0, sum(tensor_bytes(t) for t in call.results)


def _copy_over(call: Call) -> tuple[int, int]:
    return tensor_bytes(call["src"]), sum(tensor_bytes(t) for t in call.results)


def _pick(call: Call) -> tuple[int, int]:
    """As much as is written, and the positions."""
    written = sum(tensor_bytes(t) for t in call.results)
    return written + sum(tensor_bytes(t) for t in call.tensors[1:]), written


def _place(name: str) -> Moved:
    def moved(call: Call) -> tuple[int, int]:
        source = call[name]
        each = call["self"].element_size()
        count = source.numel() if hasattr(source, "numel") else call["index"].numel()
        return sum(tensor_bytes(t) for t in call.tensors[1:]), count * each

    return moved


FORMULAS: dict[str, Formula] = {
    **{f"aten::{name}": nothing for names in (RESERVES, FILLS, COPIES, ASKS, PICKS) for name in names},
    "aten::scatter": nothing,
    "aten::scatter_": nothing,
}

MOVED: dict[str, Moved] = {
    **{f"aten::{name}": _reserve for names in (RESERVES, ASKS) for name in names},
    **{f"aten::{name}": _fill for name in FILLS},
    **{f"aten::{name}": _pick for name in PICKS},
    **{f"aten::{name}": _place(source) for name, source in PLACES.items()},
    "aten::copy_": _copy_over,
}
