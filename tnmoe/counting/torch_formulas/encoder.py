"""The fast path of `nn.TransformerEncoderLayer`: the whole layer is one operation."""

from __future__ import annotations

import math

from tnmoe.counting.torch_formulas.attention import heads_flops
from tnmoe.counting.torch_formulas.call import Call, Formula
from tnmoe.counting.torch_formulas.norms import NORM
from tnmoe.counting.torch_formulas.pointwise import GELU
from tnmoe.counting.work import Flops


def _encoder_layer(call: Call) -> Flops:
    """Attention with its maps, two maps around an activation, two norms, two sums."""
    shape, hidden = call.shape("src"), call.shape("ffn_weight_1")[0]
    width = call["embed_dim"]
    rows = math.prod(shape[:-1])
    heads = heads_flops(shape, shape, width, call["num_heads"], masked=call["mask"] is not None)
    activation = GELU if call["use_gelu"] else 0
    return Flops(
        heads.matmul + 2 * rows * 2 * width * hidden,
        heads.elementwise + rows * (hidden + width) + 2 * rows * width + (0 if activation else rows * hidden),
        heads.special + activation * rows * hidden + 2 * (NORM + 2) * rows * width,
    )


FORMULAS: dict[str, Formula] = {"aten::_transformer_encoder_layer_fwd": _encoder_layer}
