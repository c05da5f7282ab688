"""Training: FLOPs of the backward pass and what is saved for it, against torch; and the objectives built on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from networks import random_network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.costing.objective import TRAINING
from tnmoe.ir.contractions import Permute
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.value import Role
from tnmoe.planning.plan import Plan
from tnmoe.presets.registry import PRESETS

EMITTED = [name for name, preset in PRESETS.items() if preset.emitted]


def saved_bytes(run: Callable[[], Tensor], exclude: list[Tensor]) -> tuple[int, Tensor]:
    """Bytes of the distinct storages that autograd keeps, those of `exclude` aside, and what `run` returns."""
    skip = {t.untyped_storage().data_ptr() for t in exclude}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(seen.values()), out


def measure(module: nn.Module, inputs: list[Tensor]) -> tuple[int, int]:
    """FLOPs of forward and backward by torch's counter, and saved bytes by hooks."""
    stored = [*module.parameters(), *module.buffers(), *inputs]
    saved, _ = saved_bytes(lambda: module(*inputs), stored)
    with FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    return counter.get_total_flops(), saved


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


def random_spec(rng: random.Random) -> tnmoe.MuMoE | tnmoe.MuMoEBlock:
    levels = rng.randint(1, 3)
    experts = [rng.randint(1, 6) for _ in range(levels)]
    factorization = rng.choice(
        [tnmoe.CP(rng.randint(1, 7)), tnmoe.TensorRing([rng.randint(1, 4) for _ in range(levels + 2)])]
    )
    gate = tnmoe.Gate(
        rng.choice(["entmax15", "softmax", "sparsemax", "sigmoid"]), rng.choice(["batch", "layer", "none"])
    )
    bias, norm = rng.random() < 0.6, rng.random() < 0.5
    widths = [rng.randint(2, 9) for _ in range(3)]
    if rng.random() < 0.5:
        return tnmoe.MuMoEBlock(*widths, experts, factorization, gate, bias, norm)
    return tnmoe.MuMoE(*widths[:2], experts, factorization, gate, bias, norm)


def test_random_layers_train_as_predicted() -> None:
    """120 layers under every objective; saved tensors are counted exactly, entmax roots and norm statistics too."""
    rng = random.Random(11)
    for trial in range(120):
        objective = rng.choice(["flops", "macs", "training", "saved"])
        inputs = rng.random() < 0.5
        plan = tnmoe.plan(random_spec(rng), tokens=5, objective=objective, input_gradients=inputs)
        report = tnmoe.cost(plan)
        module = tnmoe.build(plan)
        for p in module.parameters():
            nn.init.normal_(p)
        x = torch.randn(5, int(plan.bound.sizes["i"]), requires_grad=inputs)
        found = measure(module, [x])
        assert found == (report.training_matmul_flops, report.saved_bytes), (trial, plan.layer.summary, inputs)
        assert plan.training_flops == report.training_flops
        assert 4 * plan.saved == report.saved_bytes


def test_random_networks_train_as_predicted() -> None:
    """Any einsum, with trained and frozen weights and data that needs a gradient or not."""
    rng = random.Random(12)
    measured = 0
    for _ in range(200):
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
        assert measure(tnmoe.build(plan), inputs) == (report.training_matmul_flops, report.saved_bytes), str(network)
        measured += 1
    assert measured > 120


