"""Convolutions of any dimension, grouped, dilated and transposed, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnmoe.counting.torch_formulas.call import Call, Formula, unpacked
from tnmoe.counting.work import Flops


def convolution_flops(positions: Sequence[int], batch: int, weight: Sequence[int], biased: int = 0) -> Flops:
    """The weights meet every position: of the result, or of the operand where the convolution is transposed.

    `weight` is (out, in / groups, …) or (in, out / groups, …), so that groups are in it.
    """
    return Flops(2 * batch * math.prod(positions) * math.prod(weight), biased)


def _spatial(shape: Sequence[int], weight: Sequence[int]) -> tuple[int, Sequence[int]]:
    """The batch (1 where there is none) and the positions."""
    dims = len(weight) - 2
    return (shape[0] if len(shape) == len(weight) else 1), shape[len(shape) - dims :]


def _operand(call: Call) -> str:
    return "input" if call["input"] is not None else "self"


def _convolution(call: Call) -> Flops:
    weight, x, out = call.shape("weight"), call.shape(_operand(call)), tuple(call.results[0].shape)
    batch, positions = _spatial(x if call["transposed"] else out, weight)
    return convolution_flops(positions, batch, weight, call.size if call["bias"] is not None else 0)


def _transposed(call: Call) -> Flops:
    weight = call.shape("weight")
    batch, positions = _spatial(call.shape(_operand(call)), weight)
    return convolution_flops(positions, batch, weight, call.size if call["bias"] is not None else 0)


def _backward(call: Call) -> Flops:
    """A product as large as the forward pass for each of both gradients, a sum for that of the bias."""
    weight, grad, x = call.shape("weight"), call.shape("grad_output"), call.shape(_operand(call))
    of_x, of_weight, *rest = call["output_mask"] or (True, True, False)
    batch, positions = _spatial(x if call["transposed"] else grad, weight)
    once = convolution_flops(positions, batch, weight).matmul
    return Flops(once * (bool(of_x) + bool(of_weight)), math.prod(grad) * sum(map(bool, rest)))


def _time_batch_channels(call: Call) -> Flops:
    """`conv_tbc`: weights (width, in, out)."""
    width, inside, _ = call.shape("weight")
    return Flops(2 * call.size * width * inside, call.size)


def _packed(call: Call) -> Flops:
    """Quantised convolutions, whose weights and biases are packed out of sight; torch can unpack them."""
    packed = call["packed_weight"] if call["packed_weight"] is not None else call["weight"]
    weight, biased = unpacked(packed)
    batch, positions = _spatial(tuple(call.results[0].shape), weight)
    return convolution_flops(positions, batch, weight, call.size * biased)


def _packed_relu(call: Call) -> Flops:
    product = _packed(call)
    return Flops(product.matmul, product.elementwise + call.size)


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(
        (
            "aten::convolution",
            "aten::_convolution",
            "aten::convolution_overrideable",
            "aten::cudnn_convolution",
            "aten::cudnn_convolution_relu",
            "aten::miopen_convolution",
            "aten::miopen_depthwise_convolution",
            "aten::mkldnn_convolution",
            "aten::_slow_conv2d_forward",
            "aten::slow_conv3d_forward",
            "aten::slow_conv_dilated2d",
            "aten::slow_conv_dilated3d",
            "aten::_conv_depthwise2d",
            "aten::conv_depthwise3d",
            "aten::_nnpack_spatial_convolution",
            "mkldnn::_convolution_pointwise",
        ),
        _convolution,
    ),
    **dict.fromkeys(
        (
            "aten::cudnn_convolution_transpose",
            "aten::miopen_convolution_transpose",
            "aten::slow_conv_transpose2d",
            "aten::slow_conv_transpose3d",
        ),
        _transposed,
    ),
    "aten::convolution_backward": _backward,
    "aten::convolution_backward_overrideable": _backward,
    "aten::_slow_conv2d_backward": _backward,
    "aten::conv_tbc": _time_batch_channels,
    **{f"quantized::conv{d}d": _packed for d in (1, 2, 3)},
    **{f"quantized::conv{d}d_relu": _packed_relu for d in (1, 2, 3)},
}
