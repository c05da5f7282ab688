"""What the stored layout is worth: emitted TR layers against opt_einsum's prepared expression on the same order.

Run: `python benchmarks/layout.py` (needs `pip install "tnmoe[opt_einsum]"`). The layer's network alone, without gate
and bias, float32, one thread; both sides run the very same pairwise order, interleaved, medians of the ratio.
"""

from __future__ import annotations

import os
import platform
import statistics

import opt_einsum
import torch

import tnmoe
from tnmoe.measuring.timer import Timer
from tnmoe.planners import subset_dp

ROUNDS = 25
TOKENS = (1, 8, 64, 512, 4096)


def linear_path(steps: tuple[tuple[int, int], ...], tensors: int) -> list[tuple[int, int]]:
    """An SSA path in opt_einsum's linear form."""
    ids = list(range(tensors))
    linear = []
    for k, (i, j) in enumerate(steps):
        linear.append((ids.index(i), ids.index(j)))
        ids = [x for x in ids if x not in (i, j)] + [tensors + k]
    return linear


def compare(expression: str, weights: str, sizes: dict[str, int], tokens: int) -> tuple[float, float, float]:
    """Median microseconds of ours and of opt_einsum, and the median of their ratio in each round."""
    network = tnmoe.Network.parse(expression, weights=weights)
    sizes = {**sizes, "b": tokens}
    plan = tnmoe.plan(network, sizes=sizes)
    assert plan.path == subset_dp.plan(network, sizes).steps
    module = tnmoe.build(plan)
    arrays = {t.name: torch.randn([sizes[i] for i in t.indices]) for t in network.tensors}
    stored = {p.name: p.indices for p in plan.program.parameters}
    with torch.no_grad():
        for name, order in stored.items():
            canonical = network.tensor(name).indices
            getattr(module, name).copy_(arrays[name].permute([canonical.index(i) for i in order]))
    shapes = [tuple(a.shape) for a in arrays.values()]
    prepared = opt_einsum.contract_expression(
        expression, *shapes, optimize=linear_path(plan.path, len(network.tensors))
    )
    data = [arrays[v.name] for v in plan.layer.inputs]
    with torch.no_grad():
        torch.testing.assert_close(
            module(*data), prepared(*arrays.values()), rtol=1e-2, atol=0.5
        )  # sums of a million terms
        timer, repeats = Timer(), max(1, 200 // tokens)
        pairs = [
            (
                timer.passes(lambda: module(*data), repeats),
                timer.passes(lambda: prepared(*arrays.values()), repeats),
            )
            for _ in range(ROUNDS)
        ]
    ours, theirs = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    return 1e6 * ours, 1e6 * theirs, statistics.median(b / a for a, b in pairs)


def main() -> None:
    """Print a row for each layer and number of tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, one thread, torch {torch.__version__}, "
        f"opt_einsum {opt_einsum.__version__}; medians of {ROUNDS} rounds"
    )
    layers = {
        "GPT-2 TR 768→3072, N 256, r 4 4 149": (
            "bn,anc,bi,cid,doa->bo",
            "anc cid doa",
            {"n": 256, "i": 768, "o": 3072, "a": 4, "c": 4, "d": 149},
        ),
        "GPT-2 CP 768→3072, N 256, R 556": (
            "bn,nr,bi,ir,or->bo",
            "nr ir or",
            {"n": 256, "i": 768, "o": 3072, "r": 556},
        ),
    }
    print(f"{'layer':<38}{'tokens':>7}{'tnmoe µs':>12}{'opt_einsum µs':>15}{'ratio':>8}")
    for name, (expression, weights, sizes) in layers.items():
        for tokens in TOKENS:
            ours, theirs, ratio = compare(expression, weights, sizes, tokens)
            print(f"{name:<38}{tokens:>7}{ours:>12,.0f}{theirs:>15,.0f}{ratio:>7.2f}×")


if __name__ == "__main__":
    main()
