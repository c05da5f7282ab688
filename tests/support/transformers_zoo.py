"""Small models of transformers' MoE families, and the products of each counted by hand from configuration numbers.

Nothing here is derived from tnmoe. A `Product` is one product of two operands that some module runs: 2 FLOPs for each
of its multiply-accumulates forward, and the same again backward for each operand that a gradient is wanted of. Nothing
is recomputed backward: attention costs its two products forward and four backward, however a kernel does it.
Attention is counted in full, masked entries included. Every token meets `top_k` experts, whatever the router says.
Rotary embeddings are no products: transformers 5.23 multiplies positions by frequencies element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers

BATCH, TOKENS = 2, 13
WIDTH, VOCABULARY = 64, 97
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@dataclass(frozen=True)
class Product:
    """`macs` multiply-accumulates in a module, or of a parameter in it; `gradients` operands want a gradient."""

    where: str
    macs: int
    gradients: int = 2

    def inside(self, path: str) -> bool:
        return not path or self.where == path or self.where.startswith(f"{path}.")


@dataclass(frozen=True)
class Count:
    """The products of one forward pass of a model."""

    products: tuple[Product, ...]

    def forward(self, path: str = "") -> int:
        return sum(2 * p.macs for p in self.products if p.inside(path))

    def backward(self, path: str = "") -> int:
        return sum(2 * p.macs * p.gradients for p in self.products if p.inside(path))

    def with_gradients(self, gradients: int, *paths: str) -> Count:
        """The same with another number of gradients for the products in `paths`."""
        changed = (any(p.inside(path) for path in paths) for p in self.products)
        return Count(tuple(replace(p, gradients=gradients) if new else p for p, new in zip(self.products, changed)))

    def without(self, part: str) -> Count:
        return Count(tuple(p for p in self.products if part not in p.where))


Hand = Callable[[Any, int, int], Iterator[Product]]


# ---- the parts that families share ---------------------------------------------------------------------------------


def linear(where: str, rows: int, inputs: int, outputs: int) -> Product:
    return Product(where, rows * inputs * outputs)


def attention(where: str, batch: int, tokens: int, heads: int, scored: int, valued: int) -> Iterator[Product]:
    """Scores of all pairs of tokens, `scored` numbers a head, then their sums of values, `valued` numbers a head."""
    yield Product(where, batch * heads * tokens * tokens * scored)
    yield Product(where, batch * heads * tokens * tokens * valued)


def grouped_query(where: str, batch: int, tokens: int, heads: int, shared: int, size: int) -> Iterator[Product]:
    """Attention whose `heads` queries share fewer keys and values; each head is of `size`."""
    rows = batch * tokens
    yield linear(f"{where}.q_proj", rows, WIDTH, heads * size)
    yield linear(f"{where}.k_proj", rows, WIDTH, shared * size)
    yield linear(f"{where}.v_proj", rows, WIDTH, shared * size)
    yield from attention(where, batch, tokens, heads, size, size)
    yield linear(f"{where}.o_proj", rows, heads * size, WIDTH)


def latent(where: str, c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """DeepSeek's attention: keys and values are made of a latent vector, and one rotary key serves all heads."""
    rows, heads = batch * tokens, c.num_attention_heads
    scored = c.qk_nope_head_dim + c.qk_rope_head_dim
    if c.q_lora_rank is None:
        yield linear(f"{where}.q_proj", rows, WIDTH, heads * scored)
    else:
        yield linear(f"{where}.q_a_proj", rows, WIDTH, c.q_lora_rank)
        yield linear(f"{where}.q_b_proj", rows, c.q_lora_rank, heads * scored)
    yield linear(f"{where}.kv_a_proj_with_mqa", rows, WIDTH, c.kv_lora_rank + c.qk_rope_head_dim)
    yield linear(f"{where}.kv_b_proj", rows, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
    yield from attention(where, batch, tokens, heads, scored, c.v_head_dim)
    yield linear(f"{where}.o_proj", rows, heads * c.v_head_dim, WIDTH)


def gated(where: str, rows: int, hidden: int) -> Iterator[Product]:
    """A dense feed-forward layer of three matrices."""
    yield linear(f"{where}.gate_proj", rows, WIDTH, hidden)
    yield linear(f"{where}.up_proj", rows, WIDTH, hidden)
    yield linear(f"{where}.down_proj", rows, hidden, WIDTH)


def experts(where: str, pairs: int, hidden: int) -> Iterator[Product]:
    """`pairs` of a token and an expert, through a gate and an up projection of one matrix, then down."""
    yield linear(f"{where}.gate_up_proj", pairs, WIDTH, 2 * hidden)
    yield linear(f"{where}.down_proj", pairs, hidden, WIDTH)


def head(rows: int) -> Product:
    return linear("lm_head", rows, WIDTH, VOCABULARY)


# ---- the families --------------------------------------------------------------------------------------------------


def mixtral(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    rows = batch * tokens
    for layer in ("model.layers.0", "model.layers.1"):
        yield from grouped_query(f"{layer}.self_attn", batch, tokens, 4, 2, c.head_dim)
        yield linear(f"{layer}.mlp.gate", rows, WIDTH, c.num_local_experts)
        yield from experts(f"{layer}.mlp.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield head(rows)


def qwen2_moe(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """A shared expert, and a gate of one number that multiplies it."""
    rows = batch * tokens
    for layer in ("model.layers.0", "model.layers.1"):
        yield from grouped_query(f"{layer}.self_attn", batch, tokens, 4, 2, 16)
        yield linear(f"{layer}.mlp.gate", rows, WIDTH, c.num_experts)
        yield from experts(f"{layer}.mlp.experts", rows * c.num_experts_per_tok, c.moe_intermediate_size)
        yield from gated(f"{layer}.mlp.shared_expert", rows, c.shared_expert_intermediate_size)
        yield linear(f"{layer}.mlp.shared_expert_gate", rows, WIDTH, 1)
    yield head(rows)


def qwen3_moe(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """`mlp_only_layers` makes the first layer dense."""
    rows = batch * tokens
    yield from grouped_query("model.layers.0.self_attn", batch, tokens, 4, 2, c.head_dim)
    yield from gated("model.layers.0.mlp", rows, c.intermediate_size)
    yield from grouped_query("model.layers.1.self_attn", batch, tokens, 4, 2, c.head_dim)
    yield linear("model.layers.1.mlp.gate", rows, WIDTH, c.num_experts)
    yield from experts("model.layers.1.mlp.experts", rows * c.num_experts_per_tok, c.moe_intermediate_size)
    yield head(rows)


def olmoe(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    rows = batch * tokens
    for layer in ("model.layers.0", "model.layers.1"):
        yield from grouped_query(f"{layer}.self_attn", batch, tokens, 4, 2, 16)
        yield linear(f"{layer}.mlp.gate", rows, WIDTH, c.num_experts)
        yield from experts(f"{layer}.mlp.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield head(rows)


def deepseek(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """V2 and V3: `first_k_dense_replace` makes the first layer dense, `n_shared_experts` are one wider layer."""
    rows = batch * tokens
    yield from latent("model.layers.0.self_attn", c, batch, tokens)
    yield from gated("model.layers.0.mlp", rows, c.intermediate_size)
    yield from latent("model.layers.1.self_attn", c, batch, tokens)
    yield linear("model.layers.1.mlp.gate", rows, WIDTH, c.n_routed_experts)
    yield from experts("model.layers.1.mlp.experts", rows * c.num_experts_per_tok, c.moe_intermediate_size)
    yield from gated("model.layers.1.mlp.shared_experts", rows, c.n_shared_experts * c.moe_intermediate_size)
    yield head(rows)


def gpt_oss(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """Biases everywhere, and a window of attention that changes nothing in full; sinks are no products."""
    rows = batch * tokens
    for layer in ("model.layers.0", "model.layers.1"):
        yield from grouped_query(f"{layer}.self_attn", batch, tokens, 4, 2, c.head_dim)
        yield linear(f"{layer}.mlp.router", rows, WIDTH, c.num_local_experts)
        yield from experts(f"{layer}.mlp.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield head(rows)


def glm4_moe(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    rows = batch * tokens
    yield from grouped_query("model.layers.0.self_attn", batch, tokens, 4, 2, c.head_dim)
    yield from gated("model.layers.0.mlp", rows, c.intermediate_size)
    yield from grouped_query("model.layers.1.self_attn", batch, tokens, 4, 2, c.head_dim)
    yield linear("model.layers.1.mlp.gate", rows, WIDTH, c.n_routed_experts)
    yield from experts("model.layers.1.mlp.experts", rows * c.num_experts_per_tok, c.moe_intermediate_size)
    yield from gated("model.layers.1.mlp.shared_experts", rows, c.n_shared_experts * c.moe_intermediate_size)
    yield head(rows)


def granitemoe(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    rows = batch * tokens
    for layer in ("model.layers.0", "model.layers.1"):
        at = f"{layer}.block_sparse_moe"
        yield from grouped_query(f"{layer}.self_attn", batch, tokens, 4, 2, 16)
        yield linear(f"{at}.router", rows, WIDTH, c.num_local_experts)
        yield from experts(f"{at}.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield head(rows)


def phimoe(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """Sparsemixer chooses twice and has a gradient of its own, with no product in it."""
    rows = batch * tokens
    for layer in ("model.layers.0", "model.layers.1"):
        yield from grouped_query(f"{layer}.self_attn", batch, tokens, 4, 2, 16)
        yield linear(f"{layer}.mlp.router", rows, WIDTH, c.num_local_experts)
        yield from experts(f"{layer}.mlp.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield head(rows)


def ernie(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """The head is the embedding's matrix, which changes no product."""
    rows = batch * tokens
    yield from grouped_query("model.layers.0.self_attn", batch, tokens, 4, 2, 16)
    yield from gated("model.layers.0.mlp", rows, c.intermediate_size)
    yield from grouped_query("model.layers.1.self_attn", batch, tokens, 4, 2, 16)
    yield linear("model.layers.1.mlp.gate", rows, WIDTH, c.moe_num_experts)
    yield from experts("model.layers.1.mlp.experts", rows * c.moe_k, c.moe_intermediate_size)
    yield from gated("model.layers.1.mlp.shared_experts", rows, c.moe_num_shared_experts * c.moe_intermediate_size)
    yield head(rows)


def jamba(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """A Mamba layer with experts, then attention with a dense layer.

    The convolution takes one filter a channel, and runs past the end by its padding. The scan over the tokens is
    element-wise; its one product reads the state of `mamba_d_state` numbers a channel, token by token.
    """
    rows, inner = batch * tokens, c.mamba_expand * WIDTH
    at = "model.layers.0.mamba"
    yield linear(f"{at}.in_proj", rows, WIDTH, 2 * inner)
    yield Product(at, batch * (tokens + c.mamba_d_conv - 1) * inner * c.mamba_d_conv)
    yield linear(f"{at}.x_proj", rows, inner, c.mamba_dt_rank + 2 * c.mamba_d_state)
    yield Product(at, rows * c.mamba_dt_rank * inner)  # dt_proj's weight, though not through the module
    yield Product(at, rows * inner * c.mamba_d_state)
    yield linear(f"{at}.out_proj", rows, inner, WIDTH)
    yield linear("model.layers.0.feed_forward.router", rows, WIDTH, c.num_experts)
    yield from experts("model.layers.0.feed_forward.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield from grouped_query("model.layers.1.self_attn", batch, tokens, 4, 2, 16)
    yield from gated("model.layers.1.feed_forward", rows, c.intermediate_size)
    yield head(rows)


def minimax(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """Linear attention in blocks of `block_size` tokens, then full attention.

    The state that the first block reads is zeros, which have no gradient; nobody reads what the last block leaves.
    """
    rows, heads, size = batch * tokens, 4, c.head_dim
    at = "model.layers.0.self_attn"
    yield linear(f"{at}.qkv_proj", rows, WIDTH, 3 * heads * size)
    starts = range(0, tokens, c.block_size)
    for start in starts:
        block = min(c.block_size, tokens - start)
        yield from attention(at, batch, block, heads, size, size)
        yield Product(at, batch * heads * block * size * size, gradients=1 if start == 0 else 2)  # queries and state
        yield Product(at, batch * heads * block * size * size, gradients=0 if start == starts[-1] else 2)  # next state
    yield linear(f"{at}.output_gate", rows, WIDTH, heads * size)
    yield linear(f"{at}.out_proj", rows, heads * size, WIDTH)
    yield from grouped_query("model.layers.1.self_attn", batch, tokens, heads, 2, size)
    for layer in ("model.layers.0", "model.layers.1"):
        yield linear(f"{layer}.mlp.gate", rows, WIDTH, c.num_local_experts)
        yield from experts(f"{layer}.mlp.experts", rows * c.num_experts_per_tok, c.intermediate_size)
    yield head(rows)


def llama4(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """All tokens run through all experts, those not chosen as zeros; the first layer is dense."""
    rows = batch * tokens
    yield from grouped_query("model.layers.0.self_attn", batch, tokens, 4, 2, c.head_dim)
    yield from gated("model.layers.0.feed_forward", rows, c.intermediate_size_mlp)
    yield from grouped_query("model.layers.1.self_attn", batch, tokens, 4, 2, c.head_dim)
    yield linear("model.layers.1.feed_forward.router", rows, WIDTH, c.num_local_experts)
    yield from experts("model.layers.1.feed_forward.experts", rows * c.num_local_experts, c.intermediate_size)
    yield from gated("model.layers.1.feed_forward.shared_expert", rows, c.intermediate_size)
    yield head(rows)


def dbrx(c: Any, batch: int, tokens: int) -> Iterator[Product]:
    """The experts' matrices belong to `experts.mlp`, called once for each expert that a token chose."""
    rows, size = batch * tokens, WIDTH // c.n_heads
    for layer in ("transformer.blocks.0", "transformer.blocks.1"):
        at = f"{layer}.norm_attn_norm.attn"
        yield linear(f"{at}.Wqkv", rows, WIDTH, WIDTH + 2 * c.attn_config["kv_n_heads"] * size)
        yield from attention(at, batch, tokens, c.n_heads, size, size)
        yield linear(f"{at}.out_proj", rows, WIDTH, WIDTH)
        yield linear(f"{layer}.ffn.router.layer", rows, WIDTH, c.ffn_config["moe_num_experts"])
        yield from experts(
            f"{layer}.ffn.experts.mlp", rows * c.ffn_config["moe_top_k"], c.ffn_config["ffn_hidden_size"]
        )
    yield head(rows)


@dataclass(frozen=True)
class Family:
    """One class of configurations with small numbers, and the products of its models.

    Attributes:
        hand: (settings, batch, tokens a sequence) -> products.
        exchangeable: True if transformers can exchange the implementation of its experts.
    """

    name: str
    configuration: str
    hand: Hand
    settings: dict[str, Any]
    exchangeable: bool = True

    def changed(self, **settings: Any) -> Family:
        return replace(self, settings=self.settings | settings)

    def count(self, batch: int = BATCH, tokens: int = TOKENS) -> Count:
        return Count(tuple(self.hand(SimpleNamespace(**self.settings), batch, tokens)))

    def model(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        implementation: str = "batched_mm",
        attention: str | None = None,
    ) -> Any:
        """A model in evaluation mode, its weights random whatever the order of tests."""
        config = getattr(transformers, self.configuration)(**self.settings)
        options: dict[str, Any] = {"dtype": dtype}
        if attention is not None:
            options["attn_implementation"] = attention
        if self.exchangeable:
            options["experts_implementation"] = implementation
        with torch.random.fork_rng(devices=()), torch.device(device):
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def _family(name: str, configuration: str, hand: Hand, exchangeable: bool = True, **settings: Any) -> Family:
    common = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    common |= {"vocab_size": VOCABULARY, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Family(name, configuration, hand, common | settings, exchangeable)


FAMILIES = (
    _family(
        "mixtral",
        "MixtralConfig",
        mixtral,
        head_dim=24,
        intermediate_size=40,
        num_local_experts=7,
        num_experts_per_tok=2,
    ),
    _family(
        "qwen2_moe",
        "Qwen2MoeConfig",
        qwen2_moe,
        intermediate_size=88,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        num_experts=7,
        num_experts_per_tok=3,
    ),
    _family(
        "qwen3_moe",
        "Qwen3MoeConfig",
        qwen3_moe,
        head_dim=24,
        intermediate_size=88,
        moe_intermediate_size=40,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        norm_topk_prob=True,
    ),
    _family(
        "olmoe",
        "OlmoeConfig",
        olmoe,
        intermediate_size=48,
        num_experts=7,
        num_experts_per_tok=3,
        clip_qkv=3.0,
    ),
    _family(
        "deepseek_v2",
        "DeepseekV2Config",
        deepseek,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        intermediate_size=88,
        moe_intermediate_size=40,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
    ),
    _family(
        "deepseek_v3",
        "DeepseekV3Config",
        deepseek,
        num_key_value_heads=4,
        q_lora_rank=28,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        intermediate_size=88,
        moe_intermediate_size=40,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=3,
        topk_group=2,
    ),
    _family(
        "gpt_oss",
        "GptOssConfig",
        gpt_oss,
        head_dim=24,
        intermediate_size=40,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=5,
    ),
    _family(
        "glm4_moe",
        "Glm4MoeConfig",
        glm4_moe,
        head_dim=24,
        attention_bias=True,
        use_qk_norm=True,
        intermediate_size=88,
        moe_intermediate_size=40,
        n_routed_experts=7,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    _family(
        "granitemoe",
        "GraniteMoeConfig",
        granitemoe,
        intermediate_size=40,
        num_local_experts=5,
        num_experts_per_tok=3,
        logits_scaling=3.0,
    ),
    _family(
        "phimoe",
        "PhimoeConfig",
        phimoe,
        intermediate_size=40,
        num_local_experts=7,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
    ),
    _family(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        ernie,
        intermediate_size=88,
        moe_intermediate_size=40,
        moe_num_experts=7,
        moe_num_shared_experts=2,
        moe_k=2,
        moe_layer_start_index=1,
        use_bias=True,
        tie_word_embeddings=True,
    ),
    _family(
        "jamba",
        "JambaConfig",
        jamba,
        intermediate_size=40,
        num_experts=7,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=0,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_expand=2,
        mamba_d_state=6,
        mamba_d_conv=3,
        mamba_dt_rank=5,
    ),
    _family(
        "minimax",
        "MiniMaxConfig",
        minimax,
        head_dim=24,
        intermediate_size=40,
        num_local_experts=7,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=5,
    ),
    _family(
        "llama4",
        "Llama4TextConfig",
        llama4,
        exchangeable=False,
        head_dim=24,
        intermediate_size=40,
        intermediate_size_mlp=88,
        num_local_experts=5,
        num_experts_per_tok=2,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
    ),
)

DBRX = Family(
    "dbrx",
    "DbrxConfig",
    dbrx,
    {
        "d_model": WIDTH,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": VOCABULARY,
        "use_cache": False,
        "attn_config": {
            "kv_n_heads": 2,
            "clip_qkv": 8,
            "rope_theta": 10000.0,
        },
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 7, "moe_top_k": 3},
    },
    exchangeable=False,
)

BY_NAME = {family.name: family for family in (*FAMILIES, DBRX)}
