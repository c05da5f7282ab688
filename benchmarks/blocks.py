"""Emitted modules against the reference's op order, its fastest setting, an MLP of the same shape, and other libraries.

Run: `python benchmarks/blocks.py` (needs `pip install "tnmoe[peers]"`: the baseline is
`tests/support/reference_module.py`, with its column of ones, its three-operand einsums and entmax from the package).
float32; all contenders of a table have the same weights, agree with each other, and run interleaved in random order in
one process; each row gives median and quartiles of its time, and of the ratio of the reference's time to its own within
each round. `ref+flag` and `mlp+flag` run with `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, which sends their
products to oneDNN and which tnmoe never sets. `tuned` is what `tnmoe.tune` chose here, for each of both modes. The
bound is the time of all matmul FLOPs at the best rate that a product of 2048×2048 matrices reached in the same rounds.
`trained_settings.py` adds cases under bfloat16 autocast, compiled, and both, such as `--only "gpt2-cp@2048 bf16
compiled"`. The last table holds what was measured against what is aimed at.

About twenty minutes on two cores, of which the settings take half. On a machine that others use as well,
`--clock cpu --threads 1` compares processor time, without what was waited.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import trained_settings
from contenders import Contender, contenders, factorized, prepared_ring, uses_onednn
from timing import Spread, Times, interleaved, machine
from torch import Tensor, nn

import tnmoe
from tnmoe.presets.registry import PRESETS

LARGE = ("gpt2-cp@4096", "gpt2-tr@4096", "mixer-channel-cp@4096")
CASES = (*LARGE, "clip-128-cp@256", "gpt2-tr@1", "gpt2-cp@1")
LINEAR = {
    "linear-cp": ("CP, 3 modes", "cp", 3),
    "linear-tucker": ("Tucker, 3 modes", "tucker", 3),
    "linear-tt": ("TT, 3 modes", "blocktt", 3),
    "linear-cp-matrix": ("CP, 1 mode", "cp", 1),
    "linear-tucker-matrix": ("Tucker, 1 mode", "tucker", 1),
}
"""Factorizations of a 768 × 768 matrix, as tensorly-torch calls them, and into how many modes each axis is split."""

MODES = ("forward", "training")
RING = "contract_expression@1"

FAST = ("fast", "fast, chunks", "tuned")
PORTABLE = ("portable", "portable, chunks")
ANY = (*PORTABLE, *FAST)


@dataclass
class Settings:
    """What the command line says."""

    rounds: int
    seconds: float
    tuning: float
    clock: Callable[[], float]
    compiled: bool


@dataclass
class Measured:
    """The times of one case in both modes, and what else there is to say of it."""

    times: dict[str, Times] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)
    path: str = "mlp"

    def share(self, row: str, mode: str, pick: Callable[[list[float]], float] = min) -> float:
        """Of the time that the matmul FLOPs take at the best product's rate (or its median one)."""
        times = self.times[mode]
        return self.flops[mode] / times.peak(pick) / times.of(row).median

    def best(self, rows: tuple[str, ...], mode: str, over: str) -> tuple[str, Spread]:
        """The fastest of some rows, and its speed over another row."""
        there = [row for row in rows if row in self.times[mode].seconds]
        speeds = {row: self.times[mode].speed(row, over) for row in there}
        row = max(speeds, key=lambda r: speeds[r].median)
        return row, speeds[row]


# ---- one case --------------------------------------------------------------------------------------------------


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


