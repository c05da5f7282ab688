"""Triton kernels of emitted modules against the plain path, torch.compile, and the floor of bytes and FLOPs.

Run on a machine with an NVIDIA GPU: `python benchmarks/kernels.py --profile h100 --dtype bfloat16`. It ends with code 2
where there is none; Triton's interpreter tells nothing about time.

First each fused op and each gate by itself, then whole layers, forward without gradients and in training. Candidates
of a row compute the same, which is checked; they are timed by CUDA events, interleaved in random order, with the L2
cache written over before each run. The floor of an op is the larger of its matmul FLOPs over the data sheet's peak and
of its bytes (each operand read once, the result written once) over its bandwidth: both read off the program.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

import tnmoe
from tnmoe.backends.runtime import triton_kernels as kernels
from tnmoe.backends.torch.statements import Writer
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.traffic import forward_traffic
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.pointwise_ops import Entmax15
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.measuring.timer import turns
from tnmoe.presets.registry import PRESETS
from tnmoe.timing.datasheet import Datasheet, datasheet, datasheet_names

CASES = (("gpt2-cp", 4096), ("gpt2-tr", 4096), ("clip-128-cp", 4096), ("gpt2-cp", 1), ("gpt2-tr", 1))
FLUSHED = 256 << 20
"""Bytes written over before each run: more than any L2 cache."""

Run = Callable[[], object]


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Public operations of torch instead of kernels."""
    with mock.patch.object(kernels, "_kernels_take", return_value=False):
        yield


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each run in each round, by CUDA events; every round runs all of them in a random order."""
    order, cache = random.Random(0), torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    for run in runs.values():
        for _ in range(3):  # compiles, and warms up
            run()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _, name in turns(list(runs), rounds, order):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        begin.record()
        runs[name]()
        end.record()
        events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [1e3 * begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


def row(label: str, times: dict[str, list[float]], floor: float | None = None) -> None:
    """Print medians with quartiles, the share of the floor in them, and speed against the first candidate."""
    first = next(iter(times))
    print(f"\n{label}" + (f": floor {1e6 * floor:.1f} µs" if floor is not None else ""))
    for name, micros in times.items():
        low, middle, high = statistics.quantiles(micros, n=4)
        share = f"{100 * 1e6 * floor / middle:5.0f} % of the floor" if floor is not None else ""
        ratio = statistics.median(a / b for a, b in zip(times[first], micros, strict=True))
        print(f"  {name:<28}{middle:>10.1f} µs ({low:.1f}–{high:.1f}){ratio:>7.2f} ×{share}")


def floor_of(op: Op, sizes: dict[str, int], device: Datasheet, dtype: str) -> float:
    """Seconds that no kernel can do without."""
    moved = forward_traffic(op, sizes)
    computing = int(op_cost(op, sizes).matmul_flops) / device.of(dtype).dense
    return max(computing, DTYPE_BYTES[dtype] * int(moved.read + moved.written) / device.bandwidth)


def operations(plan: tnmoe.Plan, device: Datasheet, dtype: str, rounds: int) -> None:
    """Each fused op and each gate, as it is emitted."""
    program = plan.executed
    writer, sizes = Writer(program, attributes=False), {i: int(n) for i, n in program.sizes.items()}
    kind = getattr(torch, {"tf32": "float32"}.get(dtype, dtype))
    for op in program.ops:
        if not isinstance(op, FusedOp | Entmax15):
            continue
        env = {
            writer.ref(v.name): torch.randn([sizes[i] for i in v.indices], device="cuda").div(4).to(kind)
            for v in operands(op)
        }
        code = compile(writer.expression(op)[0], op.out.name, "eval")

        def run(code: object = code, env: dict[str, Tensor] = env) -> object:
            return eval(code, {**vars(kernels), **env})

        def plain(run: Run = run) -> object:
            with plain_path():
                return run()

        function = expression_function(writer.expression(op)[0], list(env))
        fused = torch.compile(function)
        arguments = list(env.values())
        ways = {"plain": plain, "compiled": lambda f=fused, a=arguments: f(*a), "kernel": run}
        with torch.no_grad():
            agree({name: call() for name, call in ways.items()}, kind, dtype)
            times = interleaved(ways, rounds)
        floor = floor_of(op, sizes, device, dtype) if isinstance(op, FusedOp) else None
        moved = forward_traffic(op, sizes)
        floor = floor or DTYPE_BYTES[dtype] * int(moved.read + moved.written) / device.bandwidth
        row(f"{type(op).__name__} {op.out.label}, {sizes[op.out.indices[0]]:,} tokens", times, floor)


def expression_function(expression: str, names: list[str]) -> Callable[..., Tensor]:
    """A function of these names that computes an emitted expression, for torch.compile."""
    space = dict(vars(kernels))
    exec(f"def computed({', '.join(names)}):\n    return {expression}", space)
    computed: Callable[..., Tensor] = space["computed"]
    return computed


def agree(results: dict[str, object], kind: torch.dtype, dtype: str) -> None:
    """All candidates give the first one's result, to the rounding of its type."""
    first = next(iter(results.values()))
    assert isinstance(first, Tensor)
    tolerance = {"float32": 1e-4}.get(dtype, 2e-2)
    for name, result in results.items():
        assert isinstance(result, Tensor)
        scale = float(first.float().abs().max()) + 1e-6
        error = float((result.float() - first.float()).abs().max()) / scale
        assert error < tolerance, f"{name} differs by {error:.1e} of the largest entry"


