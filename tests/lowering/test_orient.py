"""Large weights lie with their longer side last; nothing else of a program changes, whatever reads it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.cases import blocks, case
from support.networks import einsum, random_arrays, random_folded_network, random_network
from support.reference_module import CPFactors, ReferenceMuMoE, TensorRingFactors
from support.training import measure

import tnmoe
from tnmoe.backends.torch.names import attribute
from tnmoe.lowering import orient

GATE = tnmoe.Gate("entmax15", "layer")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are turned."""
    monkeypatch.setattr(orient, "LEAST", 1)


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


@pytest.mark.parametrize("block", blocks(60, of=20))
@pytest.mark.parametrize("layout", ["auto", "rows", "columns"])
def test_networks_are_what_einsum_says(always: None, layout: str, block: range) -> None:
    """Folded biases, hyperedges and all: exact in integers, and trained as predicted."""
    turned = 0
    for seed in block:
        with case(seed) as rng:
            folded = rng.random() < 0.3
            draw = random_folded_network if folded else random_network
            network, sizes = draw(rng, rng.randint(2, 5), max_size=4)
            plan = tnmoe.plan(network, sizes=sizes, layout=layout)
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
            turned += plan.program.parameters != tnmoe.plan(network, sizes=sizes, layout="rows").program.parameters
    assert turned == 0 if layout == "rows" else turned > 0


@pytest.mark.slow
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
    for memory, layout in ((None, "auto"), ("recompute", "auto"), (None, "columns"), ("save", "rows")):
        plan = tnmoe.plan(spec, tokens=4, memory=memory, layout=layout)
        built = tnmoe.build(plan, freeze=True, dtype=torch.float64)
        built.load_state_dict(tnmoe.from_reference(plan, reference.state_dict()))
        torch.testing.assert_close(built(x), reference(x), rtol=0, atol=1e-6)  # whose ones are float32
        torch.testing.assert_close(built.freeze()(x), built(x).detach(), rtol=0, atol=1e-12)
        back = tnmoe.to_reference(plan, built.state_dict())
        assert all(torch.equal(back[k], v) for k, v in reference.state_dict().items() if k in back)


BLOCK = tnmoe.MuMoEBlock(768, 3072, 768, 256, tnmoe.CP(556), GATE)


def test_what_is_said_is_what_is_stored() -> None:
    """All (inner, columns), all (columns, inner), or some by name; the state dict has those shapes, the cost is one."""
    auto = tnmoe.plan(BLOCK, tokens=1)
    rows, columns, named = (
        tnmoe.plan(BLOCK, tokens=1, layout=layout) for layout in ("rows", "columns", ["down_input_factor"])
    )
    assert auto.turnable == (
        "gate_projection",
        "up_expert_factor",
        "up_input_factor",
        "up_output_factor",
        "down_expert_factor",
        "down_input_factor",
        "down_output_factor",
    )
    assert (auto.turned, rows.turned, columns.turned, named.turned) == (
        None,
        (),
        auto.turnable,
        ("down_input_factor",),
    )
    inner = {name: stored(rows)[name] for name in auto.turnable}
    assert inner["up_input_factor"] == ("i", "r")
    assert {name: stored(columns)[name] for name in auto.turnable} == {n: i[::-1] for n, i in inner.items()}
    assert stored(named) == {**stored(rows), "down_input_factor": ("r", "h")}
    assert auto.store(["up_input_factor", "down_input_factor"]).program == auto.program
    for plan in (rows, columns, named):
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in tnmoe.build(plan).state_dict().items()}
        sizes = plan.bound.sizes
        assert shapes == {attribute(n): tuple(int(sizes[i]) for i in order) for n, order in stored(plan).items()}
        assert (plan.flops, plan.training_flops, plan.saved) == (auto.flops, auto.training_flops, auto.saved)


def test_a_plan_in_json_says_how_weights_are_stored() -> None:
    for layout in ("auto", "rows", "columns", ("up_input_factor",)):
        plan = tnmoe.plan(BLOCK, tokens=2, memory="save", flavour="fast", layout=layout)
        back = tnmoe.Plan.from_json(plan.to_json())
        assert (back.turned, back.program, back.function) == (plan.turned, plan.program, plan.function)
        assert tnmoe.emit(back) == tnmoe.emit(plan)
    assert "(columns, inner): up_input_factor." in str(plan.table())


def test_what_cannot_be_turned() -> None:
    """A weight that two steps read, a batched one, a bias, and what is no weight at all."""
    net = tnmoe.Network.parse("bi,io,o->bo", weights="io o")
    plan = tnmoe.plan(net, sizes={"b": 2, "i": 9, "o": 3})
    assert plan.turnable == ("io",)
    for layout, words in (
        (["o"], "unknown weight 'o'.*allowed: io"),
        (["nothing"], "nothing"),
        ("colums", "did you mean 'columns'"),
        (3, "layout must be one of"),
        ([3], "layout must be one of"),
    ):
        with pytest.raises(tnmoe.PlanError, match=words):
            tnmoe.plan(net, sizes={"b": 2, "i": 9, "o": 3}, layout=layout)
    text = tnmoe.plan(net, sizes={"b": 2, "i": 9, "o": 3}, layout=["io"]).to_json()
    assert tnmoe.Plan.from_json(text).turned == ("io",)
    for wrong in ('["o"]', '"io"', "[3]", "7"):
        with pytest.raises(tnmoe.PlanError):
            tnmoe.Plan.from_json(re.sub(r'"turned": \[[^]]*\]', f'"turned": {wrong}', text))
