"""Time of a backward pass whose incoming gradient is expanded, turned or sliced, over one that is contiguous.

Run: `python benchmarks/strides.py`. Losses hand back gradients of any strides: sums and means expand one number over
all, mean pooling one row over the tokens, a loss on part of a concatenation a slice. Emitted modules copy such a
gradient once, because a matrix library may take it by a far slower path, so a backward pass should take hardly longer
with any of them. The second table does the same for inputs of any strides, over forward and backward. Each row is a way
to emit the layer, each figure the median of ratios within rounds, all run interleaved in random order.

About five minutes on two cores. `--onednn` lets the flavour `fast` call oneDNN's products whatever the processor, which
else it does only where they pay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from timing import interleaved, machine
from torch import Tensor, nn

import tnmoe
from tnmoe.presets.registry import PRESETS

WAYS = {
    "portable": {},
    "portable, save": {"memory": "save"},
    "portable, recompute": {"memory": "recompute"},
    "portable, chunks": {"memory": "save", "chunk": 512},
    "fast": {"flavour": "fast"},
    "fast, chunks": {"flavour": "fast", "chunk": 512},
}
STRIDES: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": torch.randn,
    "one number": lambda t, n: torch.randn(1, 1).expand(t, n),
    "one row": lambda t, n: torch.randn(1, n).expand(t, n),
    "one column": lambda t, n: torch.randn(t, 1).expand(t, n),
    "transposed": lambda t, n: torch.randn(n, t).mT,
    "sliced": lambda t, n: torch.randn(t, n + 64)[:, 64:],
    "2nd rows": lambda t, n: torch.randn(2 * t, n)[::2],
    "2nd columns": lambda t, n: torch.randn(t, 2 * n)[:, ::2],
    "images": lambda t, n: torch.randn(4, n, 16, t // 64).permute(0, 2, 3, 1),
}
"""Tensors of t × n numbers; the last has channels first, and four axes."""


def backward(y: Tensor, leaves: list[Tensor], grad: Tensor) -> None:
    """All gradients, once more."""
    torch.autograd.grad(y, leaves, grad.view_as(y) if grad.ndim == y.ndim else grad.reshape(y.shape), retain_graph=True)


def training(module: nn.Module, leaves: list[Tensor], grad: Tensor, x: Tensor) -> None:
    """A forward and a backward pass."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(module(x), [x, *leaves], grad.view(*x.shape[:-1], -1))


def table(title: str, runs: dict[str, dict[str, Callable[[], object]]], rounds: int) -> None:
    """A row for each way: time with contiguous tensors, and ratios over it."""
    print(f"\n{title}\n  {'':22}{'ms':>8}" + "".join(f"{name:>13}" for name in STRIDES if name != "contiguous"))
    for row, cases in runs.items():
        times = interleaved(cases, rounds)
        text = f"  {row:22}{1e3 * times.of('contiguous').median:8.1f}"
        print(text + "".join(f"{times.speed('contiguous', n).median:13.2f}" for n in cases if n != "contiguous"))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-cp", choices=[n for n, p in PRESETS.items()])
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 64 (default: 2048)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--onednn", action="store_true", help="call oneDNN's products on any processor")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(machine(given.threads, "wall"))
    if given.onednn:  # modules look when they are imported
        torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
    spec, tokens = PRESETS[given.preset].spec, given.tokens
    grads = {name: make(tokens, spec.outputs) for name, make in STRIDES.items()}
    inputs = {name: make(tokens, spec.inputs) for name, make in STRIDES.items()}
    after: dict[str, dict[str, Callable[[], object]]] = {}
    both: dict[str, dict[str, Callable[[], object]]] = {}
    for row, way in WAYS.items():
        module = tnmoe.build(tnmoe.plan(spec, tokens=tokens, input_gradients=True, **way))
        weights = list(module.parameters())
        x = torch.randn(tokens, spec.inputs, requires_grad=True)
        y = {2: module(x), 4: module(x.view(4, 16, -1, spec.inputs))}
        after[row] = {name: partial(backward, y[g.ndim], [x, *weights], g) for name, g in grads.items()}
        both[row] = {name: partial(training, module, weights, grads["contiguous"], z) for name, z in inputs.items()}
    title = f"{given.preset}, {tokens:,} tokens"
    table(f"{title}: backward, gradient of these strides over a contiguous one", after, given.rounds)
    table(f"{title}: forward and backward, input of these strides over a contiguous one", both, given.rounds)


if __name__ == "__main__":
    main()
