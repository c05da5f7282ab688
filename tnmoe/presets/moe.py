"""Every family of mixtures at the size of a GPT-2 block (768→3072→768): at equal parameters, and at equal MACs."""

from __future__ import annotations

from tnmoe.factorizations.cp import CP
from tnmoe.factorizations.tensor_ring import TensorRing
from tnmoe.layers.cartesian_moe import CartesianMoE
from tnmoe.layers.deep_moe import DeepMoE
from tnmoe.layers.dense_moe import DenseMoE
from tnmoe.layers.expert_choice import ExpertChoice
from tnmoe.layers.gate import Gate
from tnmoe.layers.kinds import Spec
from tnmoe.layers.linear import MLP
from tnmoe.layers.lora import MoLoRA, MoSLoRA, MoV
from tnmoe.layers.mixture_of_depths import MixtureOfDepths
from tnmoe.layers.mixture_of_heads import MixtureOfHeads
from tnmoe.layers.mixture_of_tokens import MixtureOfTokens
from tnmoe.layers.moefied import MoEfied
from tnmoe.layers.multi_head_moe import MultiHeadMoE
from tnmoe.layers.mumoe import MuMoEBlock
from tnmoe.layers.peer import PEER
from tnmoe.layers.residual_moe import ResidualMoE
from tnmoe.layers.smile import SMILE
from tnmoe.layers.soft_moe import SoftMoE
from tnmoe.layers.sparse_moe import SparseMoE
from tnmoe.layers.tensor_poly import TensorPoly

WIDTH, HIDDEN, TOKENS = 768, 3072, 1024
_GATE = Gate("entmax15", "layer")

EQUAL_PARAMETERS: dict[str, Spec] = {
    "MLP": MLP(WIDTH, HIDDEN, WIDTH),
    "CP μMoE (N = 256, R = 556)": MuMoEBlock(WIDTH, HIDDEN, WIDTH, 256, CP(556), _GATE),
    "TR μMoE (N = 256, r = 4, 4, 149)": MuMoEBlock(WIDTH, HIDDEN, WIDTH, 256, TensorRing((4, 4, 149)), _GATE),
    "dense MoE (N = 16)": DenseMoE(WIDTH, 192, WIDTH, 16),
    "sparse MoE (top-2 of 16)": SparseMoE(WIDTH, WIDTH, 16, 2, 192),
    "sparse MoE, capacity 125 %": SparseMoE(WIDTH, WIDTH, 16, 2, 192, capacity=125),
    "sparse MoE, all experts run": SparseMoE(WIDTH, WIDTH, 16, 2, 192, lowering="masked"),
    "sparse MoE of CP experts (N = 256, R = 556)": SparseMoE(WIDTH, WIDTH, 256, 2, HIDDEN, factorization=CP(556)),
    "fine-grained (4 · 16), shared": SparseMoE.fine_grained(WIDTH, 160, WIDTH, 16, 2, 4, shared=512),
    "AdaMoE (16 null experts, top-4)": SparseMoE(WIDTH, WIDTH, 16, 4, 192, null=16, shares="normalised"),
    "SMILE (4 · 4)": SMILE(WIDTH, 192, WIDTH, 4, 4, 1, 2),
    "expert choice (200 %)": ExpertChoice(WIDTH, WIDTH, 16, 200, 192),
    "Soft MoE (16 experts, 8 slots)": SoftMoE(WIDTH, WIDTH, 16, 8, 188),
    "Mixture of Tokens (groups of 16)": MixtureOfTokens(WIDTH, 192, WIDTH, 16, 16),
    "Mixture of Depths (12.5 %)": MixtureOfDepths(WIDTH, HIDDEN, 12.5),
    "multi-head MoE (4 heads, top-2 of 16)": MultiHeadMoE(WIDTH, 576, 16, 2, 4),
    "PEER (2,809 experts, 4 heads of 16)": PEER(WIDTH, WIDTH, 2809, 4, 16, 64),
    "CartesianMoE (top-2 of 8, twice)": CartesianMoE(WIDTH, 170, 8, 2),
    "Deep MoE (16 and 16)": DeepMoE(WIDTH, 190, WIDTH, 16),
    "Residual MoE (one layer, N = 7)": ResidualMoE(WIDTH, WIDTH, 7),
    "MoEfied (4 of 16 groups)": MoEfied(WIDTH, HIDDEN, WIDTH, 16, 4),
    "MoA (4 of 16 heads of 180)": MixtureOfHeads(WIDTH, 16, 4, 180),
    "MoLORA (16 adapters, r = 192)": MoLoRA(WIDTH, WIDTH, 16, 192),
    "MoV (3,072 vectors)": MoV(WIDTH, 3072),
    "MoSLoRA (r = 1,537)": MoSLoRA(WIDTH, WIDTH, 1537),
    "TensorPoly-I (16 modules, R = 335)": TensorPoly(WIDTH, WIDTH, 16, 335),
    "TensorPoly-II (16 modules, R = 178)": TensorPoly(WIDTH, WIDTH, 16, 178, 2, "II"),
}
"""About 4.7 million parameters each."""

