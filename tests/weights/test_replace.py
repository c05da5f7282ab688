"""Swapping modules of whole models: encoders of torch, a GPT-2 shaped model, shared modules, refusals."""

import copy

import pytest
import torch
from torch import nn

import tnmoe

BLOCK = {"kind": "mumoe_block", "experts": 4, "factorization": tnmoe.CP(6), "gate": {"norm": "layer"}}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width), FeedForward(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Embedding, pre-norm blocks, a head that shares the embedding's weight."""

    def __init__(self, width: int = 12, depth: int = 2, words: int = 30) -> None:
        super().__init__()
        self.wte = nn.Embedding(words, width)
        self.h = nn.ModuleList(Layer(width) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


def test_blocks_of_a_gpt2():
    """It trains a step; the table's parameters are what torch counts."""
    model = GPT2()
    before = sum(p.numel() for p in model.parameters())
    changed = tnmoe.replace(model, {"h.*.mlp": BLOCK}, tokens=64)
    assert changed.model is model
    assert [s.name for s in changed.swapped] == ["h.0.mlp", "h.1.mlp"]
    for s in changed.swapped:
        assert s.before.parameters == 12 * 48 + 48 + 48 * 12 + 12
        assert s.before.matmul_flops == 64 * 2 * (12 * 48 + 48 * 12)
        # gate 12·4, up 6(4 + 13 + 48), down 6(4 + 49 + 12)
        assert s.after.parameters == 48 + 6 * 65 + 6 * 65
        assert sum(p.numel() for p in model.get_submodule(s.name).parameters()) == s.after.parameters
    assert changed.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert "h.0.mlp: its dropout (p = 0.1) is gone." in changed.notes
    assert "h.0.mlp: GELU by tanh became the exact one." in changed.notes
    assert "h.1.mlp" in str(changed)
    tokens = torch.randint(0, 30, (2, 9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.get_submodule("h.0.mlp").parameters())


@pytest.mark.parametrize("training", [False, True])
def test_linear_layers_of_an_encoder_keep_their_weights(training):
    """Full rank (the bias is one more row): the same values, also where torch would read linear1.weight itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    plain = copy.deepcopy(model)
    changed = tnmoe.replace(model, {"layers.*.linear?": tnmoe.TensorTrain((17,))}, keep_weights=True, tokens=10)
    assert len(changed.swapped) == 4
    assert all(s.error < 1e-5 for s in changed.swapped)
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        got, want = (m(x, src_key_padding_mask=padding) for m in (model, plain))
        torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-4, atol=1e-4)
    assert model.layers[0].linear1.training is training


def test_mixtures_for_linear_layers_and_the_first_rule_decides():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    rule = {"kind": "mumoe", "experts": (4, 2), "factorization": {"kind": "cp", "rank": 5}}
    changed = tnmoe.replace(model, {"layers.0.*": tnmoe.LowRank(3), "layers.*": rule}, tokens=10)
    kinds = {s.name: s.after.layer.name for s in changed.swapped}
    assert kinds == {
        "layers.0.linear1": "LowRankLinear",
        "layers.0.linear2": "LowRankLinear",
        "layers.1.linear1": "CPMuMoE",
        "layers.1.linear2": "CPMuMoE",
    }
    assert any("out_proj: nn.MultiheadAttention reads its weight" in note for note in changed.notes)
    assert model.eval()(torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_a_shared_module_stays_shared():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    changed = tnmoe.replace(model, {"*": tnmoe.CP(2)})
    assert model[0] is model[2]
    assert len(changed.swapped) == 1
    assert "0 is shared: 2 got the same module." in changed.notes


FAULTS = {
    "nothing of that name": ({"x.*": tnmoe.CP(2)}, "'x.*' matches nothing that can be replaced: no module has such"),
    "attention": ({"*.out_proj": tnmoe.CP(2)}, "nn.MultiheadAttention reads its weight directly"),
    "a block for a linear layer": ({"layers.0.linear1": BLOCK}, "takes the place of two linear layers"),
    "widths": ({"layers.0.linear1": tnmoe.Linear(3, 4)}, "inputs is 3 in the declaration and 16 in the module"),
    "no rule": ({"layers.0.linear1": 3}, "a rule is a factorization or a declaration"),
    "a split": ({"layers.0.linear1": tnmoe.Monarch((3, 2))}, "layers.0.linear1: blocks[0] = 3 does not divide"),
}


@pytest.mark.parametrize(("rules", "words"), FAULTS.values(), ids=FAULTS)
def test_refusals_leave_the_model_alone(rules, words):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    before = dict(model.named_modules())
    with pytest.raises(tnmoe.DeclarationError) as caught:
        tnmoe.replace(model, rules)
    assert words in str(caught.value)
    assert dict(model.named_modules()) == before


def test_other_nonlinearities_are_no_block():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    with pytest.raises(tnmoe.DeclarationError, match="also has ReLU; a block is linear, GELU, linear"):
        tnmoe.replace(model, {"0": BLOCK})