class Oracle:
    """Prices of contraction steps by hand, from index sets; shares no code with the package.

    Forward, as in test_planner: private indices are summed first, then 2 per product if the step sums, else 1.
    Backward, for each operand that needs a gradient: a step that sums costs one more product of the same extent; one
    that does not costs a product for each element of its result, and as many additions if the operand lacks one of
    its indices. Kept for it: the other operand, if that is no leaf (a leaf summed beforehand is none any more).
    """

    def __init__(self, network: Network, sizes: dict[str, int], needing: set[str]) -> None:
        self.terms = [frozenset(t.indices) for t in network.tensors]
        self.output = frozenset(network.output)
        self.sizes = sizes
        self.needs = [t.name in needing for t in network.tensors]

    def volume(self, indices: frozenset[str]) -> int:
        result = 1
        for i in indices:
            result *= self.sizes[i]
        return result

    def kept(self, group: frozenset[int]) -> frozenset[str]:
        """Indices that the result of contracting `group` has."""
        inside = frozenset().union(*(self.terms[k] for k in group))
        outside = frozenset().union(self.output, *(t for k, t in enumerate(self.terms) if k not in group))
        return inside & outside if len(group) > 1 else inside

    def step(self, left: frozenset[int], right: frozenset[int]) -> tuple[int, int]:
        """(elements saved, FLOPs of forward and backward) of one step."""
        result = self.kept(left | right)
        flops = 0
        sides = []
        for mine, other in ((left, right), (right, left)):
            indices = self.kept(mine)
            reduced = frozenset(i for i in indices if i in result or i in self.kept(other))
            if reduced != indices:
                flops += self.volume(indices)
            sides.append((reduced, any(self.needs[k] for k in mine), len(mine) == 1 and reduced == indices))
        joint = sides[0][0] | sides[1][0]
        sums = joint != result
        flops += (2 if sums else 1) * self.volume(joint)
        saved = 0
        for (indices, needs, _), (partner, _, partner_is_leaf) in (sides, sides[::-1]):
            if needs:
                flops += 2 * self.volume(joint) if sums else (2 if indices != joint else 1) * self.volume(joint)
                saved += 0 if partner_is_leaf else self.volume(partner)
        return saved, flops

    def of_path(self, path: ContractionPath) -> tuple[int, int]:
        groups = [frozenset([k]) for k in range(len(self.terms))]
        saved = flops = 0
        for i, j in path.steps:
            s, f = self.step(groups[i], groups[j])
            saved, flops = saved + s, flops + f
            groups.append(groups[i] | groups[j])
        return saved, flops

    def best(self, order: Callable[[tuple[int, int]], tuple[int, ...]]) -> tuple[int, ...]:
        """The least price over all trees; additive, so the best parts make the best whole."""

        @cache
        def least(group: frozenset[int]) -> tuple[int, ...]:
            if len(group) == 1:
                return order((0, 0))
            _, *rest = sorted(group)
            found = []
            for bits in range(1 << len(rest)):
                right = frozenset(k for n, k in enumerate(rest) if bits >> n & 1)
                if right:
                    left = group - right
                    parts = (least(left), least(right), order(self.step(left, right)))
                    found.append(tuple(map(sum, zip(*parts))))
            return min(found)

        return least(frozenset(range(len(self.terms))))


ORDERS: dict[str, Callable[[tuple[int, int]], tuple[int, ...]]] = {
    "training": lambda price: (price[1],),
    "saved": lambda price: price,
}


@pytest.mark.parametrize("objective", ["training", "saved"])
def test_objectives_reach_the_optimum_of_all_trees(objective: str) -> None:
    """400 random networks of 3 to 6 tensors with random gradients: the plan's price is the best there is."""
    rng = random.Random(13)
    frozen_matters = without_copies = 0
    for trial in range(400):
        network, sizes = random_network(rng, 3 + trial % 4)
        data = [t.name for t in network.tensors if t.role is Role.DATA]
        wanted = [name for name in data if rng.random() < 0.5]
        plan = tnmoe.plan(network, sizes=sizes, objective=objective, input_gradients=wanted)
        needing = {t.name for t in network.tensors if t.role is Role.WEIGHT} | set(wanted)
        oracle = Oracle(network, sizes, needing)
        found = oracle.of_path(plan.paths["result"])
        assert ORDERS[objective](found) == oracle.best(ORDERS[objective]), str(network)
        assert plan.training_flops == found[1]
        copies = any(isinstance(op, Permute) for op in plan.program.ops)  # these are kept in place of what they copy
        assert plan.saved == found[0] or copies
        without_copies += not copies
        frozen_matters += plan.path != tnmoe.plan(network, sizes=sizes).path
    assert frozen_matters > 20
    assert without_copies > 120


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


def test_what_two_steps_keep_is_no_fault() -> None:
    """A bias's slice may be an operand that its product keeps too: the greedy bound counted it once, a plan twice."""
    gate = tnmoe.Gate("sparsemax", "batch")
    plan = tnmoe.plan(tnmoe.MuMoE(2, 9, (2, 3, 1), tnmoe.CP(3), gate=gate), tokens=16, objective="saved")
    assert plan.saved > 0
