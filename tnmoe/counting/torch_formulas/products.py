"""Products of matrices and vectors: dense, batched, scaled, of packed integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnmoe.counting.torch_formulas.call import Call, Formula, unpacked
from tnmoe.counting.work import Flops


def product(left: str, right: str, *, added: bool = False) -> Formula:
    """`left` @ `right`, the inner axis being the last of `left`; plus something as large as the result, if `added`."""

    def formula(call: Call) -> Flops:
        size = math.prod(call.shape(left)) * math.prod(call.shape(right)[2 if len(call.shape(right)) == 3 else 1 :])
        return Flops(matmul=2 * size, elementwise=call.size if added else 0)

    return formula


def weight_product(call: Call) -> Flops:
    """x @ W.T, its shape read off the result: packed weights do not tell theirs."""
    biased = call["bias"] is not None or call["B"] is not None
    return Flops(_first_by_result(call).matmul, call.size if biased else 0)


def _first_by_result(call: Call) -> Flops:
    """a @ b, the extent of the sum read off `a`."""
    return Flops(matmul=2 * call.size * call.tensors[0].shape[-1])


def _scaled(call: Call) -> Flops:
    """a @ b with scales: the product, and a scale for each entry, where it has one; biases are sums."""
    size = math.prod(call.shape("self")) * call.shape("mat2")[-1]
    return Flops(matmul=2 * size, elementwise=call.size * (1 + (call["bias"] is not None)))


def _outer(call: Call) -> Flops:
    """A product of two vectors and a sum: no index is summed."""
    return Flops(elementwise=2 * call.size)


def _packed_linear(activated: bool) -> Formula:
    """A quantised layer, which knows its biases; and a comparison for each entry, if it is activated."""

    def formula(call: Call) -> Flops:
        _, biased = unpacked(call["W_prepack"])
        return Flops(_first_by_result(call).matmul, call.size * (biased + activated))

    return formula


def _trilinear(call: Call) -> Flops:
    """`torch.nn.Bilinear` and its gradients: a product of the first two operands, then one with the third.

    Each operand lacks the axes in its `expand`; those in `sumdim` are summed as soon as no operand is left with them.
    """
    expands = [call["expand1"], call["expand2"], call["expand3"]]
    shapes = [_with_ones(call.shape(f"i{k + 1}"), axes) for k, axes in enumerate(expands)]
    first, second, third = shapes
    summed = set(call["sumdim"])
    early = summed & set(expands[2])
    joint = [max(pair) for pair in zip(first, second, strict=True)]
    between = [1 if axis in early else n for axis, n in enumerate(joint)]
    last = [max(pair) for pair in zip(between, third, strict=True)]
    flops = [(math.prod(joint), bool(early)), (math.prod(last), bool(summed - early))]
    return Flops(sum(2 * n for n, sums in flops if sums), sum(n for n, sums in flops if not sums))


def _with_ones(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    sizes = iter(shape)
    return [1 if axis in axes else next(sizes) for axis in range(len(shape) + len(axes))]


def _triangular(call: Call) -> Flops:
    """Substitution: half of a product of the matrix with as many columns, and a quotient for each entry."""
    order = call.tensors[0].shape[-1]
    return Flops(matmul=(order - 1) * call.size, elementwise=0 if call["unitriangular"] else call.size)


FORMULAS: dict[str, Formula] = {
    "aten::mm": product("self", "mat2"),
    "aten::bmm": product("self", "mat2"),
    "aten::addmm": product("mat1", "mat2", added=True),
    "aten::addmm_": product("mat1", "mat2", added=True),
    "aten::_addmm_activation": product("mat1", "mat2", added=True),
    "aten::baddbmm": product("batch1", "batch2", added=True),
    "aten::baddbmm_": product("batch1", "batch2", added=True),
    "aten::addbmm": product("batch1", "batch2", added=True),
    "aten::addbmm_": product("batch1", "batch2", added=True),
    "aten::mv": product("self", "vec"),
    "aten::addmv": product("mat", "vec", added=True),
    "aten::addmv_": product("mat", "vec", added=True),
    "aten::dot": product("self", "tensor"),
    "aten::vdot": product("self", "other"),
    "aten::addr": _outer,
    "aten::addr_": _outer,
    "aten::_trilinear": _trilinear,
    "aten::linalg_solve_triangular": _triangular,
    "aten::mkldnn_linear": weight_product,
    "aten::_scaled_mm": _scaled,
    "aten::_scaled_mm_v2": _scaled,
    "aten::_int_mm": product("self", "mat2"),
    "aten::_weight_int8pack_mm": _first_by_result,
    "aten::_weight_int4pack_mm": _first_by_result,
    "aten::_weight_int4pack_mm_for_cpu": _first_by_result,
    "aten::_weight_int4pack_mm_with_scales_and_zeros": _first_by_result,
    "aten::_dyn_quant_matmul_4bit": _first_by_result,
    "aten::_mixed_dtypes_linear": weight_product,
    "aten::_sparse_semi_structured_linear": weight_product,
    "quantized::linear_dynamic": _packed_linear(False),
    "quantized::linear_dynamic_fp16": _packed_linear(False),
    "quantized::linear": _packed_linear(False),
    "quantized::linear_relu": _packed_linear(True),
    "quantized::linear_relu_dynamic": _packed_linear(True),
    "mkldnn::_linear_pointwise": weight_product,
    "mkl::_mkl_linear": weight_product,
}
