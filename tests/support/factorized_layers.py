"""Layers of every factorization, by name."""

from __future__ import annotations

import tnmoe

EMITTED = {
    "tensor_train": tnmoe.TensorTrain((6, 8)),
    "tucker": tnmoe.Tucker((6, 8, 8)),
    "block_term": tnmoe.BlockTerm(4, (4, 5, 5)),
    "hierarchical_tucker": tnmoe.HierarchicalTucker(("n", ("i", "o")), (6, 8, 8, 8)),
    "low_rank": tnmoe.LowRank(8),
    "kronecker": tnmoe.Kronecker((3, 4), 4),
    "monarch": tnmoe.Monarch((3, 4), 4),
    "custom": tnmoe.Custom("bn,bi,nr,ir,ro->bo", {"r": 32}),
    "mixed ring": tnmoe.TensorRing((6, 8, 6), ("i", "n", "o")),
}

LINEAR = {
    "cp": tnmoe.CP(4),
    "dense": tnmoe.Dense(),
    "tensor_ring": tnmoe.TensorRing((2, 3)),
    "tensor_train": tnmoe.TensorTrain((4,)),
    "tucker": tnmoe.Tucker((3, 4)),
    "block_term": tnmoe.BlockTerm(2, (3, 4)),
    "hierarchical_tucker": tnmoe.HierarchicalTucker(("i", "o"), (3, 4)),
    "low_rank": tnmoe.LowRank(3),
    "kronecker": tnmoe.Kronecker((3, 2), 2),
    "monarch": tnmoe.Monarch((5, 3), 2, pad=True),
    "custom": tnmoe.Custom("bi,ir,ro->bo", {"r": 3}),
}
