"""Models of transformers: one figure each, whatever runs their experts and wherever, and it is the one made by hand.

`transformers_zoo` counts by hand. Where torch's own counter can count every product (eager attention, experts as one
batched product, float32 on a CPU) it confirms these hand counts, forward and backward, module by module.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.transformers_zoo import BATCH, BY_NAME, DBRX, FAMILIES, IMPLEMENTATIONS, TOKENS, VOCABULARY, Count, Family
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tnmoe

NAMES = [family.name for family in FAMILIES]
DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "meta")


def ids(batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@functools.cache
def shared_model(name: str, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model that tests only look at, with grouped experts."""
    return BY_NAME[name].model(device, dtype, "grouped_mm")


@functools.cache
def counted(name: str, implementation: str, device: str, dtype: torch.dtype, backward: bool) -> Any:
    model = shared_model(name, device, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "_experts_implementation", implementation)
        return tnmoe.cost_model(model, ids(), backward=backward, strict=True)


def check(found: Any, count: Count) -> None:
    """Every module forward, and backward if it was asked for."""
    assert found.uncounted == ()
    assert found.total.matmul_flops == count.forward()
    assert {m.path: m.matmul_flops for m in found.modules} == {m.path: count.forward(m.path) for m in found.modules}
    if found.total.backward is not None:
        assert found.total.backward.matmul_flops == count.backward()
        by_hand = {m.path: count.backward(m.path) for m in found.modules}
        assert {m.path: m.backward.matmul_flops for m in found.modules} == by_hand


# ---- the hand counts themselves ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, DBRX], ids=[*NAMES, DBRX.name])
def test_torchs_counter_confirms_the_hand_count(family: Family) -> None:
    model, count = family.model(attention="eager"), family.count()
    with FlopCounterMode(display=False) as counter:
        logits = model(ids()).logits
        forward = counter.get_total_flops()
        by_module = {path: sum(flops.values()) for path, flops in counter.get_flop_counts().items()}
        logits.sum().backward()
    assert forward == count.forward()
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList):  # which is never called, so that torch sees nothing in it
            name = f"{type(model).__name__}.{path}" if path else "Global"
            assert by_module.get(name, 0) == count.forward(path), path
    backward = counter.get_total_flops() - forward
    if family.name == "jamba":
        # torch counts the gradient of a depthwise filter once for each pair of channels, not for each channel.
        channels = 2 * 64
        backward -= (channels - 1) * 2 * (BATCH * (TOKENS + 3 - 1) * channels * 3)
    assert backward == count.backward()


