"""Emitted blocks against the reference's op order, its fastest setting, and an MLP of the same shape.

Run: `python benchmarks/blocks.py` (needs `pip install "tnmoe[test]"`: the baseline is `tests/reference_module.py`, with
its column of ones, its three-operand einsums and entmax from the package). float32; all candidates of a table have the
same weights, agree with each other, and run interleaved in random order in one process; each row gives the median and
quartiles of its time, and the median over the rounds of reference time / its time. `ref+flag` and `mlp+flag` run with
`torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, which sends their products to oneDNN and which tnmoe never sets.
The bound is that of all matmul FLOPs at the best rate that a product of 2048×2048 matrices reached in the same rounds.

On a machine that others use as well, `--clock cpu --threads 1` compares processor time, without what was waited.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import opt_einsum
import torch
from torch import Tensor, nn

import tnmoe
from tnmoe.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference_module import CPFactors, ReferenceMuMoE, TensorRingFactors

CASES = (
    ("gpt2-cp", 4096),
    ("gpt2-tr", 4096),
    ("mixer-channel-cp", 4096),
    ("clip-128-cp", 256),
    ("gpt2-tr", 1),
    ("gpt2-cp", 1),
)
CHUNK = 512


@dataclass
class Candidate:
    """A module, how it is run, and the setting it runs under."""

    module: nn.Module
    flag: bool = False

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """Without gradients."""
        with torch.no_grad(), onednn_flag(self.flag):
            result: Tensor = self.module(x)
            return result

    def training(self, x: Tensor, grad: Tensor) -> Tensor:
        """Forward and backward, with the gradient of the input and of every weight."""
        x.grad = None
        for p in self.module.parameters():
            p.grad = None
        with onednn_flag(self.flag):
            result: Tensor = self.module(x)
            result.backward(grad.view_as(result))
        return result.detach()


@contextlib.contextmanager
def onednn_flag(on: bool) -> Iterator[None]:
    """The user's opt-in to reduced precision for float32 products, which on many CPUs is oneDNN's float32."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if on else before
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def reference(spec: tnmoe.MuMoE | tnmoe.MuMoEBlock) -> ReferenceMuMoE:
    """The layer in the reference's op order, with gates that choose."""
    cp = isinstance(spec.factorization, tnmoe.CP)
    block = isinstance(spec, tnmoe.MuMoEBlock)
    module = ReferenceMuMoE(
        CPFactors if cp else TensorRingFactors,
        spec.inputs,
        spec.hidden if block else spec.outputs,
        spec.levels,
        spec.factorization.rank if cp else spec.factorization.ranks,
        second=spec.outputs if block else 0,
        norm="ln" if spec.gate.norm == "layer" else "bn",
        apply_ln=spec.input_norm,
    )
    for projection in module.projs:
        nn.init.normal_(projection, 0, 0.1)
    return module


def candidates(name: str, tokens: int, compiled: bool) -> dict[str, Candidate]:
    """What is compared, by row."""
    spec = PRESETS[name].spec
    baseline = reference(spec)
    found = {"reference": Candidate(baseline), "ref+flag": Candidate(baseline, True)}
    if compiled:
        found["compiled reference"] = Candidate(torch.compile(baseline))
    chunk = CHUNK if tokens > CHUNK else None
    for row, way in {
        "portable": {},
        "portable, chunks": {"memory": "save", "chunk": chunk},
        "fast": {"flavour": "fast"},
        "fast, chunks": {"flavour": "fast", "chunk": chunk},
        "fast, recompute": {"flavour": "fast", "memory": "recompute", "chunk": chunk},
    }.items():
        if "chunks" in row and chunk is None:
            continue
        plan = tnmoe.plan(spec, tokens=tokens, **way)
        module = tnmoe.build(plan)
        module.load_state_dict(tnmoe.from_reference(plan, baseline.state_dict()))
        found[row] = Candidate(module)
    if isinstance(spec, tnmoe.MuMoEBlock):
        layers = [nn.Linear(spec.inputs, spec.hidden), nn.GELU(), nn.Linear(spec.hidden, spec.outputs)]
        mlp = nn.Sequential(*([nn.LayerNorm(spec.inputs)] if spec.input_norm else []), *layers)
    else:
        mlp = nn.Linear(spec.inputs, spec.outputs)
    return found | {"mlp": Candidate(mlp), "mlp+flag": Candidate(mlp, True)}