def layers(name: str, tokens: int, dtype: str, rounds: int) -> None:
    """Whole modules: with the plain path, compiled, and with kernels; what is kept least, and their inference forms."""
    spec = PRESETS[name].spec
    kind = getattr(torch, {"tf32": "float32"}.get(dtype, dtype))
    plans = {
        "portable": tnmoe.plan(spec, tokens=tokens),
        "portable, recompute": tnmoe.plan(spec, tokens=tokens, memory="recompute"),
        "triton, save": tnmoe.plan(spec, tokens=tokens, flavour="triton"),
        "triton, recompute": tnmoe.plan(spec, tokens=tokens, flavour="triton", memory="recompute"),
    }
    least = plans["triton, recompute"]
    assert least.function is not None
    plans["triton, nothing kept"] = replace(least, function=replace(least.function, kept=()))
    modules = {
        label: tnmoe.build(plan, device="cuda", dtype=kind, freeze="triton" in label) for label, plan in plans.items()
    }
    for module in modules.values():
        module.load_state_dict(modules["portable"].state_dict())
    modules["portable, compiled"] = torch.compile(modules["portable"])
    x = torch.randn(tokens, spec.inputs, device="cuda", dtype=kind)
    grad = torch.randn(tokens, spec.outputs, device="cuda", dtype=kind)
    inference = {**modules, "triton, frozen": modules["triton, save"].eval().freeze()}
    for module in inference.values():
        module.eval()
    with torch.no_grad():
        agree({label: module(x) for label, module in inference.items()}, kind, dtype)
        row(
            f"{name}, {tokens:,} tokens, forward",
            interleaved({label: lambda m=module: m(x) for label, module in inference.items()}, rounds),
        )
    z = x.detach().requires_grad_()

    def train(module: torch.nn.Module) -> None:
        leaves = [z, *module.parameters()]
        torch.autograd.grad(module(z), leaves, grad)

    for module in modules.values():
        module.train()
    row(
        f"{name}, {tokens:,} tokens, forward and backward",
        interleaved({label: lambda m=module: train(m) for label, module in modules.items()}, rounds),
    )


def main() -> None:
    """Print each op and each layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=datasheet_names(), required=True, help="data sheet for the floors")
    parser.add_argument("--dtype", choices=("float32", "tf32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", help="a case such as gpt2-cp@4096")
    given = parser.parse_args()
    if not torch.cuda.is_available() or kernels.triton is None:
        lacking = "Triton is not installed" if kernels.triton is None else "torch finds no CUDA device"
        print(f"{lacking}: kernels can be timed on a GPU alone (tests check them without)", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = given.dtype == "tf32"
    device = datasheet(given.profile)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {kernels.triton.__version__}, {given.dtype}"
    )
    print(f"floors by the data sheet of {device.name}; medians and quartiles of {given.rounds} rounds, L2 written over")
    for name, tokens in CASES:
        if given.only in (None, f"{name}@{tokens}"):
            plan = tnmoe.plan(PRESETS[name].spec, tokens=tokens, flavour="triton")
            assert plan.function is not None
            operations(replace(plan, function=replace(plan.function, kept=())), device, given.dtype, given.rounds)
            layers(name, tokens, given.dtype, given.rounds)


if __name__ == "__main__":
    main()