def frozen(model: Any, trained: Sequence[str], but: str = "never") -> Any:
    """Gradients are wanted of parameters whose name starts with one of `trained` and does not contain `but`."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(tuple(trained)) and but not in name)
    return model


FIRST, SECOND = "model.layers.0", "model.layers.1"
ALL = BY_NAME["mixtral"].count()
# A Mixtral that is trained in part: what is trained, what of it is not, and the products that this leaves backward.
PARTLY_TRAINED: dict[str, tuple[tuple[str, ...], str, Count]] = {
    # The scale of the norm before them wants a gradient, so the first projections still want one of their input.
    "no embedding": (("model.layers", "model.norm", "lm_head"), "never", ALL),
    "no embedding nor norms": (
        ("model.layers", "lm_head"),
        "norm",
        ALL.with_gradients(1, *(f"{FIRST}.self_attn.{p}_proj" for p in "qkv")),
    ),
    "head alone": (("lm_head",), "never", ALL.with_gradients(0, "model").with_gradients(1, "lm_head")),
    "no experts": (
        ("model", "lm_head"),
        "experts",
        ALL.with_gradients(1, f"{FIRST}.mlp.experts", f"{SECOND}.mlp.experts"),
    ),
    "no routers": (
        ("model", "lm_head"),
        "gate.weight",
        ALL.with_gradients(1, f"{FIRST}.mlp.gate", f"{SECOND}.mlp.gate"),
    ),
    # What comes before wants no gradient; what comes after passes one on.
    "one attention": (
        (f"{SECOND}.self_attn",),
        "never",
        ALL.with_gradients(0, FIRST).with_gradients(
            1, f"{SECOND}.mlp", "lm_head", *(f"{SECOND}.self_attn.{p}_proj" for p in "qkv")
        ),
    ),
    # An expert's first product wants a gradient of its weights alone, its second of both sides.
    "experts of the first layer": (
        (f"{FIRST}.mlp.experts",),
        "never",
        ALL.with_gradients(0, f"{FIRST}.self_attn", f"{FIRST}.mlp.gate").with_gradients(
            1,
            f"{FIRST}.mlp.experts.gate_up_proj",
            *(f"{SECOND}.self_attn.{p}_proj" for p in "qkvo"),
            f"{SECOND}.mlp",
            "lm_head",
        ),
    ),
}


@pytest.mark.parametrize("case", PARTLY_TRAINED)
def test_torchs_counter_confirms_what_a_frozen_part_saves(case: str) -> None:
    trained, but, count = PARTLY_TRAINED[case]
    logits = frozen(BY_NAME["mixtral"].model(attention="eager"), trained, but)(ids()).logits
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == count.backward()


# ---- one figure for each model -------------------------------------------------------------------------------------

EVERYWHERE = ("mixtral",)
"""Families whose backward pass is counted in all twelve ways (with `NAMES`, all are), of the others in three each."""

WAYS = [
    (name, implementation, device, dtype, name in EVERYWHERE or way == (index + turn) % 4)
    for index, name in enumerate(NAMES)
    for turn, implementation in enumerate(IMPLEMENTATIONS)
    for way, (device, dtype) in enumerate(itertools.product(DEVICES, DTYPES))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation", "device", "dtype", "backward"), WAYS, ids=lambda v: str(v).removeprefix("torch.")
)
def test_one_figure(name: str, implementation: str, device: str, dtype: torch.dtype, backward: bool) -> None:
    found = counted(name, implementation, device, dtype, backward)
    check(found, BY_NAME[name].count())
    assert found.total.parameters == sum(p.numel() for p in shared_model(name, device, dtype).parameters())
    first = next(way for way in WAYS if way[0] == name and way[-1])
    one, other = found.total, counted(*first).total
    assert one.elementwise_flops == other.elementwise_flops > 0
    assert one.special_flops == other.special_flops > 0
    if not backward:
        return
    assert one.backward.elementwise_flops == other.backward.elementwise_flops > 0
    assert one.backward.special_flops == other.backward.special_flops > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "minimax", "llama4"])
def test_eager_attention_has_the_same_products(name: str) -> None:
    family = BY_NAME[name]
    check(tnmoe.cost_model(family.model("meta", attention="eager"), ids(), backward=True), family.count())


def test_the_known_figure() -> None:
    """Worked out before any code: width 64, hidden 128, 32 tokens. The rotary embedding is no product and not in it."""
    config = {"head_dim": None, "intermediate_size": 128, "num_local_experts": 8, "vocab_size": 100}
    model = BY_NAME["mixtral"].changed(**config).model("meta", torch.bfloat16, "grouped_mm")
    projections = 2 * 32 * 64 * (64 + 32 + 32 + 64)
    attention = 2 * (2 * 4 * 32 * 32 * 16)
    experts = 2 * (2 * 32) * (3 * 64 * 128)
    layer = projections + attention + 2 * 32 * 64 * 8 + experts
    assert 2 * layer + 2 * 32 * 64 * 100 == 8_863_744
    found = tnmoe.cost_model(model, ids(1, 32))
    assert found.total.matmul_flops == 8_863_744
    assert found["model.layers.0.mlp.experts"].matmul_flops == experts
    assert found["model.rotary_emb"].matmul_flops == 0


def trained(found: Any, path: str = "") -> int:
    """FLOPs of a step of training, without the optimiser's."""
    row = found[path] if path else found.total
    return row.matmul_flops + row.backward.matmul_flops


def test_the_published_figure_of_qwen3() -> None:
    """Qwen3-30B-A3B, trained on 8,192 tokens: 37,578,559,488 FLOPs a token, if scales of norms multiplied as matrices.

    That is 6 for each parameter that a token meets, the embedding's aside, and 6 for each pair of tokens and number of
    a head: 128 in the scores and 128 in the values. Two of the 48 layers run here, the second for all others.
    """
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    model = BY_NAME["qwen3_moe"].changed(**sizes, mlp_only_layers=[]).model("meta", torch.bfloat16, "grouped_mm")
    layer = sum(p.numel() for p in model.model.layers[1].parameters())
    assert sum(p.numel() for p in model.parameters()) + 46 * layer == 30_532_122_624
    found = tnmoe.cost_model(model, ids(1, 8192), backward=True)
    assert 6 * 3_041_867_776 + 6 * 48 * 32 * 256 * 8192 == 37_578_559_488
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    assert trained(found) + 46 * trained(found, "model.layers.1") == 8192 * (37_578_559_488 - 6 * norms)


