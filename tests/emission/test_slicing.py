"""Slices add up to the whole, no array exceeds the limit, and the overhead is what is executed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import opt_einsum
import pytest
import torch
from support.large_network import large_network
from support.networks import einsum, random_arrays, random_folded_network, random_network
from support.trees import Oracle

import tnmoe
from tnmoe import Network, PlanError
from tnmoe.backends.numpy import slices
from tnmoe.planners import search as planner


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all arrays that NumPy writes while it executes slices."""
    sizes: list[int] = []
    execute = slices.numpy.execute

    def watched(program: Any, env: Any) -> Any:
        values = execute(program, env)
        sizes.extend(v.size for name, v in values.items() if name not in env)
        return values

    monkeypatch.setattr(slices.numpy, "execute", watched)
    return sizes


def built(sliced: tnmoe.Sliced) -> torch.nn.Module:
    space: dict[str, Any] = {}
    exec(sliced.emit("Whole"), space)
    return space["Whole"]()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_slices_of_random_networks(seed: int, written: list[int]) -> None:
    rng = random.Random(seed)
    network, sizes = random_network(rng, rng.randint(1, 6), max_size=4)
    arrays = random_arrays(network, sizes, seed)
    expected = einsum(network, arrays)
    whole = tnmoe.plan(network, sizes=sizes)
    for limit in sorted({expected.size, 2 * expected.size, expected.size + rng.randint(1, 50), 10**6}):
        sliced = tnmoe.plan_sliced(network, sizes=sizes, largest=limit)
        written.clear()
        np.testing.assert_array_equal(sliced.contract(arrays), expected)
        assert max(written) <= sliced.largest <= limit
        given = [torch.tensor(arrays[t.name]) for t in network.tensors]
        np.testing.assert_array_equal(built(sliced)(*given).numpy(), expected)
        rest = Network.parse(sliced.part.layer.contractions[0].network.expression)
        flops, macs = Oracle(rest, dict(sizes)).path(sliced.part.path)
        count = len(written) // len(sliced.part.bound.ops)
        kept = [i for i in sliced.indices if i in network.output]
        added = count // int(np.prod([sizes[i] for i in kept], dtype=int)) - 1
        assert (sliced.slices, sliced.macs) == (count, count * macs)
        assert sliced.flops == count * flops + added * expected.size
        assert sliced.overhead * whole.flops == sliced.flops or whole.flops == 0
        if not sliced.indices:
            assert sliced.overhead == 1


LARGE = [(16, 0, 8, "macs"), (30, 1, 16, "flops"), (36, 2, 4, "flops")]


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "seed", "share", "objective"), LARGE)
def test_large_networks_within_a_limit(
    tensors: int, seed: int, share: int, objective: str, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "_UNITS", 20_000)
    network, sizes = large_network(tensors, seed, most=2)
    free = tnmoe.plan_sliced(network, sizes=sizes, largest=10**12, objective=objective)
    assert not free.indices
    limit = max(free.largest // share, 4)
    sliced = tnmoe.plan_sliced(network, sizes=sizes, largest=limit, objective=objective)
    assert sliced.indices
    rng = np.random.default_rng(seed)
    arrays = {t.name: rng.choice([-1.0, 0.0, 1.0], [sizes[i] for i in t.indices]) for t in network.tensors}
    number = {i: k for k, i in enumerate(network.indices)}
    operands = [x for t in network.tensors for x in (arrays[t.name], [number[i] for i in t.indices])]
    expected = opt_einsum.contract(*operands, [number[i] for i in network.output], optimize="greedy")
    np.testing.assert_array_equal(sliced.contract(arrays), expected)
    assert max(written) <= limit
    assert sliced.overhead > 0


def test_gradients_go_through_the_loop() -> None:
    network = Network.parse("abc,cde,efa,bdf->bf")
    sizes = {"a": 3, "b": 2, "c": 4, "d": 3, "e": 2, "f": 2}
    sliced = tnmoe.plan_sliced(network, sizes=sizes, largest=6)
    assert sliced.slices > 1
    given = [
        torch.randn([sizes[i] for i in t.indices], dtype=torch.float64, requires_grad=True) for t in network.tensors
    ]
    module = built(sliced)
    assert torch.autograd.gradcheck(module, given)
    expected = torch.einsum("abc,cde,efa,bdf->bf", *given)
    torch.testing.assert_close(module(*given), expected)


def test_what_is_printed() -> None:
    """By hand: matrices of 8 × 8, 8 × 8 and 8 × 2: an 8 × 2 array comes first, and the result is as large."""
    network = Network.parse("ab,bc,cd->ad")
    sizes = {"a": 8, "b": 8, "c": 8, "d": 2}
    assert "No slices: the largest array has 16 elements of 16 allowed." in str(
        tnmoe.plan_sliced(network, sizes=sizes, largest=16)
    )
    ring = Network.parse("ab,bc,ca->")  # the product of two is 10 × 10; sliced at b or c 10 × 1
    sliced = tnmoe.plan_sliced(ring, sizes=dict.fromkeys("abc", 10), largest=10)
    text = str(sliced)
    assert sliced.slices == 10
    assert "10 slices over" in text
    assert "no array has more than 10 elements" in text
    assert sliced.macs == 10 * (100 + 10)
    assert sliced.added == 9


def test_a_limit_that_cannot_be_met_names_the_smallest() -> None:
    network = Network.parse("ab,bc->ac")
    sizes = {"a": 3, "b": 50, "c": 7}
    for limit in (20, 0, -1, 21.0, True, None):
        with pytest.raises(PlanError, match="at least 21, the number of elements of the result"):
            tnmoe.plan_sliced(network, sizes=sizes, largest=limit)  # type: ignore[arg-type]
    assert tnmoe.plan_sliced(network, sizes=sizes, largest=21).largest == 21


def test_what_cannot_be_sliced_is_refused() -> None:
    network, sizes = random_folded_network(random.Random(0), 4)
    with pytest.raises(PlanError, match="folded bias"):
        tnmoe.plan_sliced(network, sizes=sizes, largest=10**6)
    with pytest.raises(PlanError, match="'flops' or 'macs'"):
        tnmoe.plan_sliced(Network.parse("ab->a"), sizes={"a": 2, "b": 2}, largest=5, objective="training")


def test_arrays_must_fit() -> None:
    sliced = tnmoe.plan_sliced(Network.parse("ab,bc->ac"), sizes={"a": 2, "b": 3, "c": 2}, largest=4)
    for arrays in ({"ab": np.ones((2, 3))}, {"ab": np.ones((2, 3)), "bc": np.ones((2, 3))}):
        with pytest.raises(tnmoe.DeclarationError, match=r"'bc' must be an array of shape \(3, 2\)"):
            sliced.contract(arrays)


def test_names_that_the_loop_uses_itself() -> None:
    tensors = (tnmoe.Tensor("total", ("a", "b")), tnmoe.Tensor("at_b", ("b", "c")), tnmoe.Tensor("part", ("c", "a")))
    network = Network(tensors, ())
    sizes = {"a": 4, "b": 4, "c": 4}
    sliced = tnmoe.plan_sliced(network, sizes=sizes, largest=4)
    arrays = random_arrays(network, sizes, 0)
    given = [torch.tensor(arrays[t.name]) for t in tensors]
    assert built(sliced)(*given).item() == einsum(network, arrays)
