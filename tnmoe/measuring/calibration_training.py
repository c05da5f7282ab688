"""What a calibration times for training: gradients that have kernels of their own, and what autograd takes besides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tnmoe.measuring.calibration_cases import Case, Point, Sizes
from tnmoe.timing.rates import BACKWARD_ROWWISE, BACKWARD_STREAMS, Grid, Training

if TYPE_CHECKING:
    import torch

FEW, MANY = 1, 4
"""Rounds of a chain; what a round takes is the difference."""


def training_cases(left: torch.Tensor, right: torch.Tensor, sizes: Sizes, itemsize: int) -> list[Case]:
    """Cases of `Training`, on views of two pools; their kinds begin with "backward" or "graph"."""
    cases: list[Case] = []

    def case(kind: str, point: Point, work: float, run: Callable[[], object]) -> None:
        cases.append(Case(kind, point, work, run, []))

    _kernels(left, right, sizes, itemsize, case)
    _chains(left, case)
    return cases


AddCase = Callable[[str, Point, float, Callable[[], object]], None]


def _kernels(left: torch.Tensor, right: torch.Tensor, sizes: Sizes, itemsize: int, case: AddCase) -> None:
    """Gradients by the kernels that autograd calls, without autograd."""
    import torch

    from tnmoe.backends.runtime.activations import _Entmax15Root, _Sparsemax

    aten = torch.ops.aten

    class Kept:
        """What a function's backward pass is given."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.saved_tensors = (tensor,)

    def streams(n: int) -> None:
        x, grad, moved = left[:n], right[:n], 3 * n * itemsize
        case("backward Gelu", (moved,), moved, lambda: aten.gelu_backward(grad, x))
        case("backward Sigmoid", (moved,), moved, lambda: aten.sigmoid_backward(grad, x))

    def rowwise(rows: int, length: int) -> None:
        count, shape = rows * length, (rows, length)
        x, grad = left[:count].view(shape), right[:count].view(shape)
        y, kept, only = torch.softmax(x, -1), Kept(torch.softmax(x, -1)), [True, False, False]
        _, mean, scale = torch.native_layer_norm(x, (length,), None, None, 1e-5)
        _, means, scales = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
        running = right[:length].clone(), right[:length].square() + 1

        def entmax15() -> None:
            _Entmax15Root.backward(kept, grad * (2 * y.pow(1)))  # the square's gradient, as torch writes it

        def add(kind: str, run: Callable[[], object]) -> None:
            case(f"backward {kind}", shape, count, run)

        add("Softmax", lambda: torch._softmax_backward_data(grad, y, -1, x.dtype))
        add("Entmax15", entmax15)
        add("Sparsemax", lambda: _Sparsemax.backward(kept, grad))
        add(
            "LayerNorm",
            lambda: aten.native_layer_norm_backward(grad, x, (length,), mean, scale, None, None, only),
        )
        add(
            "BatchNorm",
            lambda: aten.native_batch_norm_backward(grad, x, None, *running, means, scales, True, 1e-5, only),
        )
        add("BatchNormTraining", lambda: torch.native_batch_norm(x, None, None, *running, True, 0.1, 1e-5))

    for n in sizes.backward_streams:
        streams(n)
    for point in itertools.product(*sizes.backward_rows):
        rowwise(*point)


