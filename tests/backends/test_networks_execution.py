"""Any einsum: emitted torch and NumPy execution against `numpy.einsum` over the whole network.

Entries are small integers, so that no order of contraction rounds: results are compared for equality.
"""

import keyword

import numpy as np
import pytest
import torch
from support.cases import blocks, case
from support.layers_strategy import any_order
from support.networks import Arrays, Sizes, einsum, random_arrays, random_folded_network, random_network

import tnmoe
from tnmoe import Network, Role, Tensor
from tnmoe.backends.numpy.execute import execute
from tnmoe.backends.torch.names import attribute
from tnmoe.ir.layer import network_layer


def check_numpy(plan: tnmoe.Plan, network: Network, arrays: Arrays) -> None:
    """The bound and the symbolic program, executed, give the einsum with axes in the asked order."""
    want = einsum(network, arrays)
    for program in (plan.bound, plan.program):
        env = dict(arrays)
        for p in program.parameters:
            canonical = network.tensor(p.name).indices
            env[p.name] = arrays[p.name].transpose([canonical.index(i) for i in p.indices])
        values = execute(program, env)
        assert program.output.indices == network.output
        np.testing.assert_array_equal(values[program.output.name], want, strict=True)


def check_torch(plan: tnmoe.Plan, network: Network, arrays: Arrays, seed: int) -> None:
    """The emitted module gives the einsum, leaves its inputs alone and trains its weights, and those only."""
    module = tnmoe.build(plan, dtype=torch.float64)
    roles = {t.name: t.role for t in network.leaves}
    stored = {p.name: p.indices for p in plan.program.parameters}
    assert set(stored) == {name for name, role in roles.items() if role is not Role.DATA}
    for name, order in stored.items():
        canonical = network.tensor(name).indices
        parameter = getattr(module, attribute(name))
        assert parameter.requires_grad == (roles[name] is Role.WEIGHT)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(arrays[name]).permute([canonical.index(i) for i in order]))
    data = [torch.from_numpy(arrays[t.name]) for t in network.tensors if t.role is Role.DATA]
    before = [d.clone() for d in data]
    got = module(*data)
    np.testing.assert_array_equal(got.detach().numpy(), einsum(network, arrays), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True)), "an input was changed in place"

    trained = [name for name, role in roles.items() if role is Role.WEIGHT]
    if trained:
        cotangent = np.random.default_rng(seed).integers(-3, 4, got.shape).astype(np.float64)
        got.backward(torch.from_numpy(cotangent))
    for name in trained:
        # The result is affine in each weight w: its gradient along any change d is what d adds to the result.
        change = random_arrays(network, plan.bound.sizes, seed + 1)[name]
        along = einsum(network, arrays | {name: arrays[name] + change}) - einsum(network, arrays)
        gradient = getattr(module, attribute(name)).grad.numpy()
        canonical = network.tensor(name).indices
        moved = change.transpose([canonical.index(i) for i in stored[name]])
        assert (gradient * moved).sum() == (along * cotangent).sum(), f"gradient of {name}"


def check(network: Network, sizes: Sizes, seed: int = 0) -> None:
    """NumPy and torch, in the best order, in a greedy one, or in any."""
    layer = network_layer(network, sizes)
    plan = tnmoe.plan(layer, planner="greedy" if seed % 3 == 1 else "auto")
    plan = any_order(plan, seed) if seed % 3 == 2 else plan
    arrays = random_arrays(network, sizes, seed)
    check_numpy(plan, network, arrays)
    check_torch(plan, network, arrays, seed)


@pytest.mark.parametrize("block", blocks(300, of=30, quick=1))
def test_random_networks(block):
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, rng.randint(1, 6), max_size=3)
            check(network, sizes, seed)


@pytest.mark.parametrize("block", blocks(150, of=30, quick=1))
def test_random_networks_with_a_folded_bias(block):
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_folded_network(rng, rng.randint(2, 6), max_size=3)
            check(network, sizes, seed)


EXPRESSIONS = {
    "matrix product": ("bi,io->bo", "io"),
    "transposed output": ("bi,io->ob", "io"),
    "odd order": ("abc,cd,de->ebad", "cd de"),
    "hyperedge": ("br,ir,or,i->bo", "ir or"),
    "hyperedge in the output": ("ar,br,cr->rab", "br"),
    "batch index": ("bij,bjk->bik", ""),
    "two batch indices": ("abij,bajk->kabi", ""),
    "outer product": ("a,b,c->cab", "b"),
    "scalar result": ("ab,ab->", "ab_2"),
    "scalar factor": (",ab,b->a", "scalar b"),
    "scalars alone": (",,->", "scalar"),
    "summed alone": ("abc,d->a", "d"),
    "a single tensor": ("abc->cab", ""),
    "a single tensor, summed": ("abc->b", ""),
    "a single tensor, as it is": ("abc->abc", ""),
    "a single weight": ("ab->ba", "ab"),
    "a single frozen weight": ("ab->a", ""),
    "weights alone": ("ab,bc->ca", "ab bc"),
    "ring": ("ab,bc,cd,da->", "bc"),
    "the same term twice": ("ab,ab,ab->ba", "ab_2"),
    "expert mixture": ("bn,nr,bi,ir,ro->bo", "nr ir ro"),
}