def prepared_ring(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The network of a GPT-2 TR layer alone: emitted, and as opt_einsum's prepared expression on the same order."""
    network = tnmoe.Network.parse("bn,anc,bi,cid,doa->bo", weights="anc cid doa")
    sizes = {"b": tokens, "n": 256, "i": 768, "o": 3072, "a": 4, "c": 4, "d": 149}
    plan = tnmoe.plan(network, sizes=sizes)
    module = tnmoe.build(plan)
    arrays = {t.name: torch.randn([sizes[i] for i in t.indices]) for t in network.tensors}
    ids, linear = list(range(5)), []
    for k, (i, j) in enumerate(plan.path):
        linear.append((ids.index(i), ids.index(j)))
        ids = [n for n in ids if n not in (i, j)] + [5 + k]
    expression = opt_einsum.contract_expression(
        network.expression, *(tuple(a.shape) for a in arrays.values()), optimize=linear
    )
    data = [arrays[v.name] for v in plan.layer.inputs]
    return lambda: module(*data), lambda: expression(*arrays.values())


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each run in each round; every round runs all of them in a random order."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for count in range(rounds + 1):
        for name in random.sample(list(runs), len(runs)):
            begin = clock()
            runs[name]()
            if count:  # the first round warms up
                found[name].append(clock() - begin)
    return found


def saved_mib(module: nn.Module, x: Tensor) -> float:
    """What saved-tensor hooks see, parameters, buffers and the input aside."""
    skip = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}
    seen: dict[int, int] = {}
    kept = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(seen.values()) / 2**20


def table(name: str, tokens: int, rounds: int, clock: Callable[[], float], compiled: bool) -> None:
    """Print the rows of one layer at one number of tokens."""
    spec = PRESETS[name].spec
    found = candidates(name, tokens, compiled)
    x, grad = torch.randn(tokens, spec.inputs, requires_grad=True), torch.randn(tokens, spec.outputs)
    outputs = {row: c.forward(x, grad).reshape(tokens, -1) for row, c in found.items() if "mlp" not in row}
    for row, y in outputs.items():
        torch.testing.assert_close(y, outputs["reference"], rtol=1e-3, atol=1e-3, msg=f"{row} differs")
    saved = {row: saved_mib(c.module, x) for row, c in found.items() if "compiled" not in row}
    report = tnmoe.cost(tnmoe.plan(spec, tokens=tokens))
    square = torch.randn(2048, 2048)
    fast = torch.ops.mkldnn._linear_pointwise
    products = {
        "mm": lambda: square @ square,
        "oneDNN": lambda: fast(square, square, None, "none", [], ""),
    }
    repeats = max(1, 64 // tokens)
    print(f"\n{name}, {tokens:,} tokens{'':<8}{'forward ms':>22}{'×':>7}{'training ms':>26}{'×':>7}{'saved MiB':>11}")
    columns = []
    for mode, flops in (("forward", report.matmul_flops), ("training", report.training_matmul_flops)):
        runs: dict[str, Callable[[], object]] = dict(products)
        for row, c in found.items():
            call = getattr(c, mode)
            runs[row] = lambda call=call: [call(x, grad) for _ in range(repeats)]
        times = interleaved(runs, rounds, clock)
        rates = {p: 2 * 2048**3 / min(times.pop(p)) / 1e9 for p in products}
        columns.append((times, rates, flops / max(rates.values()) / 1e6))
    for row in found:
        text = f"{row:<24}"
        for times, _, bound in columns:
            ms = [1e3 * t / repeats for t in times[row]]
            low, _, high = statistics.quantiles(ms, n=4)
            ratio = statistics.median(a / b for a, b in zip(times["reference"], times[row], strict=True))
            share = f"{100 * bound / statistics.median(ms):3.0f} %" if "mlp" not in row else ""
            text += f"{statistics.median(ms):>9.2f} ({low:.2f}–{high:.2f}){share:>6}{ratio:>6.2f}"
        print(text + (f"{saved[row]:>10.1f}" if row in saved else ""))
    for mode, (_, rates, bound) in zip(("forward", "training"), columns, strict=True):
        print(f"  {mode} bound {bound:.1f} ms; {', '.join(f'{p} {r:.0f} GFLOP/s' for p, r in rates.items())}")


def cpu_name() -> str:
    """The processor, as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Print one table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", help="a case such as gpt2-cp@4096")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the reference (minutes)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    random.seed(0)
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, load {load}, {given.threads} threads, torch {torch.__version__}")
    print(f"float32, {given.clock} clock, medians and quartiles of {given.rounds} rounds; %: of the bound, ×: speed-up")
    for name, tokens in CASES:
        if given.only in (None, f"{name}@{tokens}"):
            table(name, tokens, given.rounds, clock, given.compile)
    ours, theirs = prepared_ring(1)
    with torch.no_grad():
        times = interleaved(
            {"ours": lambda: [ours() for _ in range(64)], "theirs": lambda: [theirs() for _ in range(64)]},
            given.rounds,
            clock,
        )
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
    print(f"\nGPT-2 TR network, 1 token, forward: opt_einsum.contract_expression / emitted = {ratio:.2f}")


if __name__ == "__main__":
    main()
