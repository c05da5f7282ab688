"""Mixtures at sizes that were published: in a paper, or in the configuration that its authors released with the code.

Only what could be looked up stands here. Where experts differ from those of this package, the label's note says so;
parameters and FLOPs are then those of the layer here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tnmoe.layers.kinds import Spec
from tnmoe.layers.lora import MoLoRA, MoSLoRA
from tnmoe.layers.mixture_of_depths import MixtureOfDepths
from tnmoe.layers.mixture_of_heads import MixtureOfHeads
from tnmoe.layers.moefied import MoEfied
from tnmoe.layers.peer import PEER
from tnmoe.layers.soft_moe import SoftMoE
from tnmoe.layers.sparse_moe import SparseMoE


@dataclass(frozen=True, slots=True)
class Published:
    """A layer of a published model.

    Attributes:
        source: the paper, and where the sizes stand.
        differs: how the published layer differs from this one; empty if it does not.
    """

    spec: Spec
    source: str
    differs: str = ""


PUBLISHED: dict[str, Published] = {
    "Switch-Base (top-1 of 256)": Published(
        SparseMoE(768, 768, 256, 1, 3072, bias=False, shares="before"),
        "arXiv 2101.03961; config.json of google/switch-base-256",
        "a ReLU in place of the GELU, and 64 slots an expert",
    ),
    "DeepSeekMoE 16B (top-6 of 64, two shared)": Published(
        SparseMoE(2048, 2048, 64, 6, 1408, bias=False, shares="before", shared=2 * 1408),
        "arXiv 2401.06066; config.json of deepseek-ai/deepseek-moe-16b-base",
        "gated experts of three matrices in place of two",
    ),
    "Soft MoE B/16 (128 experts, one slot)": Published(
        SoftMoE(768, 768, 128, 1, 3072),
        "arXiv 2308.00951: 128 experts; widths are those of ViT-B",
        "logits of normalised tokens and slots",
    ),
    "PEER (1,048,576 experts, 8 heads of 16)": Published(
        PEER(512, 512, 1 << 20, 8, 16, 128),
        "arXiv 2407.04153: experts, heads and k; widths are those of lucidrains/PEER-pytorch, an independent version",
        "batch norm of the queries",
    ),
    "Mixture of Depths (12.5 %)": Published(
        MixtureOfDepths(768, 3072, 12.5),
        "arXiv 2404.02258: the capacity; widths are those of a GPT-2 block",
        "attention runs inside the block too",
    ),
    "MoA, Transformer base (8 of 8 heads of 128)": Published(
        MixtureOfHeads(512, 8, 8, 128),
        "arXiv 2210.05144; run.sh of yikangshen/MoA; the width is that of Transformer base",
    ),
    "MoEfication of T5-Base (26 of 128 groups)": Published(
        MoEfied(768, 3072, 768, 128, 26),
        "arXiv 2110.01786: 10 to 30 % of an FFN run; 128 groups as in the README of thunlp/MoEfication",
        "a ReLU in place of the GELU, and no biases",
    ),
    "MoLORA, T5-Large (10 adapters, r = 4)": Published(
        MoLoRA(1024, 2816, 10, 4, True),
        "arXiv 2309.05444; configs/molora.gin of for-ai/parameter-efficient-moe, first matrix of the MLP",
    ),
    "MoSLoRA, LLaMA-3 8B (r = 16)": Published(
        MoSLoRA(4096, 14336, 16, True),
        "arXiv 2406.11909; train_moslora.sh of wutaiqiang/MoSLoRA; the widths are those of up_proj",
        "a factor alpha / r = 2",
    ),
}
"""By label."""
