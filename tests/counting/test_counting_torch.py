"""Any torch model: torch's own counter where it is right, counts by hand where it is not, and what is named."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.counting.torch_formulas import registry

imported_before = F.scaled_dot_product_attention


def by_torch(model: nn.Module, inputs: dict[str, Any], mapping: Any = None) -> tuple[int, int]:
    """Forward and backward FLOPs of real tensors, as torch counts them."""
    model = copy.deepcopy(model)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = model(**inputs)
        forward = counter.get_total_flops()
        found = torch.utils._pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
        ends = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    return forward, counter.get_total_flops() - forward


def counted(model: nn.Module, inputs: Any, **kwargs: Any) -> tuple[int, int]:
    """Forward and backward FLOPs as tnmoe counts them; nothing is left uncounted."""
    found = tnmoe.cost_model(model, inputs, backward=True, strict=True, **kwargs)
    assert tnmoe.cost_model(model, inputs).total.matmul_flops == found.total.matmul_flops
    assert found.total.backward is not None
    return found.total.matmul_flops, found.total.backward.matmul_flops


# ---- models that torch counts rightly ------------------------------------------------------------------------------


IDS = torch.arange(22).reshape(2, 11)
IMAGE = torch.zeros(2, 3, 32, 32)


def eager(cls: Any, config: Any) -> nn.Module:
    """With attention as products and a softmax, which torch's counter sees on every device."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return cls(config)


def vit() -> nn.Module:
    c = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    return eager(transformers.ViTModel, c)


def resnet() -> nn.Module:
    c = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
    return eager(transformers.ResNetModel, c)


def t5() -> nn.Module:
    c = transformers.T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=60)
    return eager(transformers.T5ForConditionalGeneration, c)


def whisper() -> nn.Module:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    c = transformers.WhisperConfig(
        d_model=32, vocab_size=60, max_source_positions=50, num_mel_bins=8, **sizes, **tokens
    )
    return eager(transformers.WhisperModel, c)


def swin() -> nn.Module:
    c = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return eager(transformers.SwinModel, c)


def mixer() -> nn.Module:
    """An MLP-Mixer block between a stem and a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 5)
            self.tokens = nn.Sequential(nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16))
            self.channels = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.stem(pixel_values).flatten(2)
            x = (x + self.tokens(x)).transpose(1, 2)
            return self.head((x + self.channels(x)).mean(1))

    return Block()


WHOLE = {
    "vit": (vit, {"pixel_values": IMAGE}),
    "resnet": (resnet, {"pixel_values": IMAGE}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}),
    "whisper": (whisper, {"input_features": torch.zeros(2, 8, 100), "decoder_input_ids": IDS}),
    "swin": (swin, {"pixel_values": IMAGE}),
    "mixer": (mixer, {"pixel_values": IMAGE}),
}


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_as_torch_counts_them(name: str, train: bool) -> None:
    make, inputs = WHOLE[name]
    model = make().train(train)
    assert counted(model, inputs) == by_torch(model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet", "mixer"])
def test_every_device_and_type_give_one_figure(name: str) -> None:
    make, inputs = WHOLE[name]
    found = tnmoe.cost_model(make(), inputs, backward=True).total
    for device in ("cpu", "meta"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            given = {key: t.to(dtype) for key, t in inputs.items()}
            other = tnmoe.cost_model(make().to(device, dtype), given, backward=True).total
            assert other.backward is not None
            assert found.backward is not None
            for a, b in ((other, found), (other.backward, found.backward)):
                assert (a.matmul_flops, a.elementwise_flops, a.special_flops) == (
                    b.matmul_flops,
                    b.elementwise_flops,
                    b.special_flops,
                )
            width = torch.finfo(dtype).bits // 32 or 0.5
            assert other.weight_bytes <= found.weight_bytes * max(width, 1)


@pytest.mark.parametrize("layers", [1, 2])
def test_encoders_are_the_same_in_training_and_in_evaluation(layers: int) -> None:
    """In evaluation torch runs a whole layer as one operation, and counts a part of it."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, layers), torch.randn(2, 5, 32)
    attention = 2 * (4 * 10 * 32 * 32) + 2 * 2 * (2 * 4) * 5 * 5 * 8
    by_hand = layers * (attention + 2 * 2 * 10 * 32 * 48)
    train = tnmoe.cost_model(model.train(), x).total
    evaluation = tnmoe.cost_model(model.eval(), x).total
    assert train == evaluation
    assert train.matmul_flops == by_hand
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() < by_hand  # if this fails, torch has learned it: say so in the guide
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=tnmoe.flop_formulas()) as counter:
        model(x)
    assert counter.get_total_flops() == by_hand


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_encoder_and_decoder(train: bool) -> None:
    model = nn.Transformer(32, 4, 1, 2, 48, batch_first=True).train(train)
    source, target = torch.randn(2, 5, 32), torch.randn(2, 7, 32)

    def heads(queries: int, keys: int) -> int:
        maps = 2 * 2 * (2 * queries + 2 * keys) * 32 * 32
        return maps + 2 * 2 * (2 * 4) * queries * keys * 8

    def mlp(rows: int) -> int:
        return 2 * 2 * 2 * rows * 32 * 48

    by_hand = heads(5, 5) + mlp(5) + 2 * (heads(7, 7) + heads(7, 5) + mlp(7))
    assert counted(model, (source, target))[0] == by_hand