def measure(
    compared: dict[str, Contender], tokens: int, widths: tuple[int, int], settings: Settings, first: str
) -> Measured:
    """Check that all agree with the first (an MLP aside), then time them in both modes."""
    x, grad = torch.randn(tokens, widths[0], requires_grad=True), torch.randn(tokens, widths[1])
    expected = compared[first].forward(x, grad).reshape(tokens, -1)
    for row, c in compared.items():
        if "mlp" not in row:
            for y in (c.forward(x, grad), *([] if c.trained is None else [c.training(x, grad)])):
                torch.testing.assert_close(y.reshape(tokens, -1), expected, rtol=1e-3, atol=1e-3, msg=f"{row} differs")
    result = Measured(saved={row: saved_mib(c.trained, x) for row, c in compared.items() if c.trained is not None})
    for mode in MODES:
        runs = {
            row: partial(getattr(c, mode), x, grad)
            for row, c in compared.items()
            if mode == "forward" or c.trained is not None
        }
        repeats = max(1, 64 // tokens)
        limit = settings.seconds * (1 if mode == "forward" else 2)
        result.times[mode] = interleaved(runs, settings.rounds, settings.clock, repeats=repeats, limit=limit)
    return result


def block(name: str, settings: Settings) -> Measured:
    """A layer of the paper at a number of tokens, and its table."""
    preset, _, tokens = name.partition("@")
    spec, count = PRESETS[preset].spec, int(tokens)
    compiled = settings.compiled or name == "gpt2-cp@1"
    compared = contenders(spec, count, compiled, settings.tuning)
    if compiled:
        try:
            compared["compiled reference"].forward(torch.randn(count, spec.inputs), torch.empty(0))
        except Exception as error:  # no compiler for C++, for instance
            print(f"{name}: torch.compile failed, so its rows are left out: {type(error).__name__}")
            del compared["compiled reference"], compared["portable, compiled"]
    result = measure(compared, count, (spec.inputs, spec.outputs), settings, "reference")
    report = tnmoe.cost(tnmoe.plan(spec, tokens=count))
    result.flops = {"forward": report.matmul_flops, "training": report.training_matmul_flops}
    result.path = "mlp+flag" if uses_onednn(compared["fast"].module) else "mlp"
    show(f"{preset}, {count:,} tokens", result, compared, "reference", ("ref+flag", result.path))
    return result


def linear(name: str, settings: Settings, width: int = 768, tokens: int = 2048) -> Measured:
    """A factorized linear layer against tensorly-torch's, and its table."""
    label, kind, modes = LINEAR[name]
    what, compared = factorized(kind, width, modes, 0.1, tokens, settings.tuning)
    first = "tltorch, factorized"
    result = measure(compared, tokens, (width, width), settings, first)
    show(f"{width} → {width}, {label}, {tokens:,} tokens", result, compared, first, ("tltorch, reconstructed",))
    print(f"  {what}")
    return result


def ring(settings: Settings) -> Measured:
    """The network of a GPT-2 TR layer at one token against opt_einsum's prepared expression."""
    with torch.no_grad():
        result = Measured({"forward": interleaved(prepared_ring(1), settings.rounds, settings.clock, repeats=64)})
    speeds = {row: result.times["forward"].speed(row, "contract_expression") for row in ("portable", "fast")}
    said = ", ".join(f"{row} {speed:.2f}" for row, speed in speeds.items())
    print(f"\nGPT-2 TR network, 1 token, forward, × opt_einsum.contract_expression: {said}")
    return result


# ---- tables ----------------------------------------------------------------------------------------------------


def show(title: str, result: Measured, compared: dict[str, Contender], first: str, others: tuple[str, ...]) -> None:
    """One row for each contender: times, share of the bound, speeds over the first row and over others, saved MiB."""
    print(f"\n{title}; rounds: {', '.join(f'{len(t.seconds[first])} {m}' for m, t in result.times.items())}")
    for mode in MODES:
        times = result.times[mode]
        heads = "".join(f"{f'× {other}':>26}" for other in (first, *others))
        print(f"  {mode:<24}{'ms':>28}{'bound':>8}{heads}" + (f"{'saved MiB':>11}" if mode == "training" else ""))
        for row in times.seconds:
            ms = times.of(row)
            text = f"  {row:<24}{f'{1e3 * ms.median:.2f} ({1e3 * ms.low:.2f}–{1e3 * ms.high:.2f})':>28}"
            bounded = result.flops and "mlp" not in row
            text += f"{100 * result.share(row, mode):6.0f} %" if bounded else f"{'':8}"
            text += "".join(f"{f'{times.speed(row, other):.2f}':>26}" for other in (first, *others))
            print(text + (f"{result.saved[row]:>11.3g}" if mode == "training" else ""))
        rates = [
            f"{p} {times.rate(p, min) / 1e9:.0f} (median {times.rate(p, statistics.median) / 1e9:.0f})"
            for p in times.products
        ]
        bound = f"bound {1e3 * result.flops[mode] / times.peak(min):.2f} ms; " if result.flops else ""
        print(f"  {bound}products of {', '.join(rates)} GFLOP/s")
    if "fast, recompute" in result.saved:
        same = "fast, chunks" if "fast, chunks" in result.saved else "fast"
        less = result.saved["fast, recompute"] / result.saved[first]
        slower = result.times["training"].speed(same, "fast, recompute")
        print(f"  recompute keeps {less:.2f} of what the {first} saves, and takes {slower:.2f} × the time of '{same}'")
    for row, c in compared.items():
        if c.says:
            print(f"  {row}: {c.says}")


Line = tuple[str, str, str, str, str]
"""Work, against what, goal, measured, met."""


def line(work: str, against: str, goal: float, row: str, speed: Spread) -> Line:
    """A speed and its goal."""
    return work, against, f"≥ {goal:g} ×", f"{speed:.2f} {row}", "yes" if speed.median >= goal else "no"


def summary(results: dict[str, Measured]) -> list[Line]:
    """What was measured against what is aimed at; of several rows, the one that is the fastest."""
    lines: list[Line] = []
    for name in LARGE:
        if name not in results:
            continue
        r = results[name]
        for rows, over, goals in (
            (FAST, "reference", (2.5, 2.2)),
            (FAST, "ref+flag", (1.4, 1.3)),
            (PORTABLE, "reference", (1.2, 1.1)),
        ):
            for mode, goal in zip(MODES, goals, strict=True):
                lines.append(line(f"{name} {mode}, {rows[0]}", over, goal, *r.best(rows, mode, over)))
        for mode, goal in zip(MODES, (85, 80), strict=True):
            row, _ = r.best(FAST, mode, "reference")
            share, median = (100 * r.share(row, mode, pick) for pick in (min, statistics.median))
            got = f"{share:.0f} % {row} ({median:.0f} % of the median rate)"
            lines.append((f"{name} {mode}, fast", "GEMM bound", f"≥ {goal} %", got, "yes" if share >= goal else "no"))
        for mode, goal in zip(MODES, (1.05, 1.2), strict=True):
            lines.append(line(f"{name} {mode}, fast", r.path, goal, *r.best(FAST, mode, r.path)))
        less = r.saved["fast, recompute"] / r.saved["reference"]
        slower = r.times["training"].speed("fast, chunks", "fast, recompute")
        met = "yes" if less <= 0.25 and slower.median <= 1.1 else "no"
        got = f"{less:.2f} at {slower:.2f} × the time"
        lines.append((f"{name} saved, recompute", "reference", "≤ 0.25 at ≤ 1.1 ×", got, met))
    for name, rows, over, goals in (
        ("clip-128-cp@256", ANY, "reference", (3, 2.2)),
        ("gpt2-tr@1", ANY, "reference", (3, 2.5)),
        ("gpt2-cp@1", ANY, "reference", (2.5, 2.5)),
        ("gpt2-cp@1", ANY, "compiled reference", (1,)),
        ("gpt2-cp@1", ("portable, compiled",), "compiled reference", (1,)),
    ):
        if name in results and over in results[name].times["forward"].seconds:
            for mode, goal in zip(MODES, goals, strict=False):
                lines.append(line(f"{name} {mode}", over, goal, *results[name].best(rows, mode, over)))
    if RING in results:
        best = results[RING].best(ANY, "forward", "contract_expression")
        lines.append(line("gpt2-tr network@1 forward", "contract_expression", 4, *best))
    for name, (label, _, _) in LINEAR.items():
        if name in results:
            for theirs in ("tltorch, factorized", "tltorch, reconstructed"):
                lines.append(
                    line(f"768→768 {label}, training", theirs, 3, *results[name].best(ANY, "training", theirs))
                )
    return lines


def print_summary(lines: list[Line]) -> None:
    """The lines, with a head."""
    head: Line = ("work", "against", "goal", "measured here: median (quartiles) row", "met")
    widths = [max(len(row[k]) for row in (head, *lines)) for k in range(len(head))]
    print("\nSummary: medians and quartiles of the ratios within rounds; of several rows, the fastest")
    for row in (head, tuple("-" * w for w in widths), *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """Print one table for each case, and the summary."""
    names = [*CASES, RING, *LINEAR, *trained_settings.CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of each table, at most (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of forward rounds; twice that of training (default: 20)"
    )
    parser.add_argument("--tuning", type=float, default=15, help="seconds of each tnmoe.tune; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", action="append", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every reference (minutes)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    settings = Settings(given.rounds, given.seconds, given.tuning, clock, given.compile)
    print(machine(given.threads, given.clock))
    print("float32; medians (quartiles); bound: share of it; ×: how many times as fast, round by round")
    results: dict[str, Measured] = {}
    trained: dict[str, dict[str, Times]] = {}
    for name in given.only or names:
        if name in trained_settings.CASES:
            trained[name] = trained_settings.measured(name, settings.rounds, settings.seconds, settings.clock)
        elif name in CASES:
            results[name] = block(name, settings)
        elif name == RING:
            results[name] = ring(settings)
        else:
            try:
                results[name] = linear(name, settings)
            except ImportError as error:
                print(f'\n{name} is left out: {error}; pip install "tnmoe[peers]"')
    print_summary([*summary(results), *trained_settings.goals(trained)])


if __name__ == "__main__":
    main()
