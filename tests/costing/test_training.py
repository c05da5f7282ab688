"""Training: FLOPs of the backward pass and what is saved for it, against torch; and the objectives built on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.cases import blocks, case, seeds
from support.networks import random_network
from support.training import Oracle, measure, random_spec
from torch import nn

import tnmoe
from tnmoe.costing.objective import TRAINING
from tnmoe.ir.contractions import Contract, Permute, matmul_groups
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role
from tnmoe.planning.plan import Plan
from tnmoe.presets.registry import PRESETS

EMITTED = [name for name, preset in PRESETS.items() if preset.emitted]


@pytest.mark.slow
@pytest.mark.parametrize("input_gradients", [True, False])
@pytest.mark.parametrize("name", EMITTED)
def test_presets_train_as_predicted(name: str, input_gradients: bool) -> None:
    """Equality with the counter and the hooks, for inputs with and without a gradient."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=12, input_gradients=input_gradients)
    report = tnmoe.cost(plan)
    x = torch.randn(12, int(plan.bound.sizes["i"]), requires_grad=input_gradients)
    assert measure(tnmoe.build(plan), [x]) == (report.training_matmul_flops, report.saved_bytes)


def test_published_training_figures() -> None:
    """32 tokens through the GPT-2 blocks: backward is 2× the forward if x needs a gradient, else less, by figures.

    The reference appends a one to each layer's input; ours adds the bias, which saves a row of 2·32·R (CP) or
    2·32·r·r' (TR) FLOPs in each product with an input factor: two forward. Backward it is two for each layer, or,
    where x needs no gradient, one for the first. The figures are those of blocks without an input norm.
    """
    for name, forward, backward, frozen, row in (
        ("gpt2-cp", 304_158_208, 608_316_416, 568_369_408, 2 * 32 * 556),
        ("gpt2-tr", 306_434_560, 612_869_120, 570_953_472, 2 * 32 * 4 * 149),
    ):
        assert backward == 2 * forward
        spec = replace(PRESETS[name].spec, input_norm=False)
        for input_gradients, published in ((True, backward - 4 * row), (False, frozen - 3 * row)):
            report = tnmoe.cost(tnmoe.plan(spec, tokens=32, input_gradients=input_gradients))
            assert report.matmul_flops == forward - 2 * row
            assert report.training_matmul_flops - report.matmul_flops == published


@pytest.mark.parametrize("seed", seeds(120, 4))
def test_random_layers_train_as_predicted(seed: int) -> None:
    """Layers under every objective; saved tensors are counted exactly, entmax roots and norm statistics too."""
    rng = random.Random(seed)
    objective = rng.choice(["flops", "macs", "training", "saved"])
    inputs = rng.random() < 0.5
    plan = tnmoe.plan(random_spec(rng), tokens=5, objective=objective, input_gradients=inputs)
    report = tnmoe.cost(plan)
    module = tnmoe.build(plan)
    for p in module.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, int(plan.bound.sizes["i"]), requires_grad=inputs)
    found = measure(module, [x])
    assert found == (report.training_matmul_flops, report.saved_bytes), (plan.layer.summary, inputs)
    assert plan.training_flops == report.training_flops
    assert 4 * plan.saved == report.saved_bytes


@pytest.mark.parametrize("block", blocks(200, of=50))
def test_random_networks_train_as_predicted(block: range) -> None:
    """Any einsum, with trained and frozen weights and data that needs a gradient or not."""
    measured = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, rng.randint(2, 5), max_size=4)
            data = [t.name for t in network.tensors if t.role is Role.DATA]
            wanted = [name for name in data if rng.random() < 0.5]
            plan = tnmoe.plan(network, sizes=sizes, objective=rng.choice(["training", "saved"]), input_gradients=wanted)
            if not wanted and all(t.role is not Role.WEIGHT for t in network.tensors):
                assert (plan.training_flops, plan.saved) == (plan.flops, 0)
                continue
            shapes = {t.name: [sizes[i] for i in t.indices] for t in network.tensors}
            inputs = [torch.randn(shapes[n]).requires_grad_(n in wanted) for n in data]
            report = tnmoe.cost(plan)
            told = (report.training_matmul_flops, report.saved_bytes)
            assert measure(tnmoe.build(plan), inputs) == told, str(network)
            measured += 1
    assert measured > 25


ORDERS: dict[str, Callable[[tuple[int, int]], tuple[int, ...]]] = {
    "training": lambda price: (price[1],),
    "saved": lambda price: price,
}


@pytest.mark.parametrize("block", blocks(400, of=50))
@pytest.mark.parametrize("objective", ["training", "saved"])
def test_objectives_reach_the_optimum_of_all_trees(objective: str, block: range) -> None:
    """Random networks of 3 to 6 tensors with random gradients: the plan's price is the best there is."""
    frozen_matters = without_copies = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, 3 + seed % 4)
            data = [t.name for t in network.tensors if t.role is Role.DATA]
            wanted = [name for name in data if rng.random() < 0.5]
            plan = tnmoe.plan(network, sizes=sizes, objective=objective, input_gradients=wanted)
            requires_grad = {t.name for t in network.tensors if t.role is Role.WEIGHT} | set(wanted)
            oracle = Oracle(network, sizes, requires_grad)
            found = oracle.of_path(plan.paths["result"])
            assert ORDERS[objective](found) == oracle.best(ORDERS[objective]), str(network)
            broadcast = any(isinstance(op, Contract) and matmul_groups(op).outer for op in plan.program.ops)
            assert plan.training_flops == found[1] or broadcast  # the matrix's gradient is summed over the items
            copies = any(isinstance(op, Permute) for op in plan.program.ops)
            assert plan.saved == found[0] or copies  # these are kept in place of what they copy
            without_copies += not copies
            frozen_matters += plan.path != tnmoe.plan(network, sizes=sizes).path
    assert frozen_matters > 2
    assert without_copies > 5


def test_frozen_operands_change_the_best_order() -> None:
    """Tensor train, x frozen, b 512, n 32, i 1024, o 64, a 256, c 512: 0.3 % apart forward, 1.5× apart in training.

    Of the orders that mix the experts first, ((bn·na)·aic) then x, then co costs as much forward as joining x to the
    core first; but there x and the core, and not the mixed core, are what the largest product differentiates.
    """
    net = Network.parse("bn,na,bi,aic,co->bo", weights="na aic co")
    sizes = {"b": 512, "n": 32, "i": 1024, "o": 64, "a": 256, "c": 512}
    layer = tnmoe.plan(net, sizes=sizes).layer
    values = {**layer.values, **sizes}
    found = {}
    for name, steps in {
        "core with x first": ((2, 3), (0, 1), (5, 6), (7, 4)),
        "core with the gate first": ((0, 1), (5, 3), (6, 2), (7, 4)),
    }.items():
        plan = Plan(layer, {"result": ContractionPath(steps)}, values, TRAINING, ("bn",))
        found[name] = plan.flops, plan.training_flops
    (forward, training), (other_forward, other_training) = found.values()
    assert abs(forward - other_forward) / forward < 0.003
    assert round(training / 1e9) == 275
    assert int(other_training / 1e9) == 413


@pytest.mark.slow
def test_what_two_steps_keep_is_no_fault() -> None:
    """A bias's slice may be an operand that its product keeps too: the greedy bound counted it once, a plan twice."""
    gate = tnmoe.Gate("sparsemax", "batch")
    plan = tnmoe.plan(tnmoe.MuMoE(2, 9, (2, 3, 1), tnmoe.CP(3), gate=gate), tokens=16, objective="saved")
    assert plan.saved > 0