# ---- what torch counts wrongly, by hand ------------------------------------------------------------------------------


def test_grouped_convolutions_backward() -> None:
    """Each gradient takes as much as the forward pass; torch's formula leaves the groups out of one of them."""
    model = nn.Conv2d(6, 9, 3, groups=3, bias=False)
    once = 2 * 2 * 4 * 4 * 9 * (6 // 3) * 9
    x = torch.randn(2, 6, 6, 6)
    assert counted(model, x) == (once, once)
    assert counted(model, x.requires_grad_()) == (once, 2 * once)


@pytest.mark.parametrize(
    ("model", "shape", "once"),
    [
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 2 * 5 * 5 * 4 * 6 * 9),
        (nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9), 2 * 2 * 5 * 4 * 6 * 3),
        (nn.Conv3d(2, 3, 2), (4, 2, 3, 4, 5), 2 * 4 * (2 * 3 * 4) * 2 * 3 * 8),
        (nn.Conv2d(2, 3, 2), (2, 4, 5), 2 * (3 * 4) * 2 * 3 * 4),
    ],
    ids=["transposed", "dilated", "three dimensions", "no batch"],
)
def test_convolutions(model: nn.Module, shape: tuple[int, ...], once: int) -> None:
    assert counted(model, torch.randn(shape)) == (once, once)


def test_bilinear_maps() -> None:
    rows, i, j, o = 3, 5, 6, 7
    model = nn.Bilinear(i, j, o)
    forward = 2 * (rows * o * i * j + rows * o * j)
    assert counted(model, (torch.randn(rows, i), torch.randn(rows, j)))[0] == forward


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(kind: str, gates: int) -> None:
    model = getattr(nn, kind)(6, 7, num_layers=2, bidirectional=True, batch_first=True)
    first, second = 2 * gates * 7 * (6 + 7), 2 * gates * 7 * (14 + 7)
    for device in ("cpu", "meta"):
        assert counted(model.to(device), torch.randn(2, 5, 6))[0] == 2 * 10 * (first + second)


class Attends(nn.Module):
    """Attention of what it is given, after a trained factor each."""

    def __init__(self, call: Any, **keywords: Any) -> None:
        super().__init__()
        self.scale, self.call, self.keywords = nn.Parameter(torch.ones(())), call, keywords

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(q * self.scale, k * self.scale, v * self.scale, **self.keywords)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("call", "heads", "keywords"),
    [
        (F.scaled_dot_product_attention, 4, {}),
        (F.scaled_dot_product_attention, 4, {"is_causal": True}),
        (F.scaled_dot_product_attention, 4, {"dropout_p": 0.5}),
        (F.scaled_dot_product_attention, 4, {"attn_mask": torch.ones(5, 7, dtype=torch.bool)}),
        (F.scaled_dot_product_attention, 2, {"enable_gqa": True}),
        (imported_before, 4, {}),
        (flex_attention, 4, {"score_mod": lambda score, *_: score + 1}),
        (flex_attention, 2, {"enable_gqa": True}),
    ],
    ids=["plain", "causal", "dropout", "masked", "fewer keys", "imported before", "flexible", "flexible, fewer keys"],
)
def test_attention_in_every_form(call: Any, heads: int, keywords: dict[str, Any], device: str, dtype: Any) -> None:
    call = F.scaled_dot_product_attention if call is imported_before and keywords else call
    q, k, v = (torch.randn(2, h, n, w, dtype=dtype) for h, n, w in ((4, 5, 8), (heads, 7, 8), (heads, 7, 6)))
    if call is flex_attention:
        v = torch.randn(2, heads, 7, 8, dtype=dtype)
    width = 8 + v.shape[-1]
    once = 2 * 2 * 4 * 5 * 7 * width
    model = Attends(call, **{n: t.to(device) if isinstance(t, Tensor) else t for n, t in keywords.items()}).to(device)
    assert counted(model, (q, k, v)) == (once, 2 * once)