@pytest.mark.parametrize(("expression", "weights"), EXPRESSIONS.values(), ids=EXPRESSIONS)
@pytest.mark.parametrize("seed", range(3))
def test_named_shapes_of_networks(expression, weights, seed):
    network = Network.parse(expression, weights=weights, frozen="ab" if expression == "ab->a" else "")
    check(network, {i: 2 + k % 3 for k, i in enumerate(network.indices)}, seed)
    check(network, dict.fromkeys(network.indices, 1), seed)


# Terms become argument and attribute names of the emitted class. These are words that Python, nn.Module or the
# emitted file itself uses; each is tried as data, as a weight and as a frozen weight.
WORDS = [
    *(w for w in (*keyword.kwlist, *keyword.softkwlist) if w.isalpha() and len(set(w)) == len(w)),
    *(w for w in dir(torch.nn.Module) if w.isalpha() and len(set(w)) == len(w)),
    *("F", "nn", "self", "torch", "Tensor", "lead", "x", "y", "t", "math", "super", "float", "list", "sum", "print"),
]


@pytest.mark.parametrize("word", sorted({w for w in WORDS if len(set(w)) == len(w)}))
def test_words_that_mean_something_else(word):
    expression = f"{word},{word[0]}z->z{word[-1] if len(word) > 1 else ''}"
    sizes = dict.fromkeys(word, 2) | {"z": 3}
    for weights, frozen in (("", ""), (word, ""), ("", word)):
        check(Network.parse(expression, weights=weights, frozen=frozen), sizes)


def check_names(network: Network, sizes: Sizes) -> None:
    """Right, or refused as a declaration; never wrong, and never an error that says the package is broken."""
    try:
        plan = tnmoe.plan(network, sizes=sizes)
        tnmoe.emit(plan)
    except (tnmoe.DeclarationError, tnmoe.EmitError):
        return
    check(network, sizes)


@pytest.mark.parametrize(
    ("first", "second"), [("F", "F_"), ("half", "half_"), ("match", "match_"), ("lead", "lead_"), ("result_0", "b")]
)
@pytest.mark.parametrize("role", [Role.DATA, Role.WEIGHT])
def test_renamed_values_do_not_collide(first, second, role):
    """A name that is made safe by an underscore may not meet a value that has that name already."""
    tensors = (Tensor("x", ("a", "b")), Tensor(first, ("b", "c"), role), Tensor(second, ("c", "d"), role))
    check_names(Network(tensors, ("a", "d")), {"a": 2, "b": 3, "c": 4, "d": 2})


def test_names_of_sizes_do_not_collide():
    """Where free axes are merged, the emitted code reads `size_b` off the data."""
    tensors = (Tensor("x", ("a", "b", "i")), Tensor("size_b", ("c", "d", "i")))
    check_names(Network(tensors, ("a", "b", "c", "d")), {"a": 2, "b": 3, "c": 4, "d": 2, "i": 3})


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules", "_rows", "_coefficients", "_forward_hooks"])
@pytest.mark.parametrize("role", [Role.DATA, Role.WEIGHT])
def test_private_attributes_of_modules_are_not_overwritten(name, role):
    """A weight called `_parameters` would replace the module's own dictionary, so no such name is taken."""
    with pytest.raises(tnmoe.DeclarationError, match="underscore"):
        Tensor(name, ("b", "c"), role)


@pytest.mark.parametrize("rows", [0, 1, 2, 50])
def test_a_network_takes_any_batch(rows):
    """Sizes that no weight has are read off the data, whatever the plan assumed."""
    network = Network.parse("bij,jr,ir,ro->boi", weights="jr ir ro")
    plan = tnmoe.plan(network, sizes={"b": 4, "i": 3, "j": 2, "r": 5, "o": 4})
    module = tnmoe.build(plan, dtype=torch.float64)
    x = torch.randn(rows, 3, 2, dtype=torch.float64)
    weights = {}
    for p in plan.program.parameters:
        canonical = network.tensor(p.name).indices
        weights[p.name] = getattr(module, p.name).detach().permute([p.indices.index(i) for i in canonical])
    want = torch.einsum("bij,jr,ir,ro->boi", x, weights["jr"], weights["ir"], weights["ro"])
    torch.testing.assert_close(module(x), want, rtol=0, atol=1e-12)


def test_outputs_that_no_weight_sizes():
    """Two free axes that are merged for a matrix product come apart again at sizes of the data."""
    network = Network.parse("abi,cdi->dacb")
    module = tnmoe.build(tnmoe.plan(network, sizes={"a": 2, "b": 3, "c": 4, "d": 5, "i": 2}))
    for a, b, c, d, i in ((3, 2, 5, 4, 6), (1, 1, 1, 1, 1), (2, 7, 1, 3, 4)):
        first, second = torch.randn(a, b, i), torch.randn(c, d, i)
        torch.testing.assert_close(module(first, second), torch.einsum("abi,cdi->dacb", first, second))
