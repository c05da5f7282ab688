"""Whole models: published totals, torch's own counter on the same module, and what must not change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tnmoe

GATE = tnmoe.Gate("entmax15", "layer")


def built(spec: Any) -> nn.Module:
    return tnmoe.build(tnmoe.plan(spec, tokens=1024), device="meta")


# ---- GPT-2 124M, as in nanoGPT: vocabulary padded to 50,304, tied embeddings -----------------------------------


class Block(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(768)
        self.qkv, self.out = nn.Linear(768, 2304), nn.Linear(768, 768)
        self.mlp = built(mlp)

    def forward(self, x: Tensor) -> Tensor:
        heads = (t.unflatten(-1, (12, 64)).transpose(1, 2) for t in self.qkv(self.norm(x)).split(768, -1))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(50304, 768), nn.Embedding(1024, 768)
        self.blocks = nn.ModuleList(Block(mlp) for _ in range(12))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 50304, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mumoe(factorization: Any) -> tnmoe.MuMoEBlock:
    return tnmoe.MuMoEBlock(768, 3072, 768, 256, factorization, GATE, True, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factorization", "parameters", "flops", "rank"),
    [
        # Measured on the reference implementation, all 1,024 logits; it counts no attention product on a CPU, and its
        # bias is one more row of a product of width R (CP) or r·r' (TR) in each of two layers.
        (tnmoe.CP(556), 124_836_384, 253_900_161_024, 556),
        (tnmoe.TensorRing((4, 4, 149)), 125_205_984, 254_774_280_192, 4 * 149),
    ],
    ids=["CP", "TR"],
)
def test_gpt2_with_mixtures(factorization: Any, parameters: int, flops: int, rank: int) -> None:
    with torch.device("meta"):
        model = GPT(mumoe(factorization))
    found = tnmoe.cost_model(model, torch.zeros(1, 1024, dtype=torch.long))
    attention = 12 * 2 * (2 * 1024 * 1024 * 768)
    assert found.total.parameters == parameters
    assert found.total.matmul_flops == flops - 12 * 2 * (2 * 1024 * rank) + attention
    assert found["blocks.3.mlp"].by_formula
    assert found["blocks.3.mlp"].other_flops > 0
    report = tnmoe.cost(mumoe(factorization), tokens=1024)
    assert found["blocks.3.mlp"].matmul_flops == report.matmul_flops
    assert found["head"].matmul_flops == 2 * 1024 * 768 * 50304
    assert sum(found[p].matmul_flops for p in ("blocks", "head")) == found.total.matmul_flops


# ---- MLP-Mixer S-16 --------------------------------------------------------------------------------------------


class MixerLayer(nn.Module):
    def __init__(self, token: Any, channel: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(512), nn.LayerNorm(512)
        self.token, self.channel = built(token), built(channel)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, token: Any, channel: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 512, 16, 16)
        self.layers = nn.Sequential(*(MixerLayer(token, channel) for _ in range(8)))
        self.norm, self.head = nn.LayerNorm(512), nn.Linear(512, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.stem(image).flatten(2).transpose(1, 2))).mean(1))


def mixer_blocks(kind: str) -> tuple[Any, Any]:
    gate = tnmoe.Gate("entmax15", "batch")
    if kind == "MLP":
        return tnmoe.MLP(196, 256, 196), tnmoe.MLP(512, 2048, 512)
    ranks = {"CP": (tnmoe.CP(147), tnmoe.CP(384)), "TR": (tnmoe.TensorRing((4, 4, 37)), tnmoe.TensorRing((4, 4, 97)))}
    token, channel = ranks[kind]
    return tnmoe.MuMoEBlock(196, 256, 196, 64, token, gate), tnmoe.MuMoEBlock(512, 2048, 512, 64, channel, gate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parameters", "flops_of_blocks", "bias_rows"),
    [
        # Parameters of the whole, FLOPs of both blocks and one image (512 and 196 rows): published measurements
        ("MLP", 18_528_264, 102_760_448 + 822_083_584, 0),
        ("CP", 18_630_616, 168_491_008 + 803_117_056, 2 * (512 * 147 + 196 * 384)),
        ("TR", 18_290_792, 153_460_736 + 793_900_352, 2 * (512 * 4 * 37 + 196 * 4 * 97)),
    ],
)
def test_mixer_s16(kind: str, parameters: int, flops_of_blocks: int, bias_rows: int) -> None:
    with torch.device("meta"):
        model = Mixer(*mixer_blocks(kind))
    found = tnmoe.cost_model(model, torch.zeros(1, 3, 224, 224))
    assert found.total.parameters == parameters
    stem, head = 2 * 196 * 512 * 768, 2 * 512 * 1000
    assert found.total.matmul_flops == 8 * (flops_of_blocks - 2 * bias_rows) + stem + head
    assert found["layers.0"].matmul_flops == flops_of_blocks - 2 * bias_rows


# ---- any model -------------------------------------------------------------------------------------------------


def models() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    return {
        "convolutions": (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
            (2, 3, 9, 9),
        ),
        "transformer": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
        "recurrent": (nn.LSTM(6, 7, batch_first=True), (2, 5, 6)),
        "shared": (nn.Sequential(shared, nn.Tanh(), shared), (4, 6)),
    }


@pytest.mark.parametrize("name", models())
def test_totals_are_those_of_torchs_counter(name: str) -> None:
    model, shape = models()[name]
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(shape)
    found = tnmoe.cost_model(model, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # batch statistics too
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model)(x)
    # torch counts no LSTM: ten steps, four gates, weights of 7 × 6 and 7 × 7
    by_hand = {"recurrent": 2 * 10 * 4 * (7 * 6 + 7 * 7)}
    assert found.total.matmul_flops == by_hand.get(name, counter.get_total_flops()) > 0
    assert found.total.parameters == sum(p.numel() for p in model.parameters())


def test_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.ReLU())
    found = tnmoe.cost_model(model.to(torch.bfloat16), torch.zeros(5, 7, dtype=torch.bfloat16))
    assert found["0"].read_bytes == 2 * (5 * 7 + 7 * 3 + 3)
    assert found["0"].written_bytes == found["1"].read_bytes == found["1"].written_bytes == 2 * 15
    assert found.total.weight_bytes == 2 * 24
    assert found.total.read_bytes == found["0"].read_bytes + 30


def test_layers_built_here_are_counted_by_formula_each_time_they_run() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 6, 4, tnmoe.CP(3), GATE))
    layer = tnmoe.build(plan)
    found = tnmoe.cost_model(nn.Sequential(layer, nn.Linear(6, 6), layer), torch.randn(2, 5, 6))
    report = tnmoe.cost(plan, tokens=10)
    assert found["0"].matmul_flops == 2 * report.matmul_flops
    assert found["0"].read_bytes == 2 * report.read_bytes
    assert found["0"].kind == "CPMuMoE"
    by_torch = copy.deepcopy(layer)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        by_torch(torch.randn(2, 5, 6))
    assert report.matmul_flops == counter.get_total_flops()


def test_routed_layers_need_no_values() -> None:
    """Gathered experts have data-dependent numbers of rows, which fake tensors cannot have and formulas do not need."""
    plan = tnmoe.plan(tnmoe.SparseMoE(6, 6, 4, 2, 8), tokens=10)
    layer = tnmoe.build(plan)
    model = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 2))
    found = tnmoe.cost_model(model, torch.randn(2, 5, 6))
    assert found["1"].matmul_flops == tnmoe.cost(plan).matmul_flops
    assert found.total.matmul_flops == found["1"].matmul_flops + 2 * 10 * (36 + 12)
    assert model(torch.randn(3, 6)).shape == (3, 2)  # it computes again
    assert "forward" not in vars(layer)


def test_emitted_files_take_their_plan_by_path() -> None:
    plan = tnmoe.plan(tnmoe.MuMoE(6, 6, 4, tnmoe.CP(3), GATE))
    namespace: dict[str, Any] = {"__name__": "from_a_file"}
    exec(tnmoe.emit(plan, name="Layer"), namespace)
    model = nn.Sequential(namespace["Layer"](), nn.Linear(6, 2))
    plain = tnmoe.cost_model(model, torch.randn(3, 6))
    assert not plain["0"].by_formula
    found = tnmoe.cost_model(model, torch.randn(3, 6), plans={"0": plan})
    assert found["0"].by_formula
    assert found["0"].matmul_flops == plain["0"].matmul_flops
    assert found["0"].other_flops == tnmoe.cost(plan, tokens=3).flops - found["0"].matmul_flops


@pytest.mark.slow
def test_a_model_of_seventy_billion_parameters_costs_here() -> None:
    """Llama-2 70B: 80 blocks of width 8,192, 8 key-value heads of 64, hidden 28,672; 68,976,648,192 parameters."""

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"q": (8192, 8192), "k": (8192, 1024), "v": (8192, 1024), "o": (8192, 8192)}
            sizes |= {"gate": (8192, 28672), "up": (8192, 28672), "down": (28672, 8192)}
            self.maps = nn.ModuleDict({name: nn.Linear(*s, bias=False) for name, s in sizes.items()})
            self.norms = nn.ModuleList(nn.RMSNorm(8192) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y, m = self.norms[0](x), self.maps
            q, k, v = (m[n](y).unflatten(-1, (-1, 128)).transpose(1, 2) for n in "qkv")
            k, v = (t.repeat_interleave(8, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + m["o"](attended.transpose(1, 2).flatten(2))
            y = self.norms[1](x)
            return x + m["down"](F.silu(m["gate"](y)) * m["up"](y))

    with torch.device("meta"):
        blocks = [Llama() for _ in range(80)]
        model = nn.Sequential(nn.Embedding(32000, 8192), *blocks, nn.RMSNorm(8192), nn.Linear(8192, 32000, bias=False))
    found = tnmoe.cost_model(model, torch.zeros(1, 512, dtype=torch.long))
    assert found.total.parameters == 68_976_648_192
    attention = 80 * 2 * (2 * 512 * 512 * 8192)
    weights = found.total.parameters - 32000 * 8192 - 161 * 8192  # neither the embedding nor the norms multiply
    assert found.total.matmul_flops == 2 * 512 * weights + attention
    assert len(found.table(1).rows) == 1 + 83


def test_what_cannot_be_counted() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(tnmoe.CostError, match="Branches does not run on fake tensors"):
        tnmoe.cost_model(Branches(), torch.randn(3))
    with pytest.raises(tnmoe.CostError, match="Linear does not run on fake tensors of these shapes"):
        tnmoe.cost_model(nn.Linear(3, 4), torch.randn(2, 5))
    with pytest.raises(tnmoe.DeclarationError, match=r"takes a torch.nn.Module, got str"):
        tnmoe.cost_model("gpt", torch.randn(3))  # type: ignore[arg-type]
    with pytest.raises(tnmoe.DeclarationError, match="plans names 'x'"):
        tnmoe.cost_model(nn.Linear(3, 4), torch.randn(3), plans={"x": tnmoe.plan(tnmoe.Linear(3, 4))})
    with pytest.raises(tnmoe.CostError, match="unknown module '7'"):
        tnmoe.cost_model(nn.Sequential(nn.Linear(3, 4)), torch.randn(3))["7"]


def test_what_is_printed() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 2)))
    found = tnmoe.cost_model(model, {"input": torch.randn(3, 6)})
    text = str(found)
    assert "Cost of Sequential" in text
    assert "    0" in text
    assert len(found.table(1).rows) == 3
    assert "<table>" in found._repr_html_()
