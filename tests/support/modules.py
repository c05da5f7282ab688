"""Small layers of every kind, and input for them."""

from __future__ import annotations

import torch
from torch import Tensor

import tnmoe

ENTMAX_BATCH = tnmoe.Gate("entmax15", "batch")

ENTMAX_LAYER = tnmoe.Gate("entmax15", "layer")

SOFTMAX = tnmoe.Gate("softmax", "layer")

RING = tnmoe.TensorRing((2, 3, 4))

SPECS = {
    "cp": tnmoe.MuMoE(6, 5, 4, tnmoe.CP(7), ENTMAX_LAYER),
    "cp_two_levels": tnmoe.MuMoE(6, 5, (4, 3), tnmoe.CP(7), tnmoe.Gate("sparsemax", "layer")),
    "tr_block": tnmoe.MuMoEBlock(6, 8, 5, 4, RING, ENTMAX_LAYER, input_norm=True),
    "tr_batch_norm": tnmoe.MuMoEBlock(6, 8, 5, 4, RING, ENTMAX_BATCH),
    "dense": tnmoe.MuMoE(6, 5, (4, 2), tnmoe.Dense(), tnmoe.Gate("softmax", "none")),
    "three_levels": tnmoe.MuMoE(6, 5, (3, 2, 4), tnmoe.TensorRing((2, 3, 2, 2, 3)), tnmoe.Gate("sigmoid", "layer")),
    "monarch": tnmoe.MuMoEBlock(6, 8, 5, 4, tnmoe.Monarch((4, 2), 2, pad=True), SOFTMAX),
    "custom": tnmoe.MuMoE(6, 5, (3, 2), tnmoe.Custom("bn,bm,bi,nmt,tip,po->bo", {"t": 3, "p": 4}), SOFTMAX),
    "mlp": tnmoe.MLP(6, 8, 5, input_norm=True),
    "dense_moe": tnmoe.DenseMoE(6, 8, 5, 4),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