def test_the_published_figure_of_deepseek_v3() -> None:
    """DeepSeek-V3 on 4,096 tokens: 281.2 GFLOPs a token in full, of 36.6 billion parameters. A third of that forward.

    Two of the 61 layers run here: a dense one for three, and one with experts for 58.
    """
    sizes = {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280}
    sizes |= {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512}
    sizes |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    sizes |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    model = BY_NAME["deepseek_v3"].changed(**sizes).model("meta", torch.bfloat16, "grouped_mm")
    dense, sparse = (sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert sum(p.numel() for p in model.parameters()) + 2 * dense + 57 * sparse == 671_026_404_352
    found = tnmoe.cost_model(model, ids(1, 4096))
    assert 6 * 36_625_603_584 + 6 * 61 * 128 * 320 * 4096 == 281_158_232_064
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    layers = 2 * found["model.layers.0"].matmul_flops + 57 * found["model.layers.1"].matmul_flops
    assert 3 * (found.total.matmul_flops + layers) == 4096 * (281_158_232_064 - 6 * norms)


# ---- what cannot be counted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_loop_over_chosen_experts_is_named(device: str) -> None:
    """DBRX loops over the experts that some token chose, which no example of shapes tells, and no formula is known."""
    model = DBRX.model(device)
    found = tnmoe.cost_model(model, ids())
    for layer in ("transformer.blocks.0", "transformer.blocks.1"):
        assert any(f"{layer}.ffn.experts" in str(what) for what in found.uncounted)
        assert found[f"{layer}.ffn.router"].matmul_flops == 2 * (2 * 13) * 64 * 7
    assert found.total.matmul_flops == DBRX.count().without("ffn.experts").forward()
    with pytest.raises(tnmoe.CostError, match=r"ffn\.experts"):
        tnmoe.cost_model(model, ids(), strict=True)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loop_is_named_backward_as_well() -> None:
    """Routers get their gradients through experts alone, so theirs cannot be counted either; the rest can."""
    found = tnmoe.cost_model(DBRX.model("meta"), ids(), backward=True)
    assert any("ffn.experts" in str(what) for what in found.uncounted)
    assert found["lm_head"].backward.matmul_flops == DBRX.count().backward("lm_head")
    attention = "transformer.blocks.0.norm_attn_norm"
    assert found[attention].backward.matmul_flops == DBRX.count().backward(attention)


# ---- the model stays as it was -------------------------------------------------------------------------------------


def state_of(model: Any) -> Any:
    """What an onlooker can see of a model, values aside."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = {
        path: (type(m), type(m).forward, m.training, sorted(vars(m)), *(len(vars(m)[hooks]) for hooks in HOOKS))
        for path, m in model.named_modules()
    }
    tensors = {
        name: (id(t), t._version, t.requires_grad, t.grad, t.device, t.dtype)
        for name, t in model.state_dict(keep_vars=True).items()
    }
    settings = model.config._experts_implementation, model.config._attn_implementation, model.config.to_dict()
    functions = dict(ALL_EXPERTS_FUNCTIONS._global_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    functions += (dict(ALL_EXPERTS_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._local_mapping))
    surroundings = torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype()
    return modules, tensors, settings, functions, surroundings


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CHECKED = [("mixtral", "grouped_mm"), ("gpt_oss", "eager"), ("jamba", "batched_mm")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), CHECKED)
def test_the_model_is_left_as_it_was(name: str, implementation: str) -> None:
    model = frozen(BY_NAME[name].model(implementation=implementation), ("model.layers.1", "lm_head"))
    model.model.layers[0].train()
    with torch.no_grad():
        logits = model(ids()).logits
    values = {k: v.clone() for k, v in model.state_dict().items()}
    before = state_of(model)
    tnmoe.cost_model(model, ids(), backward=True)
    with pytest.raises(tnmoe.CostError, match="ForCausalLM"):
        tnmoe.cost_model(model, torch.zeros(2, 13), backward=True)  # token numbers are integers
    assert state_of(model) == before
    assert model.config._experts_implementation == implementation
    assert model.config._attn_implementation == ("eager" if name == "gpt_oss" else "sdpa")
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    again = model(ids()).logits
    assert torch.equal(again, logits)
    again.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_a_cache_that_is_given_is_left_as_it_was() -> None:
    """One more token after 13: its query meets 14 keys."""
    import transformers

    family = BY_NAME["mixtral"]
    model = family.model()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(), past_key_values=cache, use_cache=True)
    keys = [layer.keys for layer in cache.layers]
    found = tnmoe.cost_model(model, {"input_ids": ids(2, 1), "past_key_values": cache, "use_cache": True})
    one = family.count(2, 1)
    longer = 13 * 2 * (2 * 2 * 4 * 1 * 24)  # two layers, scores and values, 2 sequences of 4 heads
    assert found.total.matmul_flops == one.forward() + 2 * longer
    assert found.uncounted == ()
    assert cache.get_seq_length() == 13
    assert all(layer.keys is kept for layer, kept in zip(cache.layers, keys))


# ---- attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_token(name: str) -> None:
    found = tnmoe.cost_model(shared_model(name), ids(1, 1), backward=name in ("mixtral", "jamba", "minimax"))
    check(found, BY_NAME[name].count(1, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_in_each_implementation(implementation: str) -> None:
    model = BY_NAME["mixtral"].model("cpu", torch.float32, implementation)
    check(tnmoe.cost_model(model, ids(1, 1)), BY_NAME["mixtral"].count(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "tokens"), [(3, 1), (1, 13)])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_one_sequence_or_one_token_of_each(name: str, batch: int, tokens: int) -> None:
    found = tnmoe.cost_model(shared_model(name), ids(batch, tokens), backward=True)
    check(found, BY_NAME[name].count(batch, tokens))


@pytest.mark.parametrize(
    ("chosen", "implementation"), [(1, "eager"), (1, "grouped_mm"), (7, "batched_mm"), (7, "grouped_mm")]
)
def test_every_expert_is_chosen(chosen: int, implementation: str) -> None:
    family = BY_NAME["mixtral"].changed(num_experts_per_tok=chosen, num_local_experts=chosen)
    check(tnmoe.cost_model(family.model(implementation=implementation), ids(), backward=True), family.count())


def test_every_expert_of_every_group_is_chosen() -> None:
    family = BY_NAME["deepseek_v3"].changed(num_experts_per_tok=6, topk_group=3)
    check(tnmoe.cost_model(family.model("meta"), ids()), family.count())


@pytest.mark.parametrize("implementation", ["deepgemm", "sonicmoe"])
def test_implementations_for_other_machines(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose kernels are not here, and which transformers would download."""
    model = BY_NAME["mixtral"].model("meta", torch.bfloat16)
    monkeypatch.setattr(model.config, "_experts_implementation", implementation)
    check(tnmoe.cost_model(model, ids()), BY_NAME["mixtral"].count())


@pytest.mark.parametrize(
    ("implementation", "device", "dtype"), [("eager", "cpu", torch.bfloat16), ("batched_mm", "meta", torch.float32)]
)
def test_widths_of_no_whole_16_bytes(implementation: str, device: str, dtype: torch.dtype) -> None:
    """torch's grouped product refuses such rows; the models that run without it are counted without it."""
    family = BY_NAME["mixtral"].changed(intermediate_size=37)
    check(tnmoe.cost_model(family.model(device, dtype, implementation), ids(), backward=True), family.count())


@pytest.mark.parametrize(
    ("name", "implementation"), [("mixtral", "eager"), ("gpt_oss", "batched_mm"), ("deepseek_v3", "grouped_mm")]
)
def test_half_of_it_on_meta(name: str, implementation: str) -> None:
    model = BY_NAME[name].model(implementation=implementation)
    model.model.layers[1].to("meta")
    check(tnmoe.cost_model(model, ids(), backward=True), BY_NAME[name].count())
    assert model.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    assert model.model.layers[0].self_attn.o_proj.weight.device.type == "cpu"


@pytest.mark.parametrize("device", DEVICES)
def test_an_example_on_meta(device: str) -> None:
    model = shared_model("mixtral", device, torch.float32)
    check(tnmoe.cost_model(model, ids().to("meta")), BY_NAME["mixtral"].count())


def test_a_compiled_model() -> None:
    count = BY_NAME["mixtral"].count()
    model = BY_NAME["mixtral"].model(implementation="grouped_mm")
    found = tnmoe.cost_model(torch.compile(model), ids(), backward=True)
    assert found.total.matmul_flops == count.forward()
    assert found.total.backward.matmul_flops == count.backward()
    assert found.uncounted == ()


def test_a_compiled_layer() -> None:
    model = BY_NAME["mixtral"].model("meta", torch.bfloat16, "grouped_mm")
    model.model.layers[1].compile()
    check(tnmoe.cost_model(model, ids(), backward=True), BY_NAME["mixtral"].count())


EXAMPLES = {
    "tensor": ids(),
    "tuple": (ids(),),
    "list": [ids()],
    "mapping": {"input_ids": ids()},
    "cache": {"input_ids": ids(), "use_cache": True},
    "labels": {"input_ids": ids(), "labels": ids()},
    "routers": {"input_ids": ids(), "labels": ids(), "output_router_logits": True},
    "mask": {"input_ids": ids(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)},
    "positions": {"input_ids": ids(), "position_ids": torch.arange(TOKENS).expand(BATCH, -1)},
    "embedded": {"inputs_embeds": torch.zeros(BATCH, TOKENS, 64)},
    "hidden states": {"input_ids": ids(), "output_hidden_states": True, "return_dict": False},
}


DIFFERENTIATED = ("cache", "labels", "routers", "embedded", "hidden states")


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_ways_to_give_the_example(example: str) -> None:
    """None has other products: a loss adds none, nor do keys that are kept, nor more results."""
    model, backward = shared_model("mixtral", "cpu", torch.float32), example in DIFFERENTIATED
    check(tnmoe.cost_model(model, EXAMPLES[example], backward=backward), BY_NAME["mixtral"].count())


def test_a_mask_of_a_model_on_meta() -> None:
    check(tnmoe.cost_model(shared_model("mixtral"), EXAMPLES["mask"]), BY_NAME["mixtral"].count())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gpt_oss", "jamba", "minimax"])
def test_filling_a_cache_takes_no_product(name: str) -> None:
    check(tnmoe.cost_model(shared_model(name), {"input_ids": ids(), "use_cache": True}), BY_NAME[name].count())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("mixtral", {"attention_dropout": 0.1, "router_jitter_noise": 0.01}),
        ("gpt_oss", {"attention_dropout": 0.1}),
        ("phimoe", {"attention_dropout": 0.1, "input_jitter_noise": 0.01}),
        ("jamba", {}),
    ],
)
def test_training_mode(name: str, noise: dict[str, float]) -> None:
    """Dropout, noise and the sampled choice of phimoe have no product."""
    model = BY_NAME[name].changed(**noise).model("meta", torch.bfloat16, "grouped_mm").train()
    check(tnmoe.cost_model(model, ids(), backward=True), BY_NAME[name].count())
    assert all(m.training for m in model.modules())


