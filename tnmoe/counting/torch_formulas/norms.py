"""Norms and softmax: special FLOPs, by the conventions of `tnmoe.costing.op_cost` and `tnmoe.costing.backward`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnmoe.counting.torch_formulas.call import Call, Formula
from tnmoe.counting.work import Flops

SOFTMAX = 5
"""For each element: maximum, difference, exponential, sum, quotient."""

SOFTMAX_BACKWARD = 4
"""Product with the result, sum, difference, product."""

NORM = 5
"""Sum, difference, square, sum, times 1/σ."""

NORM_BACKWARD = 10
"""The normalised in two, product, two sums with a product, four to combine."""


def _given(call: Call, *names: str) -> int:
    return sum(call[name] is not None for name in names)


def _softmax(call: Call) -> Flops:
    return Flops(special=SOFTMAX * call.size)


def _softmax_backward(call: Call) -> Flops:
    return Flops(special=SOFTMAX_BACKWARD * call.size)


def _norm(call: Call) -> Flops:
    return Flops(special=(NORM + _given(call, "weight", "bias")) * call.first)


def _inference_batch_norm(call: Call) -> Flops:
    """With statistics of its own: difference, times 1/σ, and what is affine."""
    return Flops(special=(2 + _given(call, "weight", "bias")) * call.first)


def _batch_norm(call: Call) -> Flops:
    """In training, or with given statistics where that is asked for."""
    training = call["training"] if "training" in call.arguments else call["train"]
    return _inference_batch_norm(call) if training is False else _norm(call)


def _mask(call: Call, name: str = "output_mask") -> Sequence[bool]:
    return call[name] if call[name] is not None else (True, True, True)


def _norm_backward(call: Call) -> Flops:
    """Of the operand, of the weight in two, of the bias in one; those that are asked for."""
    of_x, of_weight, *rest = _mask(call)
    each = NORM_BACKWARD * bool(of_x) + 2 * bool(of_weight) + sum(map(bool, rest))
    return Flops(special=each * call.first)


def rms_norm(shape: Sequence[int], width: int, affine: bool) -> Flops:
    """As its parts, which run one by one where no kernel fuses them: square, mean; plus ε, rsqrt; product(s)."""
    size = math.prod(shape)
    rows = size // width if width else 0
    return Flops(elementwise=(3 + affine) * size + rows, special=rows)


def _rms_norm(call: Call) -> Flops:
    width = math.prod(call["normalized_shape"])
    return rms_norm(call.shape("input"), width, call["weight"] is not None)


def _rms_norm_backward(call: Call) -> Flops:
    """x̂ in one, product with the weight, product and sum, difference of two products, and the weight's in two."""
    of_x, of_weight, *_ = _mask(call)
    size = math.prod(call.shape("input"))
    return Flops(special=(6 * bool(of_x) + 2 * bool(of_weight)) * size)


FORMULAS: dict[str, Formula] = {
    "aten::_softmax": _softmax,
    "aten::_safe_softmax": _softmax,
    "aten::_masked_softmax": lambda call: Flops(elementwise=call.size, special=SOFTMAX * call.size),
    "aten::_log_softmax": _softmax,  # the logarithm is one a row, in place of a quotient an element a difference
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_log_softmax_backward_data": _softmax_backward,
    "aten::_masked_softmax_backward": _softmax_backward,
    "aten::logsumexp": lambda call: Flops(special=4 * call.first),
    "aten::_logcumsumexp": lambda call: Flops(special=4 * call.first),
    "aten::native_layer_norm": _norm,
    "aten::native_group_norm": _norm,
    "aten::native_batch_norm": _batch_norm,
    "aten::_native_batch_norm_legit": _batch_norm,
    "aten::_native_batch_norm_legit_functional": _batch_norm,
    "aten::_native_batch_norm_legit_no_training": _inference_batch_norm,
    "aten::_batch_norm_with_update": _norm,
    "aten::_batch_norm_with_update_functional": _norm,
    "aten::_batch_norm_no_update": _inference_batch_norm,
    "aten::cudnn_batch_norm": _batch_norm,
    "aten::miopen_batch_norm": _batch_norm,
    "aten::native_layer_norm_backward": _norm_backward,
    "aten::native_group_norm_backward": _norm_backward,
    "aten::native_batch_norm_backward": _norm_backward,
    "aten::batch_norm_backward": _norm_backward,
    "aten::cudnn_batch_norm_backward": lambda call: Flops(special=(NORM_BACKWARD + 3) * call.first),
    "aten::miopen_batch_norm_backward": lambda call: Flops(special=(NORM_BACKWARD + 3) * call.first),
    "aten::_fused_rms_norm": _rms_norm,
    "aten::_fused_rms_norm_backward": _rms_norm_backward,
    "aten::_weight_norm_interface": lambda call: Flops(special=4 * call.first),  # square, sum, times g/norm
    "aten::_weight_norm_interface_backward": lambda call: Flops(special=8 * call.first),
    "aten::renorm": lambda call: Flops(special=4 * call.first),
    "aten::renorm_": lambda call: Flops(special=4 * call.first),
}