EQUAL_MACS: dict[str, Spec] = {
    "MLP": MLP(WIDTH, HIDDEN, WIDTH),
    "CP μMoE (N = 256, R = 556)": EQUAL_PARAMETERS["CP μMoE (N = 256, R = 556)"],
    "TR μMoE (N = 256, r = 4, 4, 149)": EQUAL_PARAMETERS["TR μMoE (N = 256, r = 4, 4, 149)"],
    "dense MoE (N = 16)": DenseMoE(WIDTH, 190, WIDTH, 16),
    "sparse MoE (top-2 of 64)": SparseMoE(WIDTH, WIDTH, 64, 2, 1376),
    "sparse MoE, capacity 125 %": SparseMoE(WIDTH, WIDTH, 64, 2, 1200, capacity=125),
    "sparse MoE, all experts run": SparseMoE(WIDTH, WIDTH, 16, 2, 190, lowering="masked"),
    "sparse MoE of CP experts (N = 256, R = 315)": SparseMoE(WIDTH, WIDTH, 256, 2, HIDDEN, factorization=CP(315)),
    "fine-grained (4 · 16), shared": SparseMoE.fine_grained(WIDTH, 1024, WIDTH, 16, 2, 4, shared=1000),
    "AdaMoE (16 null experts, top-4)": SparseMoE(WIDTH, WIDTH, 16, 4, 1520, null=16, shares="normalised"),
    "SMILE (4 · 16)": SMILE(WIDTH, 1392, WIDTH, 4, 16, 1, 2),
    "expert choice (200 %)": ExpertChoice(WIDTH, WIDTH, 64, 200, 1504),
    "Soft MoE (64 experts, 8 slots)": SoftMoE(WIDTH, WIDTH, 64, 8, 4608),
    "Mixture of Tokens (groups of 16)": MixtureOfTokens(WIDTH, 3048, WIDTH, 16, 16),
    "Mixture of Depths (12.5 %)": MixtureOfDepths(WIDTH, 24500, 12.5),
    "multi-head MoE (4 heads, top-2 of 16)": MultiHeadMoE(WIDTH, 1140, 16, 2, 4),
    "PEER (1,048,576 experts, 8 heads of 84)": PEER(WIDTH, WIDTH, 1 << 20, 8, 84, 128),
    "CartesianMoE (top-2 of 16, twice)": CartesianMoE(WIDTH, 508, 16, 2),
    "Deep MoE (16 and 16)": DeepMoE(WIDTH, 190, WIDTH, 16),
    "Residual MoE (one layer, N = 7)": ResidualMoE(WIDTH, WIDTH, 7),
    "MoEfied (4 of 16 groups)": MoEfied(WIDTH, 4 * HIDDEN, WIDTH, 16, 4),
    "MoA (4 of 16 heads of 296)": MixtureOfHeads(WIDTH, 16, 4, 296),
    "MoLORA (16 adapters, r = 190)": MoLoRA(WIDTH, WIDTH, 16, 190),
    "MoV (3,072 vectors)": MoV(WIDTH, 3072),
    "TensorPoly-I (16 modules, R = 126)": TensorPoly(WIDTH, WIDTH, 16, 126),
    "TensorPoly-II (16 modules, R = 168)": TensorPoly(WIDTH, WIDTH, 16, 168, 2, "II"),
}
"""About 4.7 million MACs a token each, at 1,024 tokens. (MoSLoRA is left out: it never needs as many.)"""