PARTS = [
    (case, implementation)
    for index, case in enumerate(PARTLY_TRAINED)
    for turn, implementation in enumerate(IMPLEMENTATIONS)
    if case == "no experts" or turn == index % 3
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "implementation"), PARTS)
def test_frozen_parts(case: str, implementation: str) -> None:
    trained, but, count = PARTLY_TRAINED[case]
    model = frozen(BY_NAME["mixtral"].model("meta", torch.bfloat16, implementation), trained, but)
    check(tnmoe.cost_model(model, ids(), backward=True), count)


def test_nothing_is_trained() -> None:
    model = frozen(BY_NAME["mixtral"].model(), ())
    with pytest.raises(tnmoe.CostError, match="requires a gradient") as caught:
        tnmoe.cost_model(model, ids(), backward=True)
    assert "does not run" not in str(caught.value)  # it does
    check(tnmoe.cost_model(model, ids()), BY_NAME["mixtral"].count())


@pytest.mark.parametrize("setting", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_nothing(setting: Any) -> None:
    model = shared_model("mixtral", "cpu", torch.float32)
    with setting():
        found = tnmoe.cost_model(model, ids(), backward=True)
        assert not torch.is_grad_enabled()
    check(found, BY_NAME["mixtral"].count())


@pytest.mark.slow
def test_two_threads_count_at_once() -> None:
    """Each gets its figure, and what a count puts in place for a while is gone afterwards."""
    count, models = BY_NAME["mixtral"].count(), [BY_NAME["mixtral"].model(implementation=i) for i in IMPLEMENTATIONS]
    patched = torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply
    mkldnn = torch._C._get_mkldnn_enabled()
    try:
        with ThreadPoolExecutor(len(models)) as pool:
            for found in pool.map(lambda model: tnmoe.cost_model(model, ids(), backward=True), models):
                check(found, count)
        assert (torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply) == patched
        assert torch._C._get_mkldnn_enabled() == mkldnn
    finally:  # for the tests that follow, if it fails
        torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply = patched
        torch._C._set_mkldnn_enabled(mkldnn)
    assert [model.config._experts_implementation for model in models] == list(IMPLEMENTATIONS)


def test_a_model_that_runs_in_another_thread_computes_on() -> None:
    model, counted_all, results = BY_NAME["mixtral"].model(), threading.Event(), []
    with torch.no_grad():
        logits = model(ids()).logits

    def run() -> None:
        with torch.no_grad():
            while not counted_all.is_set():
                results.append(model(ids()).logits)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            for _ in range(3):
                tnmoe.cost_model(shared_model("mixtral"), ids())
        finally:
            counted_all.set()
        running.result()
    for result in results:
        torch.testing.assert_close(result, logits, rtol=0.0, atol=1e-3)  # whichever kernels run meanwhile
