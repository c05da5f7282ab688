"""What other counters report of the same emitted modules: fvcore, calflops, torchinfo and torch's FlopCounterMode.

Run: `pip install fvcore calflops transformers torchinfo`, then `python benchmarks/counters.py [--tokens 1024]`. Each
column is what the tool calls FLOPs; fvcore and torchinfo mean multiply-adds. The truth is counted by hand from the
shapes, without tnmoe: 2·T·m·n for each product of a T × m with an m × n matrix. Gates are softmax, for fvcore's sake.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tnmoe
from tnmoe.presets.registry import PRESETS
from tnmoe.render.table import Table

LAYERS = ("gpt2-mlp", "gpt2-cp", "gpt2-tr", "clip-128-cp", "clip-128-tr")


def truth(name: str, tokens: int) -> int:
    """FLOPs of the matrix products, by hand: the gate's I·N, then the factors in the reference's order."""
    per_token = {
        "gpt2-mlp": 2 * 768 * 3072,
        "gpt2-cp": 768 * 256 + 2 * 556 * (256 + 768 + 3072),
        "gpt2-tr": 768 * 256 + 2 * (16 * 256 + 4 * 149 * (768 + 3072) + 4 * 4 * 149),
        "clip-128-cp": 768 * 128 + 354 * (128 + 768 + 1000),
        "clip-128-tr": 768 * 128 + 16 * 128 + 4 * 95 * (768 + 1000) + 4 * 4 * 95,
    }
    return 2 * tokens * per_token[name]


def by_torch(module: nn.Module, x: torch.Tensor) -> int:
    """`torch.utils.flop_counter`: matrix products alone."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


def by_fvcore(module: nn.Module, x: torch.Tensor) -> int:
    """Its "flops" are multiply-adds of the operators that it knows."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, x)
    return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def by_calflops(module: nn.Module, x: torch.Tensor) -> int:
    """Patches functions of torch; operators of tensors, such as `x @ w`, pass unseen."""
    from calflops import calculate_flops

    flops, _, _ = calculate_flops(
        model=module, args=[x], print_results=False, print_detailed=False, output_as_string=False
    )
    return int(flops)


def by_torchinfo(module: nn.Module, x: torch.Tensor) -> int:
    """Its "total mult-adds" are those of modules that hold their weights themselves, one a weight and position."""
    from torchinfo import summary

    return int(summary(module, input_data=x, verbose=0).total_mult_adds)


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], int]] = {
    "FlopCounterMode": by_torch,
    "fvcore": by_fvcore,
    "calflops": by_calflops,
    "torchinfo": by_torchinfo,
}


def reported(tool: Callable[[nn.Module, torch.Tensor], int], module: nn.Module, x: torch.Tensor) -> int | str:
    """What a tool says, or the name of its error."""
    silent = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            return tool(module, x)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--tokens", type=int, default=1024)
    tokens = options.parse_args().tokens
    logging.disable(logging.WARNING)
    rows = []
    for name in LAYERS:
        spec = PRESETS[name].spec
        if hasattr(spec, "gate"):  # entmax does not run under the tracer that fvcore needs
            spec = dataclasses.replace(spec, gate=tnmoe.Gate("softmax", spec.gate.norm))
        plan = tnmoe.plan(spec, tokens=tokens)
        module = tnmoe.build(plan).eval()
        x = torch.randn(tokens, int(plan.bound.sizes["i"]))
        report = tnmoe.cost(plan)
        counts = [reported(tool, module, x) for tool in TOOLS.values()]
        rows.append((name, truth(name, tokens), report.matmul_flops, report.flops, *counts))
    columns = (
        ("layer", "layer"),
        ("truth", "matmul, by hand"),
        ("tnmoe_matmul", "tnmoe matmul"),
        ("tnmoe", "tnmoe all"),
        *((tool, tool) for tool in TOOLS),
    )
    print(Table(f"FLOPs of one forward pass of emitted modules, {tokens:,} tokens", columns, tuple(rows)))


if __name__ == "__main__":
    main()
