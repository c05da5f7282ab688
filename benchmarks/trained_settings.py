"""Blocks in the settings in which people train: bfloat16 autocast, `torch.compile`, and both; part of `blocks.py`.

All of a table run in the same setting, the reference and the `nn.Linear` MLP of the same shape among them, compiled if
the others are. The MLP is what a user would take otherwise, so the goals are against it. Outputs must agree with the
reference's, to the rounding of bfloat16 under autocast.
"""

from __future__ import annotations

from functools import partial

import torch
from contenders import Contender, in_setting
from timing import Times, interleaved

from tnmoe.measuring.timer import Clock, wall_clock
from tnmoe.presets.registry import PRESETS

MODES = ("forward", "training")
ROWS = ("portable", "fast")

SETTINGS: dict[str, tuple[bool, bool]] = {
    "bf16": (True, False),
    "bf16 compiled": (True, True),
    "float32 compiled": (False, True),
}
"""Whether autocast to bfloat16 is on, and whether every module is compiled."""

GOALS: dict[str, tuple[float, float]] = {"bf16 compiled": (0.98, 0.95), "float32 compiled": (0.95, 0.92)}
"""Speed over the MLP that is aimed at, forward and training."""

CASES = {f"{case} {s}": (case, s) for case in ("gpt2-cp@2048", "gpt2-tr@2048") for s in SETTINGS}
"""By name: the block with its tokens, and the setting."""


def settled(compared: dict[str, Contender], tokens: int, widths: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the gradient of the output, once all have run in both modes, been compiled, and agreed."""
    x, grad = torch.randn(tokens, widths[0], requires_grad=True), torch.randn(tokens, widths[1])
    expected = compared["reference"].forward(x, grad).reshape(tokens, -1)
    grad, rounding = grad.to(expected.dtype), 1e-3 if expected.dtype == torch.float32 else 0.05
    atol = rounding * max(1.0, float(expected.abs().max()))
    for row, c in compared.items():
        for y in (c.forward(x, grad), c.training(x, grad)):
            if row != "mlp":
                torch.testing.assert_close(y.view(tokens, -1), expected, rtol=0, atol=atol, msg=f"{row} differs")
    return x, grad


def measured(name: str, rounds: int, seconds: float, clock: Clock = wall_clock) -> dict[str, Times]:
    """The times of a case in both modes, and its table.

    Args:
        name: one of `CASES`.
        rounds: at most.
        seconds: after which no further round of forward passes begins; twice that for training.
        clock: of one pass.
    """
    case, setting = CASES[name]
    preset, _, count = case.partition("@")
    spec, tokens, (bfloat16, compiled) = PRESETS[preset].spec, int(count), SETTINGS[setting]
    if compiled:
        torch._dynamo.reset()  # what another case compiled is in nobody's way
    compared = in_setting(spec, tokens, bfloat16=bfloat16, compiled=compiled)
    x, grad = settled(compared, tokens, (spec.inputs, spec.outputs))
    results = {}
    for k, mode in enumerate(MODES, start=1):
        runs = {row: partial(getattr(c, mode), x, grad) for row, c in compared.items()}
        results[mode] = interleaved(runs, rounds, clock, limit=k * seconds)
    done = ", ".join(f"{len(t.seconds['mlp'])} {mode}" for mode, t in results.items())
    print(f"\n{preset}, {tokens:,} tokens, all {setting}; rounds: {done}")
    if bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("  This processor has no products of bfloat16: torch's own take most of the time, whatever is emitted.")
    for mode, times in results.items():
        print(f"  {mode:<24}{'ms':>28}{'× reference':>26}{'× mlp':>26}")
        for row in times.seconds:
            ms = times.of(row)
            text = f"  {row:<24}{f'{1e3 * ms.median:.2f} ({1e3 * ms.low:.2f}–{1e3 * ms.high:.2f})':>28}"
            print(text + "".join(f"{f'{times.speed(row, over):.2f}':>26}" for over in ("reference", "mlp")))
    return results


def goals(results: dict[str, dict[str, Times]]) -> list[tuple[str, str, str, str, str]]:
    """Work, against what, goal, measured, met: of each case in both modes; some settings have no goal."""
    lines = []
    for name, times in results.items():
        aims = GOALS.get(CASES[name][1], (None, None))
        for (mode, t), goal in zip(times.items(), aims, strict=True):
            speeds = {row: t.speed(row, "mlp") for row in ROWS if row in t.seconds}
            row = max(speeds, key=lambda r: speeds[r].median)
            met = "" if goal is None else "yes" if speeds[row].median >= goal else "no"
            aim = "" if goal is None else f"≥ {goal:g} ×"
            lines.append((f"{name} {mode}", "mlp, same setting", aim, f"{speeds[row]:.2f} {row}", met))
    return lines