class Grouped(nn.Module):
    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 16, dtype=dtype))
        self.register_buffer("ends", torch.tensor([2, 4, 6, 10], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight, offs=self.ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grouped_products(device: str, dtype: Any) -> None:
    once = 2 * 10 * 8 * 16
    x = torch.randn(10, 8, dtype=dtype)
    found = tnmoe.cost_model(Grouped(dtype).to(device), x, backward=True, strict=True).total
    assert found.backward is not None
    assert (found.matmul_flops, found.backward.matmul_flops) == (once, once)
    assert found.read_bytes == x.element_size() * (10 * 8 + 4 * 8 * 16) + 4 * 4
    one = tnmoe.cost_model(Grouped(dtype).to(device), x[:1]).total
    assert one.read_bytes == x.element_size() * (8 + 8 * 16) + 4 * 4  # one row meets one expert


def test_integer_and_scaled_products() -> None:
    class Int(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch._int_mm(a, b)

    class Scaled(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            one = torch.ones((), device=a.device)
            return torch._scaled_mm(a, b.mT, one, one, out_dtype=torch.bfloat16)

    a, b = torch.zeros(32, 16, dtype=torch.int8), torch.zeros(16, 48, dtype=torch.int8)
    assert tnmoe.cost_model(Int(), (a, b), strict=True).total.matmul_flops == 2 * 32 * 16 * 48
    a, b = (torch.zeros(n, 16).to(torch.float8_e4m3fn) for n in (32, 48))
    assert tnmoe.cost_model(Scaled(), (a, b), strict=True).total.matmul_flops == 2 * 32 * 16 * 48


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers() -> None:
    from torch.ao import quantization

    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    dynamic = quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(3, 8)
    found, expected = (tnmoe.cost_model(m, x, strict=True).total for m in (dynamic, plain))
    assert found.matmul_flops == expected.matmul_flops == 2 * 3 * (8 * 16 + 16 * 4)
    assert found.parameters == expected.parameters
    assert found.weight_bytes == (8 * 16 + 16 * 4) + 4 * (16 + 4)
    assert found.elementwise_flops == expected.elementwise_flops
    unbiased = nn.Sequential(nn.Linear(8, 16, bias=False))
    dynamic = quantization.quantize_dynamic(copy.deepcopy(unbiased), {nn.Linear}, dtype=torch.qint8)
    found, expected = (tnmoe.cost_model(m, x, strict=True).total for m in (dynamic, unbiased))
    assert (found.flops, found.elementwise_flops) == (expected.flops, 0)

    image = torch.randn(2, 3, 8, 8)
    static = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 5),
        quantization.DeQuantStub(),
    ).eval()
    static.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(static)
    prepared(image)
    found = tnmoe.cost_model(quantization.convert(prepared), image, strict=True).total
    assert found.matmul_flops == 2 * (2 * 36 * 4 * 27 + 2 * 144 * 5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["module", "part", "function"])
def test_compiled_modules_count_as_they_are(what: str) -> None:
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 8)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.function = plain, torch.compile(lambda x: plain(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    makes = {
        "module": lambda: torch.compile(plain),
        "part": lambda: nn.Sequential(torch.compile(plain[0]), plain[1], plain[2]),
        "function": Calls,
    }
    assert counted(makes[what](), x) == counted(plain, x)


def test_recomputed_layers_count_again_where_they_are_recomputed() -> None:
    class Recomputes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(checkpoint(lambda y: self.b(self.a(y).relu()).relu(), x, use_reentrant=False))

    once = 2 * 3 * 64
    x = torch.randn(3, 8, requires_grad=True)
    found = tnmoe.cost_model(Recomputes(), x, backward=True, strict=True)
    backward = {path: found[path].backward for path in "abc"}
    assert {path: work.matmul_flops for path, work in backward.items() if work} == {
        "a": 3 * once,
        "b": 3 * once,
        "c": 2 * once,
    }
    assert found.total.backward is not None
    assert (found.total.matmul_flops, found.total.backward.matmul_flops) == (3 * once, 8 * once)


def test_gradients_that_nobody_asks_for_are_not_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 2))
    first, second, third = (2 * 3 * n for n in (8 * 16, 16 * 4, 4 * 2))
    x = torch.randn(3, 8)
    assert counted(model, x)[1] == first + 2 * second + 2 * third
    assert counted(model, x.clone().requires_grad_())[1] == 2 * (first + second + third)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    assert counted(model, x)[1] == third
    model[3].requires_grad_(False)
    with pytest.raises(tnmoe.CostError, match="nothing that the model returns depends on a parameter"):
        tnmoe.cost_model(model, x, backward=True)


@pytest.mark.slow
def test_backward_work_is_charged_to_the_module_that_caused_it() -> None:
    model = vit()
    found = tnmoe.cost_model(model, {"pixel_values": IMAGE}, backward=True, strict=True)
    for m in found.modules:
        if m.kind == "Linear":
            assert m.backward is not None
            assert m.backward.matmul_flops in (2 * m.matmul_flops, 0)  # the pooler's, whose output nobody uses: still 2
            assert m.matmul_flops > 0
    (stem,) = (m for m in found.modules if m.kind == "Conv2d")
    assert stem.backward is not None
    assert stem.backward.matmul_flops == stem.matmul_flops  # the image needs no gradient


# ---- columns other than products ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "elementwise", "special"),
    [
        (nn.ReLU(), 30, 0),
        (nn.GELU(), 0, 5 * 30),
        (nn.GELU("tanh"), 0, 9 * 30),
        (nn.SiLU(), 0, 5 * 30),
        (nn.Sigmoid(), 0, 4 * 30),
        (nn.Tanh(), 0, 30),
        (nn.Softmax(-1), 0, 5 * 30),
        (nn.LayerNorm(5), 0, 7 * 30),
        (nn.LayerNorm(5, bias=False), 0, 6 * 30),
        (nn.BatchNorm1d(5), 1, 7 * 30),  # and it counts its batches
        (nn.BatchNorm1d(5).eval(), 0, 4 * 30),
        (nn.RMSNorm(5), 4 * 30 + 6, 6),  # square, mean, product, product; plus ε, and rsqrt of each row
        (nn.Linear(5, 4), 24, 0),
        (nn.Dropout(0.5), 2 * 30, 0),
        (nn.Identity(), 0, 0),
        (nn.Flatten(), 0, 0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_element_wise_norm_and_softmax_work(model: nn.Module, elementwise: int, special: int) -> None:
    found = tnmoe.cost_model(model, torch.randn(6, 5), strict=True).total
    assert (found.elementwise_flops, found.special_flops) == (elementwise, special)


@pytest.mark.parametrize(
    "layer",
    [
        tnmoe.Linear(6, 7),
        tnmoe.MLP(6, 8, 5),
        tnmoe.MuMoE(6, 7, 4, tnmoe.CP(3), tnmoe.Gate("softmax", "layer")),
        tnmoe.MuMoEBlock(6, 7, 8, 4, tnmoe.TensorRing((2, 2, 3)), tnmoe.Gate("sigmoid", "batch"), True, True),
        tnmoe.MuMoE(6, 7, (4, 3), tnmoe.Tucker((3, 2, 4, 5)), tnmoe.Gate("softmax", "none")),
    ],
    ids=["Linear", "MLP", "CP", "TR", "Tucker"],
)
def test_emitted_files_cost_what_their_program_says(layer: Any) -> None:
    """Every class of FLOPs operation by operation, and by formula: two counts that share no code."""
    plan = tnmoe.plan(layer, tokens=10)
    namespace: dict[str, Any] = {"__name__": "a_file"}
    exec(tnmoe.emit(plan, name="Layer"), namespace)
    module, report = namespace["Layer"](), tnmoe.cost(plan)
    x = torch.randn(10, 6, requires_grad=True)
    found = tnmoe.cost_model(module, x, backward=True, strict=True).total
    built = tnmoe.cost_model(tnmoe.build(plan), x, backward=True, strict=True).total
    assert built.by_formula
    assert not found.by_formula
    for name in ("matmul_flops", "elementwise_flops", "special_flops", "read_bytes"):
        assert getattr(found, name) == getattr(report, name) == getattr(built, name), name
    assert found.backward is not None
    assert built.backward is not None
    assert found.backward.matmul_flops == built.backward.matmul_flops == report.backward_matmul_flops
    assert found.backward.special_flops == built.backward.special_flops
    without = x.detach()  # no gradient of the input
    assert (
        tnmoe.cost_model(module, without, backward=True).total.backward.matmul_flops  # type: ignore[union-attr]
        == tnmoe.cost_model(tnmoe.build(plan), without, backward=True).total.backward.matmul_flops  # type: ignore[union-attr]
    )


def test_chosen_rows_are_read_and_not_the_table() -> None:
    found = tnmoe.cost_model(nn.Embedding(1000, 8), torch.zeros(3, dtype=torch.long)).total
    assert (found.read_bytes, found.written_bytes) == (4 * 3 * 8 + 8 * 3, 4 * 3 * 8)


def test_what_is_expanded_lies_in_memory_once() -> None:
    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(7, 5, 3).contiguous()

    found = tnmoe.cost_model(Copies(), torch.randn(1, 5, 3)).total
    assert (found.read_bytes, found.written_bytes) == (4 * 15, 4 * 105)


# ---- what cannot be counted ----------------------------------------------------------------------------------------


@torch.library.custom_op("tnmoe_tests::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    return x @ x


squared.register_fake(torch.empty_like)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        for _ in range(3):
            x = torch.ops.tnmoe_tests.squared(x)
        return torch.linalg.eigh(x).eigenvalues


def test_what_has_no_formula_is_named_and_counted() -> None:
    found = tnmoe.cost_model(Unknown(), torch.randn(4, 4))
    assert [(u.what, u.calls) for u in found.uncounted] == [("tnmoe_tests.squared", 3), ("aten._linalg_eigh", 1)]
    assert "not counted: tnmoe_tests.squared, 3 calls" in " ".join(str(found).split())
    assert "not counted" in found._repr_html_()
    assert found.total.matmul_flops == 2 * 64
    with pytest.raises(tnmoe.CostError, match=r"not counted in Unknown: tnmoe_tests\.squared, 3 calls"):
        tnmoe.cost_model(Unknown(), torch.randn(4, 4), strict=True)


class Loop(nn.Module):
    """Experts as many write them: the rows of each depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.router(x).topk(2).indices, torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            rows, _ = torch.where(chosen == n)
            y.index_add_(0, rows, expert(x[rows]))
        return y


def test_loops_whose_rows_depend_on_values_are_named() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Loop(), nn.Linear(6, 3))
    x = torch.randn(10, 5)
    found = tnmoe.cost_model(model, x, backward=True)
    ((name, path),) = {(u.what, u.path) for u in found.uncounted}
    assert (name, path) == ("Loop", "1")
    ends = 2 * 10 * (5 * 6 + 6 * 3)
    assert found.total.matmul_flops == ends + 2 * 10 * 6 * 4  # the router ran before the loop
    assert found["0"].backward is not None
    assert found["0"].backward.matmul_flops == found["0"].matmul_flops  # gradients pass what is left out
    with pytest.raises(tnmoe.CostError, match=r"Loop, 1 call in 1 \(its work depends on values"):
        tnmoe.cost_model(model, x, strict=True)


def test_what_has_no_shapes_or_no_rows() -> None:
    with pytest.raises(tnmoe.CostError, match=r"1 has no shapes before its first call"):
        tnmoe.cost_model(nn.Sequential(nn.Linear(2, 4), nn.LazyLinear(3)), torch.randn(2, 2))
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.LayerNorm(3), nn.Softmax(-1))
    found = tnmoe.cost_model(model, torch.zeros(0, 4), backward=True, strict=True).total
    assert (found.flops, found.backward and found.backward.flops, found.parameters) == (0, 0, 21)


def test_functions_of_functions() -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.vmap(lambda row: row @ row)(x)  # three products of vectors of four
            return rows + torch.func.grad(lambda y: (y @ y.mT).sum())(x).sum()  # one forward, two backward

    found = tnmoe.cost_model(Mapped(), torch.randn(3, 4), strict=True).total
    assert found.matmul_flops == 3 * 2 * 4 + 3 * (2 * 3 * 4 * 3)


def test_branches_that_change_what_is_returned_say_where() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0][:, None]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Inner(), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x))

    with pytest.raises(tnmoe.CostError, match=r"after inner \(Inner\) was left out"):
        tnmoe.cost_model(Outer(), torch.randn(3, 4))


def test_layers_are_never_dropped_at_random() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x if torch.rand([]) < 0.9 else self.layer(x)

    assert {tnmoe.cost_model(Drops(), torch.randn(3, 4)).total.matmul_flops for _ in range(5)} == {2 * 3 * 16}


def test_modules_may_convert_themselves_and_run_in_inference_mode() -> None:
    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            self.layer = self.layer.to(torch.float64)
            y = self.layer(x.double())
            return F.scaled_dot_product_attention(y, y, y).softmax(-1)

    model = Converts()
    found = tnmoe.cost_model(model, torch.randn(2, 3, 4), strict=True)
    assert found.total.matmul_flops == 2 * 6 * 16 + 2 * 2 * 2 * 9 * 4
    assert model.layer.weight.dtype == torch.float32
    assert isinstance(model.layer.weight, nn.Parameter)


@pytest.mark.slow
def test_nothing_is_logged_and_everything_is_put_back(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        num_local_experts=4,
        num_hidden_layers=1,
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    before = dict(vars(config)), F.scaled_dot_product_attention, nn.Module._apply, torch._C._get_mkldnn_enabled()
    before += (torch.backends.mha.get_fastpath_enabled(), sorted(transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS))
    capfd.readouterr(), recwarn.clear(), caplog.clear()
    for inputs in (IDS, {"input_ids": IDS}):
        with caplog.at_level(logging.DEBUG, "transformers"):
            tnmoe.cost_model(model, inputs)
    with pytest.raises(tnmoe.CostError):
        tnmoe.cost_model(model, torch.zeros(2, 3))  # no integers
    after = dict(vars(config)), F.scaled_dot_product_attention, nn.Module._apply, torch._C._get_mkldnn_enabled()
    after += (torch.backends.mha.get_fastpath_enabled(), sorted(transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS))
    assert after == before
    assert not any("forward" in vars(m) for m in model.modules())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


# ---- the registry --------------------------------------------------------------------------------------------------


def test_no_operation_stands_in_two_families() -> None:
    families = (*registry.MULTIPLY, registry.pointwise, registry.norms, registry.reductions, registry.moves)
    count = Counter(name for family in families for name in family.FORMULAS)
    assert [name for name, times in count.items() if times > 1] == []


def test_names_are_those_of_operations() -> None:
    """A misspelt name would never be found. What is written in place has no form of its own for every operation."""
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert [name for name in registry.FORMULAS if name not in known and name.removesuffix("_") not in known] == []


def test_what_multiplies_in_torch_has_a_formula() -> None:
    """Every formula that torch has, we have; and what torch tells apart by kernel has the same one."""
    from torch.utils.flop_counter import flop_registry

    ours = tnmoe.flop_formulas()
    theirs = [packet for packet in flop_registry if isinstance(packet, torch._ops.OpOverloadPacket)]
    assert [str(packet) for packet in theirs if packet not in ours and str(packet).startswith("aten.")] == []


def test_users_own_counter_sees_grouped_products_and_attention() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = Grouped(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.grouped(x)[None, None]
            return F.scaled_dot_product_attention(y, y, y)

    model, x = Both(), torch.randn(10, 8, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward, backward = by_torch(model, {"x": x}, tnmoe.flop_formulas())
    assert forward == 2 * 10 * 8 * 16 + 2 * 2 * 100 * 16
    assert (forward, backward) == counted(model, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "tokens", "parameters", "active", "attention"),
    [
        # Published: 30.5B, and 3,041,867,776 weights that a token meets besides its embedding; 48 layers of 32 heads,
        # 128 wide for scores and for values. pytorch/torchtitan#4300: 37,578,559,488 a token in training.
        (
            lambda: transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(
                    hidden_size=2048,
                    moe_intermediate_size=768,
                    num_hidden_layers=48,
                    num_attention_heads=32,
                    num_key_value_heads=4,
                    head_dim=128,
                    num_experts=128,
                    num_experts_per_tok=8,
                    vocab_size=151936,
                )
            ),
            8192,
            30_532_122_624,
            3_041_867_776,
            48 * 32 * (128 + 128),
        ),
        # Published: 671B, 36.6B with the output head; 61 layers of 128 heads, 192 and 128 wide.
        (
            lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config()),
            4096,
            671_026_404_352,
            36_625_603_584,
            61 * 128 * (192 + 128),
        ),
    ],
    ids=["Qwen3-30B-A3B", "DeepSeek-V3"],
)
def test_published_models(make: Any, tokens: int, parameters: int, active: int, attention: int) -> None:
    """2 FLOPs for each weight that a token meets, norms aside, and attention in full."""
    with torch.device("meta"):
        model = make().to(torch.bfloat16)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    given = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}
    found = tnmoe.cost_model(model, given, strict=True).total
    assert found.parameters == parameters
    assert found.matmul_flops == tokens * (2 * (active - norms) + 2 * attention * tokens)
    if "Qwen3" in found.kind:
        assert 3 * found.matmul_flops == tokens * (37_578_559_488 - 6 * norms)


def test_a_module_is_left_out_with_what_reads_an_odd_result() -> None:
    """The router's shapes depend on values, and it gives two results: so the block around it is named."""

    class Router(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = (x[:, 0] > 0).nonzero()[:, 0]
            return x[rows], rows

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.router = nn.Linear(4, 4), Router()

        def forward(self, x: Tensor) -> Tensor:
            x = self.map(x)
            rows, places = self.router(x)
            return x.index_add(0, places, rows)

    found = tnmoe.cost_model(nn.Sequential(Block(), nn.Linear(4, 2)), torch.randn(3, 4), backward=True)
    assert [(u.what, u.path, u.calls) for u in found.uncounted] == [("Block", "0", 1)]
    assert "nonzero" in found.uncounted[0].why
    assert found.total.matmul_flops == 2 * 3 * 16 + 2 * 3 * 8  # the map ran before the router


def test_triangular_systems() -> None:
    class Solves(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(a, b, upper=False)

    found = tnmoe.cost_model(Solves(), (torch.eye(5).expand(2, 5, 5), torch.ones(2, 5, 3)), strict=True).total
    assert (found.matmul_flops, found.elementwise_flops) == (2 * 2 * 3 * (0 + 1 + 2 + 3 + 4), 2 * 5 * 3)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.LSTM(6, 7, 2, bidirectional=True, batch_first=True), (torch.zeros(2, 5, 6),)),
        (nn.GRU(6, 7, 2), (torch.zeros(5, 2, 6),)),
        (nn.MultiheadAttention(32, 4, batch_first=True).eval(), (torch.zeros(2, 5, 32),) * 3),
        (nn.Conv1d(6, 6, 3, groups=6), (torch.zeros(2, 6, 9),)),
        (nn.Bilinear(5, 6, 7), (torch.zeros(3, 5), torch.zeros(3, 6))),
    ],
    ids=lambda v: type(v).__name__,
)
def test_users_own_counter_sees_kernels_that_run_a_whole_layer(model: nn.Module, inputs: Any) -> None:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=tnmoe.flop_formulas()) as counter:
        model(*inputs)
    assert counter.get_total_flops() == tnmoe.cost_model(model, inputs, strict=True).total.matmul_flops > 0
