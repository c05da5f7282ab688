"""The inference form: the same outputs from weights that are folded once, exact costs, no gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import blocks, case
from support.layers_strategy import layers
from support.networks import einsum, random_arrays, random_network
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.backends.numpy.execute import execute
from tnmoe.backends.torch.names import attribute
from tnmoe.ir.ops import operands
from tnmoe.ir.value import Role
from tnmoe.lowering.fold_weights import fold_weights

TUCKER = tnmoe.Network.parse("bn,nx,bi,iy,oz,xyt,tz->bo", weights="nx iy oz xyt tz")
SIZES = {"b": 1, "n": 256, "x": 64, "i": 768, "y": 256, "o": 3072, "z": 256, "t": 64}
BLOCK = tnmoe.MuMoEBlock(
    6, 9, 5, 4, tnmoe.Tucker((3, 4, 2)), tnmoe.Gate("entmax15", "batch"), bias=True, input_norm=True
)


def trained(plan: tnmoe.Plan, seed: int = 0) -> nn.Module:
    """A module in float64 whose weights and running statistics are all drawn."""
    torch.manual_seed(seed)
    module = tnmoe.build(plan, freeze=True, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
        for b in module.buffers():
            b.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("block", blocks(80, of=20))
def test_networks_are_what_einsum_says(block: range) -> None:
    """Networks of data, trained and frozen weights: exact in integers, and the FLOPs are what torch counts."""
    folding = 0
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, rng.randint(2, 5), max_size=4)
            plan = tnmoe.plan(network, sizes=sizes)
            arrays = random_arrays(network, sizes, seed)
            module = trained(plan)
            with torch.no_grad():
                for p in plan.program.parameters:
                    order = [network.tensor(p.name).indices.index(i) for i in p.indices]
                    getattr(module, attribute(p.name)).copy_(torch.from_numpy(arrays[p.name].transpose(order)))
            frozen = module.freeze()
            data = [torch.from_numpy(arrays[v.name]) for v in plan.layer.inputs]
            with FlopCounterMode(display=False) as counter:
                got = frozen(*data)
            np.testing.assert_array_equal(got.numpy(), einsum(network, arrays), err_msg=str(network))
            report = tnmoe.cost(plan, inference=True)
            assert report.matmul_flops == counter.get_total_flops()
            assert report.flops <= plan.flops
            assert report.parameters == sum(b.numel() for b in frozen.buffers())
            folding += report.flops < plan.flops
    assert folding > 2, "hardly any network folded anything"


@pytest.mark.slow
@settings(max_examples=15)
@given(spec=layers(), seed=st.integers(0, 99))
def test_layers_give_what_they_gave(spec: tnmoe.MuMoE | tnmoe.MuMoEBlock, seed: int) -> None:
    plan = tnmoe.plan(spec, tokens=3)
    module = trained(plan, seed).eval()
    frozen = module.freeze()
    for shape in ((7,), (1,), (0,), (2, 3), ()):
        x = torch.randn(*shape, int(plan.bound.sizes["i"]), dtype=torch.float64)
        want = module(x).detach()
        scale = float(want.abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(frozen(x), want, rtol=0, atol=1e-12 * max(scale, 1))
        for a, b in zip(frozen.expert_coefficients(x), module.expert_coefficients(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_work_of_hierarchical_tucker() -> None:
    """By hand, one token: o z · z t once, 2·3072·256·64; each call n x, i y, y of x y t, x of x t, and t of t o."""
    plan = tnmoe.plan(TUCKER, sizes=SIZES)
    report = tnmoe.cost(plan, inference=True)
    calls = 2 * (256 * 64 + 768 * 256 + 64 * 256 * 64 + 64 * 64 + 64 * 3072)
    assert report.matmul_flops == report.flops == calls
    assert report.parameters == 256 * 64 + 768 * 256 + 64 * 256 * 64 + 64 * 3072
    assert plan.flops > report.flops
    source = tnmoe.emit(plan, freeze=True)
    assert f"{2 * 3072 * 256 * 64:,} FLOPs once" in source


@pytest.mark.parametrize("block", blocks(100, of=25))
def test_the_pass_parts_a_program(block: range) -> None:
    """What `once` makes and `each` reads, run by NumPy one after the other, is the whole; no op is lost."""
    for seed in block:
        with case(seed) as rng:
            network, sizes = random_network(rng, rng.randint(2, 6), max_size=3)
            program = tnmoe.plan(network, sizes=sizes, objective="inference").bound
            folded = fold_weights(program)
            data = {v.name for v in program.inputs}
            reached = set(data)
            for op in program.ops:
                if any(v.name in reached for v in operands(op)):
                    reached.add(op.out.name)
            assert {op.out.name for op in folded.once}.isdisjoint(reached)
            assert {op.out.name for op in folded.each.ops} <= reached
            assert len(folded.once) + len(folded.each.ops) == len(program.ops)
            assert all(p.role is Role.FROZEN for p in folded.each.parameters)
            arrays = random_arrays(network, sizes, seed)
            order = {v.name: v.indices for v in program.leaves}
            env = {
                t.name: arrays[t.name].transpose([t.indices.index(i) for i in order[t.name]])
                for t in network.leaves
                if t.name in order
            }
            whole = execute(program, env)
            stored = {p.name: whole[p.name] for p in folded.each.parameters}
            each = execute(folded.each, {**{n: env[n] for n in data}, **stored})
            np.testing.assert_array_equal(each[program.output.name], whole[program.output.name])


def test_weights_are_those_of_the_moment() -> None:
    """Later training changes nothing; the trained module loads a state first, and is itself left alone."""
    plan = tnmoe.plan(BLOCK, tokens=1)
    module = trained(plan).eval()
    state = copy.deepcopy(module.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    frozen, want = module.freeze(), module(x).detach()
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            t.add_(1)
    torch.testing.assert_close(frozen(x), want)
    module.load_state_dict(state)
    torch.testing.assert_close(module.freeze()(x), want)
    assert not list(frozen.parameters())
    storages = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert storages.isdisjoint(b.untyped_storage().data_ptr() for b in frozen.buffers())
    again = trained(plan, seed=1).freeze()
    again.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(again(x), want)
    torch.testing.assert_close(copy.deepcopy(frozen)(x), want)


def test_batch_norm_never_looks_at_the_batch() -> None:
    module = trained(tnmoe.plan(BLOCK, tokens=1))
    frozen = module.freeze()
    x = torch.randn(8, 6, dtype=torch.float64)
    whole = frozen.train()(x)
    torch.testing.assert_close(torch.cat([frozen(row[None]) for row in x]), whole)
    torch.testing.assert_close(module.eval()(x).detach(), whole)


def test_there_are_no_gradients() -> None:
    """Whoever wants one hears of it; without gradients, or with plain input, it runs."""
    frozen = trained(tnmoe.plan(BLOCK, tokens=1)).freeze()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="detach the input, or use the trained module"):
        frozen(x)
    with torch.no_grad():
        assert not frozen(x).requires_grad
    assert not frozen(x.detach()).requires_grad
    network = trained(tnmoe.plan(TUCKER, sizes=dict.fromkeys(SIZES, 2))).freeze()
    a, b = (torch.randn(2, 2, dtype=torch.float64) for _ in range(2))
    with pytest.raises(RuntimeError, match="no gradients"):
        network(a, b.requires_grad_())


def test_compiles_once_and_exports() -> None:
    frozen = trained(tnmoe.plan(BLOCK, tokens=1)).freeze()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(frozen, fullgraph=True, dynamic=True, backend=counter)
    example = torch.randn(7, 6, dtype=torch.float64)
    exported = torch.export.export(frozen, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()

    def close(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    for batch in (2, 3, 8, 5):
        x = torch.randn(batch, 6, dtype=torch.float64)
        close(compiled(x), frozen(x))
        close(exported(x), frozen(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_form_is_asked_for() -> None:
    plan = tnmoe.plan(BLOCK, tokens=1)
    assert "freeze" not in tnmoe.emit(plan)
    assert not hasattr(tnmoe.build(plan), "freeze")
    assert tnmoe.build(plan, freeze=True, name="Mine").freeze().__class__.__name__ == "FrozenMine"
    with pytest.raises(tnmoe.EmitError, match="FrozenA"):
        tnmoe.emit([plan, plan], name=["A", "FrozenA"], freeze=True)
