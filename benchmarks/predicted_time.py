"""Predicted against measured time of emitted modules: CP, tensor ring, dense and routed layers, 1 to 8192 tokens.

Run: `OMP_WAIT_POLICY=passive python benchmarks/predicted_time.py [--threads 1] [--rounds 15] [--budget 40]`.
Calibrates this machine, then runs all layers in turn, in random order, and compares medians. float32, without gradients
or, with `--training`, forward and backward. Routed layers get random gates, so that their experts are chosen about
alike, as predictions assume.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import Progress

import tnmoe
from tnmoe.measuring.calibrate import BUDGET, calibrate
from tnmoe.measuring.timer import Timer, passes_for, turns
from tnmoe.timing import predict
from tnmoe.timing.predict_training import predict_training

TOKENS = (1, 16, 256, 8192)


def layers() -> dict[str, object]:
    """Layers by label; none is of a size that the calibration's grid contains."""
    gate = tnmoe.Gate("entmax15", "layer")
    soft = tnmoe.Gate("softmax", "batch")
    cp, ring = tnmoe.CP, tnmoe.TensorRing
    return {
        "linear 768→1000": tnmoe.Linear(768, 1000),
        "linear 96→80": tnmoe.Linear(96, 80),
        "MLP 196→256→196": tnmoe.MLP(196, 256, 196),
        "MLP 768→3072→768": tnmoe.MLP(768, 3072, 768, True, True),
        "CP 768→1000, N 128, R 354": tnmoe.MuMoE(768, 1000, 128, cp(354), tnmoe.Gate("entmax15", "batch")),
        "CP block 768→3072→768, N 256, R 556": tnmoe.MuMoEBlock(768, 3072, 768, 256, cp(556), gate, True, True),
        "CP 96→80, N 8, R 24, softmax": tnmoe.MuMoE(96, 80, 8, cp(24), soft),
        "CP 512→512, N 64·8, R 300": tnmoe.MuMoE(512, 512, (64, 8), cp(300), gate),
        "TR 768→1000, N 128, r 4 4 95": tnmoe.MuMoE(768, 1000, 128, ring((4, 4, 95)), gate),
        "TR block 768→3072→768, N 256, r 4 4 149": tnmoe.MuMoEBlock(
            768, 3072, 768, 256, ring((4, 4, 149)), gate, True, True
        ),
        "TR 96→80, N 8, r 2 2 12, softmax": tnmoe.MuMoE(96, 80, 8, ring((2, 2, 12)), soft),
        "TR 196→256, N 64, r 8 8 20": tnmoe.MuMoE(196, 256, 64, ring((8, 8, 20)), gate),
    }


ROUTED_TOKENS = (1, 32, 512, 4096)


def routed_layers() -> dict[str, object]:
    """Layers that dispatch, by label."""
    return {
        "top-2 of 64, 192→320→192": tnmoe.SparseMoE(192, 192, 64, 2, 320),
        "top-2 of 16, 768→500→768": tnmoe.SparseMoE(768, 768, 16, 2, 500),
        "top-2 of 16, no blocks": tnmoe.SparseMoE(192, 192, 16, 2, 320, block=1),
        "top-2 of 8, masked": tnmoe.SparseMoE(192, 192, 8, 2, 320, lowering="masked"),
        "top-2 of 16, capacity 125 %": tnmoe.SparseMoE(192, 192, 16, 2, 320, capacity=125),
        "top-2 of 64, CP experts, R 100": tnmoe.SparseMoE(192, 192, 64, 2, 320, factorization=tnmoe.CP(100)),
        "top-8 of 64, shared": tnmoe.SparseMoE(192, 192, 64, 8, 80, shared=160),
        "top-4 of 16, 16 null": tnmoe.SparseMoE(192, 192, 16, 4, 320, null=16, shares="normalised"),
        "SMILE 4·8": tnmoe.SMILE(192, 320, 192, 4, 8, 1, 2),
        "expert choice, 200 %": tnmoe.ExpertChoice(192, 192, 16, 200, 320),
        "Soft MoE, 16·8 slots": tnmoe.SoftMoE(192, 192, 16, 8, 320),
        "Mixture of Depths, 12 %": tnmoe.MixtureOfDepths(192, 640, 12),
        "multi-head, 3 heads, top-2 of 16": tnmoe.MultiHeadMoE(192, 160, 16, 2, 3),
        "PEER, 16,384 experts, 4·16": tnmoe.PEER(192, 192, 1 << 14, 4, 16, 64),
        "MoA, 4 of 16 heads of 48": tnmoe.MixtureOfHeads(192, 16, 4, 48),
        "CartesianMoE, top-2 of 8": tnmoe.CartesianMoE(192, 160, 8, 2),
        "MoEfied, 4 of 16": tnmoe.MoEfied(192, 960, 192, 16, 4),
    }


