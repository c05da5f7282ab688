"""Operations on single elements. One that is not listed, and that torch tags as pointwise, counts 1 an element."""

from __future__ import annotations

from tnmoe.counting.torch_formulas.call import Call, Formula, elementwise, nothing, special, words
from tnmoe.counting.work import Flops

SIGMOID = 4
"""Minus, exponential, 1 +, reciprocal."""

GELU = 5
"""Over √2, error function, 1 +, half, times x."""

GELU_TANH = 9
"""x³ in two, times a constant, plus x, times a constant, tanh, 1 +, half, times x."""

GELU_BACKWARD = 11
"""Φ in four, the density in four, product with x, sum, product with the gradient."""

GELU_TANH_BACKWARD = 16
"""The inner function in four and its derivative in three, tanh, its derivative in two, and six to combine."""

SILU_BACKWARD = SIGMOID + 5
"""The sigmoid; 1 minus it, times x, 1 +, times the sigmoid, times the gradient."""


def _power(call: Call) -> Flops:
    """Squares and cubes are products; any other exponent is a function."""
    exponent = call["exponent"]
    if isinstance(exponent, int | float) and exponent in (1, 2, 3):
        return Flops(elementwise=max(0, int(exponent) - 1) * call.size)
    return Flops(special=call.size)


def _gelu(exact: int, tanh: int) -> Formula:
    def formula(call: Call) -> Flops:
        return Flops(special=(tanh if call["approximate"] == "tanh" else exact) * call.size)

    return formula


def _scaled_sum(call: Call) -> Flops:
    """x + α y: the product counts where α is not 1."""
    alpha = call["alpha"]
    return Flops(elementwise=call.size * (1 + (alpha is not None and alpha != 1)))


FUNCTIONS = words(
    "acos acosh asin asinh atan atanh cos cosh digamma erf erfc erfinv exp exp2 expm1 i0 lgamma log log10 log1p log2 "
    "reciprocal rsqrt sin sinc sinh sqrt tan tanh atan2 hypot igamma igammac polygamma mvlgamma special_airy_ai "
    "special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr special_erfcx special_i0e "
    "special_i1 special_i1e special_log_ndtr special_ndtri special_zeta special_spherical_bessel_j0 "
    "special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1"
)
"""One special FLOP an element."""

GATES: dict[str, int] = {
    "sigmoid": SIGMOID,
    "silu": SIGMOID + 1,
    "softplus": 3,  # exponential, 1 +, logarithm
    "mish": 3 + 2,
    "elu": 4,
    "celu": 4,
    "selu": 4,
    "logit": 3,
    "log_sigmoid_forward": 4,
    "logaddexp": 5,
    "logaddexp2": 5,
    "hardswish": 4,
    "hardsigmoid": 3,
    "sigmoid_backward": 3,
    "tanh_backward": 3,
    "silu_backward": SILU_BACKWARD,
    "mish_backward": 12,
    "softplus_backward": 4,
    "elu_backward": 4,
    "log_sigmoid_backward": 4,
    "logit_backward": 3,
    "hardswish_backward": 4,
    "hardsigmoid_backward": 2,
}
"""Special FLOPs an element, each arithmetic operation 1."""

ARITHMETIC: dict[str, int] = {
    "addcmul": 2,
    "addcdiv": 2,
    "lerp": 3,
    "leaky_relu": 2,
    "leaky_relu_backward": 2,
    "_prelu_kernel": 2,
    "_prelu_kernel_backward": 3,
    "rrelu": 2,
    "rrelu_with_noise": 2,
    "clamp": 1,
    "hardtanh": 1,
    "hardtanh_backward": 1,
    "threshold_backward": 1,
    "native_dropout": 2,
    "native_dropout_backward": 2,
    "_fused_dropout": 2,
    "_masked_scale": 2,
    "xlogy": 2,
    "smooth_l1_loss_backward": 3,
    "huber_loss_backward": 3,
    "mse_loss_backward": 3,
    "mse_loss": 3,  # difference, square, sum
    "smooth_l1_loss": 4,
    "huber_loss": 4,
    "binary_cross_entropy": 6,
    "binary_cross_entropy_backward": 5,
    "complex": 0,
    "polar": 4,
    "_add_relu": 2,
    "cumsum": 1,
    "cumprod": 1,
    "glu_backward": 8,
    "floor_divide": 1,
    "fmod": 1,
    "_fake_quantize_learnable_per_tensor_affine": 5,
    "fake_quantize_per_tensor_affine_cachemask": 5,
    "fake_quantize_per_channel_affine_cachemask": 5,
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": 5,
    "quantize_per_tensor": 4,  # quotient, round, sum, clamp
    "quantize_per_channel": 4,
    "quantize_per_tensor_dynamic": 6,  # and the extremes
    "dequantize": 2,
    "_transform_bias_rescale_qkv": 2,
    "linalg_cross": 3,
    "abs": 1,
    "heaviside": 1,
    "copysign": 1,
    "eq": 1,
    "ne": 1,
    "lt": 1,
    "le": 1,
    "gt": 1,
    "ge": 1,
}
"""Element-wise FLOPs for each element of the result; those of losses for each of the operand, see below."""

COPIES = ("clone", "positive", "where", "masked_fill", "nan_to_num", "_conj_physical", "conj_physical")
"""Pointwise by torch's tag, and no arithmetic: a copy, or a choice of elements."""

LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy")


def _losses() -> dict[str, Formula]:
    """A loss works on every element that it reads, whatever it returns."""

    def of(per_element: int) -> Formula:
        return lambda call: Flops(elementwise=per_element * call.first)

    return {f"aten::{name}": of(ARITHMETIC[name]) for name in LOSSES}


def _each(names: dict[str, Formula]) -> dict[str, Formula]:
    """Under aten, and the forms that write over their operand."""
    return {f"aten::{name}{tail}": formula for name, formula in names.items() for tail in ("", "_")}


FORMULAS: dict[str, Formula] = {
    **_each({name: elementwise(count) for name, count in ARITHMETIC.items()}),
    **_each({name: special(count) for name, count in GATES.items()}),
    **_each({name: special(1) for name in FUNCTIONS}),
    **_each(dict.fromkeys(COPIES, nothing)),
    **_each({"add": _scaled_sum, "sub": _scaled_sum, "rsub": _scaled_sum, "pow": _power}),
    **_each({"gelu": _gelu(GELU, GELU_TANH)}),
    **_losses(),
    "aten::gelu_backward": _gelu(GELU_BACKWARD, GELU_TANH_BACKWARD),
    "aten::glu": special(SIGMOID + 1),
    **{f"quantized::{name}": elementwise(count) for name, count in (("add", 1), ("mul", 1))},
    **{f"quantized::{name}": elementwise(count) for name, count in (("add_relu", 2), ("mul_relu", 2))},
}
