"""What every family of layers is held to, given an independent straight-line implementation in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.backends.numpy.execute import execute

TOLERANCE = 1e-12

Weights = Mapping[str, Tensor]
Oracle = Callable[[Tensor, Weights], Tensor]


def built(spec: tnmoe.Spec, tokens: int, seed: int = 0) -> tuple[tnmoe.Plan, nn.Module]:
    """A plan, and its module in float64 with weights of variance 1 / fan-in."""
    plan = tnmoe.plan(spec, tokens=tokens)
    module = tnmoe.build(plan, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(1, p.shape[0]) ** 0.5)
    return plan, module


def rows(plan: tnmoe.Plan, tokens: int, seed: int = 1) -> Tensor:
    """Standard normal input."""
    width = int(plan.bound.sizes[plan.layer.inputs[0].indices[-1]])
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def canonical(plan: tnmoe.Plan, module: nn.Module) -> dict[str, Tensor]:
    """Views of the parameters with axes in the order of the declaration, by name."""
    stored = dict(module.named_parameters())
    layout = {p.name: p.indices for p in plan.program.parameters}
    return {p.name: stored[p.name].permute([layout[p.name].index(i) for i in p.indices]) for p in plan.layer.parameters}


def assert_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Equal to 1e-12 of the largest entry (of at least one)."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel():
        got, want = got.detach(), want.detach()
        error = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
        assert error <= TOLERANCE, f"{what}: error {error:.1e}"


def check_compiled(spec: tnmoe.Spec) -> None:
    """One graph gives what the module gives, for several numbers of tokens."""
    plan, module = built(spec, 12)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (12, 6):
        x = rows(plan, count)
        assert_equal(compiled(x), module(x), f"compiled, {count} tokens")


def check_family(
    spec: tnmoe.Spec, oracle: Oracle, tokens: int = 12, seed: int = 0, apart: tuple[str, ...] = ()
) -> tnmoe.CostReport:
    """Values and gradients against `oracle`, NumPy against both, parameters and FLOPs against torch's counts.

    Matmul FLOPs of the backward pass are compared as well. No gradient reaches the parameters `apart`, which then are
    trained by another loss that the figures of training include. Returns the cost report.
    """
    plan, module = built(spec, tokens, seed)
    report = tnmoe.cost(plan)
    x = rows(plan, tokens).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert report.matmul_flops == counter.get_total_flops()
    assert report.parameters == sum(p.numel() for p in module.parameters())

    weights = canonical(plan, module)
    want = oracle(x, weights)
    assert_equal(y, want, "output")
    env = {plan.layer.inputs[0].name: x.detach().numpy()}
    env |= {name: p.detach().numpy() for name, p in module.named_parameters()}
    values = execute(plan.bound, env)
    assert_equal(torch.from_numpy(np.asarray(values[plan.program.output.name])), want.detach(), "NumPy")

    cotangent = rows(plan, tokens, seed + 2)[:, :1] * torch.arange(1.0, want.shape[1] + 1, dtype=torch.float64)
    leaves = {"x": x} | {n: p for n, p in module.named_parameters() if p.requires_grad and n not in apart}
    with FlopCounterMode(display=False) as counter:
        module(x).backward(cotangent)
    assert apart or report.training_matmul_flops == counter.get_total_flops()
    assert all(p.grad is None for n, p in module.named_parameters() if n in apart)
    expected = torch.autograd.grad(want, leaves.values(), cotangent)
    for (name, leaf), e in zip(leaves.items(), expected, strict=True):
        g = leaf.grad
        assert g is not None, f"{name} got no gradient"
        assert_equal(g.to_dense(), e, f"gradient of {name}")
    return report


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that one forward pass keeps for the backward pass, besides parameters and input."""
    skip = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(seen.values())


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), written out."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def mlp(x: Tensor, w: Weights, n: int | None = None, prefix: str = "") -> Tensor:
    """One expert (or the only one), with or without biases, of one or two layers."""

    def affine(z: Tensor, name: str) -> Tensor:
        weight = w[f"{prefix}{name}weight"]
        bias = w.get(f"{prefix}{name}bias")
        if n is not None:
            weight, bias = weight[n], None if bias is None else bias[n]
        z = z @ weight
        return z if bias is None else z + bias

    if f"{prefix}up_weight" not in w:
        return affine(x, "")
    return affine(gelu(affine(x, "up_")), "down_")


def softmax(z: Tensor, axis: int = -1) -> Tensor:
    """exp(z) over its sum."""
    e = torch.exp(z - z.amax(axis, keepdim=True).detach())
    return e / e.sum(axis, keepdim=True)