def _chains(pool: torch.Tensor, case: AddCase) -> None:
    """Chains of small ops with and without autograd, and their kernels one by one."""
    import torch
    from torch.autograd.function import once_differentiable
    from torch.nn import functional as F

    small, square, grad = pool[:64].view(4, 16), pool[:256].view(16, 16), pool[:64].view(4, 16).clone()
    leaf = small.clone().requires_grad_()
    others = [small.clone().requires_grad_() for _ in range(2 * MANY)]
    aten = torch.ops.aten
    y, (_, mean, scale) = torch.softmax(small, -1), torch.native_layer_norm(small, (16,), None, None, 1e-5)

    class Function(torch.autograd.Function):
        """As an emitted one, of which the work is two products."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x * a,)

        @staticmethod
        def setup_context(ctx, inputs: tuple, output: tuple) -> None:  # type: ignore[no-untyped-def,type-arg]
            x, a, b, c = inputs
            ctx.save_for_backward(x, a, b, c)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
            _, a, *_ = ctx.saved_tensors
            return grad * a if ctx.needs_input_grad[0] else None, None, None, None

    def train(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.enable_grad():
                torch.autograd.grad(forward(), leaves, grad)

        return run

    def ops(rounds: int) -> torch.Tensor:
        x = leaf
        for _ in range(rounds):
            x = x * small
            x = x @ square
            x = torch.softmax(x, -1)
            x = F.layer_norm(x, (16,))
            x = x + small
        return x

    def products(factors: list[torch.Tensor]) -> torch.Tensor:
        x = leaf
        for factor in factors:
            x = x * factor
        return x

    def functions(rounds: int) -> torch.Tensor:
        x = leaf
        for _ in range(rounds):
            (x,) = Function.apply(x, small, small, small)  # type: ignore[no-untyped-call]
        return x

    def rounds(kind: str, chain: Callable[[int], torch.Tensor], count: int) -> None:
        case(f"graph {kind}", (count,), 0, train(lambda: chain(count), [leaf]))

    for count in (FEW, MANY):
        rounds("ops", ops, count)
        rounds("functions", functions, count)
    case("graph apply", (FEW,), 0, lambda: functions(FEW))
    case("graph apply", (MANY,), 0, lambda: functions(MANY))
    case("graph leaves", (0,), 0, train(lambda: products([small] * len(others)), [leaf]))
    case("graph leaves", (len(others),), 0, train(lambda: products(others), [leaf, *others]))
    kernels: list[Callable[[], object]] = [
        lambda: small * small,
        lambda: grad * small,
        lambda: small @ square,
        lambda: grad.mm(square.t()),
        lambda: torch.softmax(small, -1),
        lambda: torch._softmax_backward_data(grad, y, -1, small.dtype),
        lambda: F.layer_norm(small, (16,)),
        lambda: aten.native_layer_norm_backward(grad, small, (16,), mean, scale, None, None, [True, False, False]),
        lambda: small + small,
    ]
    for kernel in kernels:
        case("graph kernel", (), 0, kernel)


OPS = 5
"""Ops in a round of the chain, each a node."""


def training_rates(
    by_kind: Mapping[str, list[Case]], overhead: Mapping[str, float], grid: Callable[[str], Grid], switch: float
) -> Training:
    """What the samples say.

    Args:
        by_kind: the cases measured.
        overhead: seconds of the least work of each kind.
        grid: the rates of a kind.
        switch: seconds of going from one op to another, which a forward pass counts by itself.
    """

    def seconds(kind: str) -> dict[int, float]:
        return {c.point[0]: c.seconds for c in by_kind[kind]}

    def each(kind: str) -> float:
        """Seconds of a round."""
        timed = seconds(kind)
        return (timed[MANY] - timed[FEW]) / (MANY - FEW)

    kernels = [c.seconds for c in by_kind["graph kernel"]]
    product = kernels[0]
    node = max(0.0, (each("graph ops") - math.fsum(kernels)) / OPS - switch)
    without, *_, handed = (seconds("graph leaves")[k] for k in sorted(seconds("graph leaves")))
    leaf = max(0.0, (handed - without) / (2 * MANY) - product)
    apply = max(0.0, each("graph apply") - product)
    return Training(
        streams={kind: grid(f"backward {kind}") for kind in BACKWARD_STREAMS},
        rowwise={kind: grid(f"backward {kind}") for kind in BACKWARD_ROWWISE},
        overhead={kind: overhead[f"backward {kind}"] for kind in (*BACKWARD_STREAMS, *BACKWARD_ROWWISE)},
        graph={
            "pass": max(0.0, seconds("graph ops")[FEW] - FEW * each("graph ops") - leaf),
            "node": node,
            "leaf": leaf,
            "apply": apply,
            "function": max(0.0, each("graph functions") - apply - 2 * product),
        },
    )