@dataclass
class Run:
    """One layer at one number of tokens."""

    label: str
    tokens: int
    predicted: float
    call: Callable[[], object]
    samples: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """Median seconds."""
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def prepare(label: str, spec: object, tokens: int, profile: tnmoe.DeviceProfile, training: bool, flavour: str) -> Run:
    """Plan, predict and build."""
    memory = None if flavour == "portable" else "save"
    plan = tnmoe.plan(spec, tokens=tokens, input_gradients=False, memory=memory, flavour=flavour)  # type: ignore[arg-type]
    module = tnmoe.build(plan).train(training)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "gate" in name:  # it starts at zero: all ties, which a sort does faster than random logits
                parameter.normal_(0, parameter.shape[0] ** -0.5)
    value = plan.layer.inputs[0]
    x = torch.randn([int(plan.bound.sizes[i]) for i in value.indices])
    if not training:
        seconds = predict.predict(plan.executed, profile, adjoint=plan.adjoint, flavour=plan.flavour).seconds
        return Run(label, tokens, seconds, lambda: module(x))
    prediction = predict_training(plan.bound, profile, adjoint=plan.adjoint, flavour=plan.flavour)
    assert prediction is not None
    leaves, gradient = list(module.parameters()), torch.ones_like(module(x))
    return Run(
        label, tokens, prediction.seconds, lambda: torch.autograd.grad(module(x), leaves, gradient, allow_unused=True)
    )


def sample(run: Run, timer: Timer, at_least: float = 0.004) -> float:
    """Seconds of one call, over a few, after one to bring its weights into the caches."""
    timer.warm(run.call)
    return timer.passes(run.call, passes_for(run.predicted, at_least, 200))


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties sharing their mean."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return statistics.correlation(ranks(xs), ranks(ys))


def main() -> None:
    """Print a row for each layer and number of tokens, then the summary."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--budget", type=float, default=BUDGET, help="seconds of calibration")
    options.add_argument("--cpu-time", action="store_true", help="time the process had, on a shared machine (1 thread)")
    options.add_argument("--training", action="store_true", help="forward and backward, not forward alone")
    options.add_argument("--flavour", choices=("portable", "fast"), default="portable")
    options.add_argument("--layers", choices=("all", "routed", "other"), default="all")
    given = options.parse_args()
    timer = Timer(time.process_time) if given.cpu_time else Timer()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=None)
        profile, calibrated = Timer().once(
            lambda: calibrate(
                budget=given.budget,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                clock=timer.clock,
            )
        )
    peak = max(profile.of("float32").gemm.values)
    print(
        f"{profile.name} {platform.machine()}, {os.cpu_count()} CPUs, {profile.source}; "
        f"calibrated in {calibrated:.0f} s, GEMM peak {peak / 1e9:.0f} GFLOP/s"
    )
    kinds = {"all": [*layers(), *routed_layers()], "routed": list(routed_layers()), "other": list(layers())}
    chosen = {label: spec for label, spec in (layers() | routed_layers()).items() if label in kinds[given.layers]}
    runs = [
        prepare(label, spec, tokens, profile, given.training, given.flavour)
        for label, spec in chosen.items()
        for tokens in (ROUTED_TOKENS if label in kinds["routed"] else TOKENS)
    ]
    with torch.set_grad_enabled(given.training):
        for run in runs:
            timer.warm(run.call)
        for _, run in turns(runs, given.rounds, random.Random(0)):
            run.samples.append(sample(run, timer))
    print(f"{'layer':<42}{'tokens':>7}{'measured µs':>14}{'predicted µs':>14}{'ratio':>7}")
    for run in runs:
        print(
            f"{run.label:<42}{run.tokens:>7}{1e6 * run.measured:>14,.1f}{1e6 * run.predicted:>14,.1f}{run.ratio:>7.2f}"
        )
    print()
    for title, labels in (("without routing", kinds["other"]), ("routed", kinds["routed"])):
        if of_kind := [run for run in runs if run.label in labels]:
            print(f"{title}: {summary(of_kind)}, medians of {given.rounds} rounds")


def summary(runs: Sequence[Run]) -> str:
    """How good the predictions of some runs are."""
    errors = sorted(abs(run.ratio - 1) for run in runs)
    rho = spearman([run.predicted for run in runs], [run.measured for run in runs])
    return (
        f"{len(runs)} runs, Spearman {rho:.4f}, median error {statistics.median(errors):.1%}, "
        f"90 % within {errors[int(0.9 * len(errors))]:.1%}, worst {errors[-1]:.1%}"
    )


if __name__ == "__main__":
    main()
