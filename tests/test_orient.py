"""Large weights lie with their longer side last; nothing else of a program changes, whatever reads it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from networks import einsum, random_arrays, random_folded_network, random_network
from reference_module import CPFactors, ReferenceMuMoE, TensorRingFactors
from test_training import measure

import tnmoe
from tnmoe.backends.torch_names import attribute
from tnmoe.passes import orient as module

GATE = tnmoe.Gate("entmax15", "layer")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are turned."""
    monkeypatch.setattr(module, "LEAST", 1)


def stored(plan: tnmoe.Plan) -> dict[str, tuple[str, ...]]:
    return {p.name: p.indices for p in plan.program.parameters}


@pytest.mark.parametrize("tokens", [1, 4096])
def test_the_gpt2_blocks(tokens: int) -> None:
    """3072 > 556 and 768 > 556 on the way in are turned; the ways out and what has fewer than 2^18 elements are not."""
    orders = stored(tnmoe.plan(tnmoe.MuMoEBlock(768, 3072, 768, 256, tnmoe.CP(556), GATE), tokens=tokens))
    assert orders["up_input_factor"] == ("r", "i")
    assert orders["down_input_factor"] == ("r", "h")
    assert orders["up_output_factor"] == ("r", "h")
    assert orders["down_output_factor"] == ("r", "o")
    assert orders["gate_projection"] == ("i", "n")  # 768 × 256 = 196,608
    ring = stored(tnmoe.plan(tnmoe.MuMoEBlock(768, 3072, 768, 256, tnmoe.TensorRing((4, 4, 149)), GATE), tokens=tokens))
    assert ring["down_input_core"] == ("r2", "r3", "h")
    assert ring["down_output_core"] == ("r1", "r3", "o")


def test_equal_sides_and_symbols() -> None:
    """A square weight stays; sizes come from the plan's values where the declaration has symbols."""
    assert stored(tnmoe.plan(tnmoe.Linear(1024, 1024), tokens=1))["weight"] == ("i", "o")
    assert stored(tnmoe.plan(tnmoe.Linear(1025, 1024), tokens=1))["weight"] == ("o", "i")
    symbolic = tnmoe.Linear("d", "4*d")
    assert stored(tnmoe.plan(symbolic, tokens=1, sizes={"d": 1024}))["weight"] == ("i", "o")
    assert stored(tnmoe.plan(tnmoe.Linear("4*d", "d"), tokens=1, sizes={"d": 1024}))["weight"] == ("o", "i")


def test_a_weight_that_two_steps_read_stays(always: None) -> None:
    net = tnmoe.Network.parse("bi,io,o->bo", weights="io")
    orders = stored(tnmoe.plan(net, sizes={"b": 2, "i": 9, "o": 3}))
    assert orders == {"io": ("o", "i")}


def test_networks_are_what_einsum_says(always: None) -> None:
    """Folded biases, hyperedges and all: exact in integers, and trained as predicted."""
    rng = random.Random(31)
    turned = 0
    for seed in range(120):
        folded = rng.random() < 0.3
        draw = random_folded_network if folded else random_network
        network, sizes = draw(rng, rng.randint(2, 5), max_size=4)
        plan = tnmoe.plan(network, sizes=sizes)
        arrays = random_arrays(network, sizes, seed)
        built = tnmoe.build(plan, dtype=torch.float64)
        canonical = {t.name: t.indices for t in network.leaves}
        with torch.no_grad():
            for p in plan.program.parameters:
                order = [canonical[p.name].index(i) for i in p.indices]
                getattr(built, attribute(p.name)).copy_(torch.from_numpy(arrays[p.name].transpose(order)))
        data = [torch.from_numpy(arrays[v.name]) for v in plan.layer.inputs]
        np.testing.assert_array_equal(built(*data).detach().numpy(), einsum(network, arrays), err_msg=str(network))
        if built(*data).requires_grad:
            report = tnmoe.cost(plan)
            inputs = [d.float().requires_grad_() for d in data]
            assert measure(tnmoe.build(plan), inputs) == (report.training_matmul_flops, report.saved_bytes)
        turned += ".mT" in tnmoe.emit(plan)
    assert turned > 20


@pytest.mark.parametrize(
    ("factors", "factorization", "ranks"),
    [(CPFactors, tnmoe.CP(4), 4), (TensorRingFactors, tnmoe.TensorRing((2, 2, 3)), [2, 2, 3])],
    ids=["cp", "tr"],
)
def test_the_reference_s_weights_find_their_place(always: None, factors, factorization, ranks) -> None:
    """State dicts go to and fro through the turned layout, with the same outputs; frozen and recomputed too."""
    torch.manual_seed(0)
    reference = ReferenceMuMoE(factors, 7, 9, [5], ranks, second=6, norm="ln").double()
    spec = tnmoe.MuMoEBlock(7, 9, 6, 5, factorization, GATE)
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    for memory in (None, "recompute"):
        plan = tnmoe.plan(spec, tokens=4, memory=memory)
        built = tnmoe.build(plan, freeze=True, dtype=torch.float64)
        built.load_state_dict(tnmoe.from_reference(plan, reference.state_dict()))
        torch.testing.assert_close(built(x), reference(x), rtol=0, atol=1e-6)  # whose ones are float32
        torch.testing.assert_close(built.freeze()(x), built(x).detach(), rtol=0, atol=1e-12)
        back = tnmoe.to_reference(plan, built.state_dict())
        assert all(torch.equal(back[k], v) for k, v in reference.state_dict().items() if k in back)
