"""Gradients, inputs and weights of any strides: values of a contiguous one, and nothing that oneDNN takes slowly."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.gradients import draw, pair
from support.modules import SPECS
from support.strides import STRIDES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tnmoe

TOKENS = 16

WAYS: dict[str, dict[str, Any]] = {
    "portable": {},
    "save": {"memory": "save"},
    "recompute": {"memory": "recompute"},
    "chunks": {"memory": "save", "chunk": 5},
    "fast": {"flavour": "fast"},
    "fast_recompute": {"flavour": "fast", "memory": "recompute"},
    "fast_chunks": {"flavour": "fast", "chunk": 5},
    "triton": {"flavour": "triton", "memory": "save"},
    "triton_chunks": {"flavour": "triton", "chunk": 5},
}

BLOCKS = {
    "cp": tnmoe.MuMoEBlock(9, 12, 7, 5, tnmoe.CP(6), tnmoe.Gate("entmax15", "layer"), input_norm=True),
    "no_norm": tnmoe.MuMoE(9, 7, 5, tnmoe.CP(6), tnmoe.Gate("softmax", "none")),
    "tr": SPECS["tr_block"],
    "batch_norm": SPECS["tr_batch_norm"],
    "monarch": SPECS["monarch"],
    "mlp": SPECS["mlp"],
    "linear": tnmoe.FactorizedLinear(12, 14, tnmoe.LowRank(3)),
}

every_way = pytest.mark.parametrize("way", WAYS)

every_stride = pytest.mark.parametrize("stride", STRIDES)


class Operands(TorchDispatchMode):
    """What reaches oneDNN's product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append(args[:3])
        return func(*args, **(kwargs or {}))

    def check(self, some: bool) -> None:
        """All of them, of which there are some, are matrices as they were made, and biases vectors."""
        assert bool(self.seen) == some
        for x, weight, bias in self.seen:
            for t in (x, weight):
                assert t.is_contiguous() or t.mT.is_contiguous(), (t.shape, t.stride())
                assert all(n == 1 or stride for n, stride in zip(t.shape, t.stride(), strict=True))
            assert bias is None or bias.is_contiguous()


@pytest.fixture
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    """Lets a module of the flavour `fast` call oneDNN's product whatever the processor."""

    def done(module: nn.Module) -> None:
        space = vars(sys.modules[type(module).__module__])
        if "_onednn" in space:
            monkeypatch.setitem(space, "_onednn", torch.ops.mkldnn._linear_pointwise)

    return done


def compare(plain: nn.Module, module: nn.Module, x: Tensor, grad: Callable[[Tensor], Tensor], *, onednn: bool) -> None:
    """Outputs and gradients against autograd's in float64; and what reaches oneDNN, which is something or nothing."""
    results = []
    for m, given in ((plain, x.double()), (module, x)):
        given.requires_grad_()
        with Operands() as operands:
            y = m(given)
            found = torch.autograd.grad(y, [given, *m.parameters()], grad(y))
        results.append((y.detach(), *found))
        operands.check(some=onednn and m is module)
    for want, got in zip(*results, strict=True):
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * scale)


@cache
def made(block: str, way: str) -> tuple[nn.Module, nn.Module]:
    """The portable module in float64 and the planned one in float32, with weights that both know exactly."""
    plan = tnmoe.plan(BLOCKS[block], tokens=TOKENS, input_gradients=True, **WAYS[way])
    plain, _ = pair(plan)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_((0.5 * p).float())
    module = tnmoe.build(plan)
    module.load_state_dict(plain.state_dict())
    return plain, module


@pytest.mark.slow
@every_way
@pytest.mark.parametrize("block", BLOCKS)
@every_stride
def test_gradients_of_any_strides(block, way, stride, with_onednn):
    plain, module = made(block, way)
    with_onednn(module)
    spec = BLOCKS[block]
    seed = STRIDES[stride](TOKENS, spec.outputs)
    x = draw(*seed.shape[:-1], spec.inputs, dtype=torch.float32, grad=False)
    compare(plain, module, x, lambda y: seed.to(y.dtype), onednn="fast" in way)


@pytest.mark.slow
@every_way
@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "batch_norm"])  # equal rows have no variance
@every_stride
def test_inputs_of_any_strides(block, way, stride, with_onednn):
    plain, module = made(block, way)
    with_onednn(module)
    x = STRIDES[stride](TOKENS, BLOCKS[block].inputs)
    compare(plain, module, x, lambda y: torch.linspace(-1, 1, y.numel()).to(y).view_as(y), onednn="fast" in way)


@every_way
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.mean(0).sum()], ids=["sum", "pooled"])
def test_no_token_and_one(way, tokens, loss, with_onednn):
    """Losses whose gradients are expanded, as they come; a single row is multiplied by torch."""
    plain, module = made("cp", way)
    with_onednn(module)
    found = []
    for m, dtype in ((plain, torch.float64), (module, torch.float32)):
        x = draw(tokens, 9, dtype=torch.float32, grad=False).to(dtype).requires_grad_()
        with Operands() as operands:
            found.append(torch.autograd.grad(loss(m(x)), [x, *m.parameters()]))
        operands.check(some=False)
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4, equal_nan=True)


@every_way
@pytest.mark.parametrize("stride", ["transposed", "sliced", "sliced_transposed", "second_rows", "second_columns"])
def test_weights_of_any_strides(way, stride, with_onednn):
    """Parameters that are views of others: matrices, and biases, whose strides oneDNN's product does not read."""
    plain, module = (copy.deepcopy(m) for m in made("cp", way))
    with_onednn(module)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), module.parameters(), strict=True):
            q.data = STRIDES[stride](*q.shape) if q.ndim == 2 else STRIDES[stride](1, len(q))[0]
            p.copy_(q)
    x = draw(TOKENS, 9, dtype=torch.float32, grad=False)
    compare(plain, module, x, lambda y: y.new_ones(()).expand(y.shape), onednn="fast" in way)
