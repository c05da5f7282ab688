"""Sparse mixtures against their experts' matrix products alone, and a training step of a million PEER experts.

Run `python benchmarks/routing.py [ROUNDS]`. The first part takes 2.5 GiB; times are medians of interleaved rounds, the
products alone run on the same sorted rows with the same counts. The ratio of CPU seconds hardly depends on what else
the machine does, if there is one thread (`OMP_NUM_THREADS=1`); several wait for each other busily. The second part runs
in a process of its own and prints the most memory that it held, torch itself included.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial

import torch

import tnmoe
from tnmoe.measuring.timer import Timer

EXPERTS, ACTIVE, TOKENS, WIDTH, HIDDEN = 64, 2, 4096, 768, 3072

STEP = """
import resource, torch, tnmoe
spec = tnmoe.PEER(256, 256, 1 << 20, heads=8, active=16, key_width=128, sparse_gradients=True)
module = tnmoe.build(tnmoe.plan(spec, tokens={tokens}), dtype=torch.bfloat16)
parameters = sum(p.numel() * p.element_size() for p in module.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
module(torch.randn({tokens}, 256, dtype=torch.bfloat16)).float().square().mean().backward()
assert all(p.grad is not None for p in module.parameters())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"PEER, {{1 << 20:,}} experts, 256→256, {tokens} tokens, bfloat16, sparse gradients: "
      f"parameters {{parameters / 2**30:.2f}} GiB, peak of the process {{after / 2**20:.2f}} GiB")
"""


def alone(module: torch.nn.Module, x: torch.Tensor, counts: list[int]) -> None:
    """The matrix products of the chosen experts, on rows that are sorted already."""
    for n, rows in enumerate(x.split(counts)):
        hidden = torch.addmm(module.up_bias[n], rows, module.up_weight[n])
        torch.addmm(module.down_bias[n], hidden, module.down_weight[n])


def top_k(rounds: int) -> None:
    """Forward time of the gathered form over that of its products."""
    spec = tnmoe.SparseMoE(WIDTH, WIDTH, EXPERTS, ACTIVE, HIDDEN)
    module = tnmoe.build(tnmoe.plan(spec, tokens=TOKENS))
    x = torch.randn(TOKENS, WIDTH)
    sorted_rows = torch.randn(TOKENS * ACTIVE, WIDTH)
    with torch.no_grad():
        counts = torch.bincount(module.expert_coefficients(x)[1].flatten(), minlength=EXPERTS).tolist()
        times: dict[str, list[float]] = {"layer": [], "products": []}
        busy: dict[str, list[float]] = {"layer": [], "products": []}
        wall, processor = Timer(), Timer(time.process_time)
        for _ in range(rounds + 1):
            for name, run in (("layer", lambda: module(x)), ("products", lambda: alone(module, sorted_rows, counts))):
                seconds, worked = processor.once(partial(wall.passes, run))
                times[name].append(seconds)
                busy[name].append(worked)
    layer, products = (statistics.median(times[name][1:]) for name in times)
    ratio, cpu = (
        statistics.median(a / b for a, b in zip(taken["layer"][1:], taken["products"][1:], strict=True))
        for taken in (times, busy)
    )
    print(
        f"top-{ACTIVE} of {EXPERTS}, {WIDTH}→{HIDDEN}→{WIDTH}, {TOKENS} tokens, {torch.get_num_threads()} threads: "
        f"layer {layer:.3f} s, products alone {products:.3f} s, median ratio {ratio:.3f}, of CPU seconds {cpu:.3f}"
    )


if __name__ == "__main__":
    top_k(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
    subprocess.run([sys.executable, "-c", STEP.format(tokens=64)], check=True)
