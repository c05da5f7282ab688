"""Results of operations whose own shape functions refuse fake tensors, or types that their kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnmoe.counting.torch_formulas.call import Call, unpacked
from tnmoe.counting.torch_formulas.grouped import FORMULAS as GROUPED
from tnmoe.counting.torch_formulas.grouped import grouped_shape

Result = Callable[[Call], Tensor]


def _grouped(call: Call) -> Tensor:
    """Also of types that the meta form refuses."""
    left, right, offsets = call["self"], call["mat2"], call["offs"]
    groups = offsets.shape[0] if offsets is not None else 0
    dtype = call["out_dtype"] or (left.dtype if call["scale_a"] is None else torch.bfloat16)
    return torch.empty(grouped_shape(left.shape, right.shape, groups), dtype=dtype, device=left.device)


def _quantised(call: Call) -> Tensor:
    """Fake tensors have no scales: integers of the same size stand for them."""
    return torch.empty(call.tensors[0].shape, dtype=torch.uint8, device=call.tensors[0].device)


def _dequantised(call: Call) -> Tensor:
    return torch.empty(call.tensors[0].shape, dtype=torch.float32, device=call.tensors[0].device)


def _linear(call: Call) -> Tensor:
    x, packed = call.tensors[0], call["W_prepack"]
    return torch.empty((*x.shape[:-1], unpacked(packed)[0][0]), dtype=torch.uint8, device=x.device)


def _convolution(call: Call) -> Tensor:
    x, packed = call.tensors[0], call["packed_weight"] if call["packed_weight"] is not None else call["weight"]
    weight = torch.empty(unpacked(packed)[0], device=x.device)
    dims = weight.dim() - 2
    place = [list(values)[-dims:] for values in (packed.stride(), packed.padding(), packed.dilation())]
    function = torch.ops.aten.convolution.default
    made: Tensor = function(x.to(torch.float32), weight, None, *place, False, [0] * dims, packed.groups())
    return torch.empty(made.shape, dtype=torch.uint8, device=x.device)


RESULTS: dict[str, Result] = {
    **dict.fromkeys(GROUPED, _grouped),
    **dict.fromkeys(("aten::quantize_per_tensor", "aten::quantize_per_channel"), _quantised),
    **dict.fromkeys(("quantized::add", "quantized::add_relu", "quantized::mul", "quantized::mul_relu"), _quantised),
    "aten::quantize_per_tensor_dynamic": _quantised,
    "aten::dequantize": _dequantised,
    **dict.fromkeys(("quantized::linear", "quantized::linear_relu"), _linear),
    **dict.fromkeys((f"quantized::conv{d}d{relu}" for d in (1, 2, 3) for relu in ("", "_relu")), _convolution),
}
"""By the name of the operation."""


def result_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation returns on fake tensors."""
    if (result := RESULTS.get(func._schema.name)) is not None:
        return result(Call.of(func, args, kwargs, None))
    return func(*args, **kwargs)
