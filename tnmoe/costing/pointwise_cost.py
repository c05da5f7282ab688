"""What a gate, GELU or a norm costs, forward and backward, and what its backward pass keeps."""

from __future__ import annotations

from collections.abc import Set
from typing import NoReturn, cast

from tnmoe.costing.cost import Cost, Inside, Sizes
from tnmoe.errors import CostError, no_rule
from tnmoe.ir.dataflow import elements
from tnmoe.ir.pointwise_ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    GeluBackward,
    LayerNorm,
    PointwiseOp,
    Sigmoid,
    Softmax,
    Sparsemax,
)
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim, ceil_log2

GELU_BACKWARD = 11
"""FLOPs for each element: Φ in four, the density in four, product with x, sum, product with the gradient."""


def forward(op: PointwiseOp, sizes: Sizes) -> Cost:
    """Work and result of one op."""
    written = elements(op.out.indices, sizes)
    return Cost(special_flops=_for_each_element(op, sizes) * written, activations=written)


def _for_each_element(op: PointwiseOp, sizes: Sizes) -> Dim:
    """FLOPs for each element, counted off the definition in `backends/numpy/pointwise.py`.

    The threshold of a sparse gate is searched as the emitted module does it for all but small batches, which it sorts,
    in as many steps as it takes for types of up to 32 bits.
    """
    match op:
        case Softmax():  # maximum, difference, exponential, sum, quotient
            return 5
        case Entmax15(index=index):
            # maximum, difference, half, clamp; a step: difference, clamp, square, sum, sum; difference, clamp, square
            return 7 + 5 * entmax15_steps(ceil_log2(sizes[index]))
        case Sparsemax(index=index):
            # maximum, difference, clamp; a step: difference, clamp, sum, sign, sum; difference, clamp
            return 5 + 5 * sparsemax_steps(ceil_log2(sizes[index]))
        case Sigmoid():  # minus, exponential, 1 +, reciprocal
            return 4
        case Gelu():  # over √2, erf, 1 +, half, times x
            return 5
        case GeluBackward():
            return GELU_BACKWARD
        case LayerNorm(weight=weight, bias=bias):  # sum, difference, square, sum, times 1/σ
            return 5 + (weight is not None) + (bias is not None)
        case BatchNorm():  # as LayerNorm, in training
            return 5
        case _:
            no_rule(op, "its cost")


def entmax15_steps(digits: Dim) -> Dim:
    """Steps to the threshold of ⌈log2 of the experts⌉ `digits`, for types of up to 32 bits, as emitted."""
    return cast(Dim, 3 + digits // 2)


def sparsemax_steps(digits: Dim) -> Dim:
    """As `entmax15_steps`."""
    return cast(Dim, 3 + digits - digits // 4)


def backward(op: PointwiseOp, sizes: Sizes, requires_grad: Set[str]) -> Cost:
    """Work of the gradients of the operands in `requires_grad`, of which there is one."""
    return Cost(special_flops=_backwards_for_each_element(op, requires_grad) * elements(op.out.indices, sizes))


def _backwards_for_each_element(op: PointwiseOp, requires_grad: Set[str]) -> int:
    """FLOPs for each element of the result, counted off what torch's (or the emitted) backward does."""
    match op:
        case Softmax():  # product with y, sum, difference, product
            return 4
        case Sigmoid():  # 1 - y, two products
            return 3
        case Entmax15():  # the square's two products; mask, two sums, product, difference, half
            return 8
        case Sparsemax():  # mask, sum, product, difference
            return 4
        case Gelu():
            return GELU_BACKWARD
        case LayerNorm(_, x, _, weight, bias):
            normal = 10 if x.name in requires_grad else 0  # x̂ in two, product, two sums with a product, four to combine
            affine = 2 * (weight is not None and weight.name in requires_grad) + (
                bias is not None and bias.name in requires_grad
            )
            return normal + affine
        case BatchNorm():
            return 10
        case GeluBackward():
            _differentiated_twice(op)
        case _:
            no_rule(op, "the work of its gradients")


def saved(op: PointwiseOp) -> tuple[Value, ...]:
    """Operands and results that the backward of `op` reads; some operand needs a gradient."""
    match op:
        case Softmax(out) | Sigmoid(out) | Sparsemax(out):
            return (out,)
        case Gelu(_, x) | LayerNorm(_, x) | BatchNorm(_, x):
            return (x,)
        case Entmax15():
            return ()  # its root, which is no value of the program: see `inside`
        case GeluBackward():
            _differentiated_twice(op)
        case _:
            no_rule(op, "what its backward pass reads")


def inside(op: PointwiseOp, sizes: Sizes) -> Inside:
    """What the backward of `op` keeps besides values of the program."""
    match op:
        case Entmax15(_, x):
            return Inside("root of the result", elements(x.indices, sizes))
        case LayerNorm(_, x, index):
            return Inside("mean and 1/σ of rows", 2 * elements(tuple(i for i in x.indices if i != index), sizes))
        case BatchNorm(_, x, index):  # in training; one row has no statistics of its own
            alone = elements(tuple(i for i in x.indices if i != index), sizes) == 1
            return Inside("mean and 1/σ of columns", 0 if alone else 2 * sizes[index])
        case Softmax() | Sparsemax() | Sigmoid() | Gelu() | GeluBackward():  # a value of the program is enough
            return Inside()
        case _:
            no_rule(op, "what its backward pass keeps")


def _differentiated_twice(op: GeluBackward) -> NoReturn:
    raise CostError(f"{op.out.name!r} is of a backward pass, which nobody differentiates: it keeps nothing for one")
