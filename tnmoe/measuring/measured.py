"""Measured beside predicted: the emitted module, and each of its steps by itself, timed on the machine of a profile."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnmoe.backends.torch.function import PRODUCTS
from tnmoe.backends.torch.steps import step_sources
from tnmoe.emission.build import build, loaded
from tnmoe.emission.emit import emit
from tnmoe.errors import CostError
from tnmoe.ir.ops import operands, results
from tnmoe.measuring.calibrate import processor
from tnmoe.measuring.timer import Clock, Timer, of_device, passes_for, turns, wall_clock
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table
from tnmoe.timing.device import Device
from tnmoe.timing.predict import Prediction, predict
from tnmoe.timing.predict_training import TrainingPrediction, predict_training

if TYPE_CHECKING:
    import torch

ROUNDS = 15
"""Times that everything is timed, in random order."""

MOST_REPEATS = 200
"""Passes of one measurement at most."""

LEAST = 0.002
"""Seconds that one sample lasts at least: shorter calls are repeated."""

NOTES = (
    "Products of the flavour triton are predicted as torch's public ones.",
    "Steps are timed each by itself, on operands that its last call used; the module runs them one after the other.",
    "Predicted/measured of the module is what the model is to be judged by.",
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times of one layer, in seconds.

    Attributes:
        prediction: of the forward pass and each of its steps.
        forward: median of a forward pass of the emitted module without gradients, in evaluation mode.
        per_op: medians of each step's statement by itself.
        training_prediction, training: of a forward and backward pass; None if nothing needs a gradient.
        rounds: how often all were timed.
    """

    prediction: Prediction
    forward: float
    per_op: tuple[float, ...]
    training_prediction: TrainingPrediction | None
    training: float | None
    rounds: int

    def table(self, title: str = "one pass") -> Table:
        """Nanoseconds, predicted and measured, of each step, the forward pass, and the training pass."""
        program = self.prediction.program
        rows: list[tuple[Cell, ...]] = [
            (k, type(op).__name__, op.out.label, *_compared(predicted, measured))
            for k, (op, predicted, measured) in enumerate(
                zip(program.ops, self.prediction.per_op, self.per_op, strict=True), start=1
            )
        ]
        rows.append(("", "forward", "", *_compared(self.prediction.seconds, self.forward)))
        if self.training is not None and self.training_prediction is not None:
            rows.append(("", "forward and backward", "", *_compared(self.training_prediction.seconds, self.training)))
        columns = (
            ("step", "step"),
            ("op", "op"),
            ("result", "result"),
            ("predicted_nanoseconds", "predicted ns"),
            ("measured_nanoseconds", "measured ns"),
            ("ratio", "predicted/measured"),
        )
        notes = (f"Profile: {self.prediction.profile}. Medians of {self.rounds} rounds in random order.", *NOTES)
        return Table(f"Predicted and measured time of {title}, {self.prediction.dtype}", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return str(self.table())


def _compared(predicted: float, measured: float) -> tuple[int, int, float]:
    return round(1e9 * predicted), round(1e9 * measured), round(predicted / measured, 2)


def check_machine(profile: Device) -> None:
    """Check that `profile` is a calibration of this machine as it now runs: the device, and the threads of torch.

    Raises:
        CostError: a data sheet, another device, or other threads; it says which.
    """
    import torch  # planning and costing do without

    if not profile.calibrated:
        raise CostError(f"{profile.name!r} is a data sheet; to measure beside it, calibrate this machine first")
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise CostError(f"the profile is of {profile.name!r}, but torch finds no CUDA device here")
    here = torch.cuda.get_device_name() if profile.device == "cuda" else processor()
    if profile.name != here:
        raise CostError(f"the profile is of {profile.name!r}, but this machine is {here!r}: calibrate here first")
    threads = f"{torch.get_num_threads()} threads"
    if profile.device == "cpu" and not profile.source.endswith(f", {threads}"):
        raise CostError(
            f"the profile was {profile.source}, but torch now uses {threads}: calibrate again, or set the threads"
        )


def measured(
    plan: Plan,
    profile: Device,
    dtype: str = "float32",
    *,
    rounds: int = ROUNDS,
    clock: Clock = wall_clock,
) -> Measurement:
    """Time the emitted module and each of its statements on this machine, beside what a profile of it predicts.

    Args:
        plan: bound to the tokens to time.
        profile: a calibration of this machine, with the threads that torch now uses.
        dtype: of weights and activations; one that the profile has.
        rounds: how often everything is timed, in random order; medians count.
        clock: seconds; see `tnmoe.measuring.timer.Clock`.

    Raises:
        CostError: a profile of another machine, or one without the dtype; rounds below 1; or an op without a time
            model.
        EmitError: an op without a torch form.
    """
    check_machine(profile)
    if not isinstance(rounds, int) or rounds < 1:
        raise CostError(f"rounds must be an integer of at least 1, got {rounds!r}")
    own, flavour = plan.adjoint, plan.flavour
    prediction = predict(plan.bound, profile, dtype, adjoint=own, flavour=flavour)
    training = predict_training(plan.bound, profile, dtype, inputs=plan.input_gradients, adjoint=own, flavour=flavour)
    runs = _runs(plan, profile.device, dtype, train=training is not None)
    samples = _time(runs, rounds, of_device(profile.device, clock))
    medians = [statistics.median(s) for s in samples]
    count = len(plan.bound.ops)
    return Measurement(
        prediction, medians[count], tuple(medians[:count]), training, medians[count + 1] if training else None, rounds
    )


def _runs(plan: Plan, device: str, dtype: str, *, train: bool) -> list[Callable[[], object]]:
    """What is timed: each step, the forward pass, and if asked for forward and backward."""
    import torch  # planning and costing do without

    program, kind = plan.bound, getattr(torch, dtype)
    module = build(plan, device=device, dtype=kind).eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "gate" in name:  # it starts at zero: all ties, which a sort does faster than random logits
                p.normal_(0, max(1, p.shape[0]) ** -0.5)
    inputs = [
        torch.randn([int(program.sizes[i]) for i in v.indices], device=device, dtype=kind) for v in program.inputs
    ]
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    values: dict[str, torch.Tensor] = {v.name: state[v.name] for v in program.leaves if v not in program.inputs}
    values |= {v.name: x for v, x in zip(program.inputs, inputs, strict=True)}
    product = PRODUCTS[plan.flavour]
    steps = loaded("\n\n".join([emit(plan), step_sources(program, product)]))
    runs: list[Callable[[], object]] = []
    with torch.no_grad():
        for k, op in enumerate(program.ops, start=1):
            step = getattr(steps, f"step_{k}")
            names = dict.fromkeys(v.name for v in (*program.inputs, *operands(op)))
            arguments = [values[name] for name in names]
            made = step(*arguments)
            values |= zip((v.name for v in results(op)), made if isinstance(made, tuple) else (made,), strict=True)
            runs.append(_step(step, arguments))
    runs.append(_step(module, inputs))
    if train:
        trained = build(plan, device=device, dtype=kind)
        given = [
            x.clone().requires_grad_(v.name in plan.input_gradients)
            for v, x in zip(program.inputs, inputs, strict=True)
        ]
        runs.append(_training(trained, given))
    return runs


def _step(step: Callable[..., object], arguments: list[torch.Tensor]) -> Callable[[], object]:
    import torch

    def run() -> None:
        with torch.no_grad():
            step(*arguments)

    return run


def _training(module: torch.nn.Module, inputs: list[torch.Tensor]) -> Callable[[], object]:
    import torch

    leaves = [t for t in (*module.parameters(), *inputs) if t.requires_grad]
    gradient = torch.ones_like(module(*inputs))
    return lambda: torch.autograd.grad(module(*inputs), leaves, gradient, allow_unused=True)


def _time(runs: list[Callable[[], object]], count: int, timer: Timer) -> list[list[float]]:
    """Seconds of a call of each, in every round."""
    repeats = []
    for run in runs:
        timer.warm(run)
        repeats.append(passes_for(timer.passes(run, apart=True), LEAST, MOST_REPEATS))
    seconds: list[list[float]] = [[] for _ in runs]
    for _, k in turns(range(len(runs)), count, random.Random(0)):
        seconds[k].append(timer.passes(runs[k], repeats[k], apart=True))
    return seconds
