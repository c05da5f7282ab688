"""The cost of any torch model: layers that tnmoe built by their formulas, everything else operation by operation.

The model runs once on fake tensors, which have shapes and no memory, so its size does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import ScriptObject, Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tnmoe.counting.counter import WorkCounter
from tnmoe.counting.model_cost import ModelCost, ModuleCost
from tnmoe.counting.run import Charged, Run
from tnmoe.counting.standins import charged, opaque
from tnmoe.counting.work import Uncounted, Work
from tnmoe.emission.build import plan_of
from tnmoe.errors import CostError, DeclarationError
from tnmoe.planning.plan import Plan
from tnmoe.reports.calls import cost
from tnmoe.reports.cost_report import CostReport


def cost_model(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    plans: Mapping[str, Plan] | None = None,
    backward: bool = False,
    strict: bool = False,
) -> ModelCost:
    """Parameters, FLOPs and bytes of one pass of a model, module by module. Nothing is allocated.

    The figures are those of the model and not of a machine: the same on every device ("meta" too), in every type (bytes
    aside), compiled or not, in training and in evaluation (dropout aside), and whichever kernel would run. Attention is
    counted in full. Routed rows are k · T, whatever a router says: experts of transformers run an implementation that
    counts, in place of the one that was chosen.

    Args:
        model: on any device, "meta" included; it stays as it is, and must not run elsewhere meanwhile.
        inputs: an example: a tensor, the positional arguments, or the keyword arguments. Shapes and dtypes count alone.
        plans: the plans of layers, by path, that tnmoe emitted into files; those built in this process are known.
        backward: count the backward pass as well: the gradient of every parameter, and input, that requires one, from
            everything that the model returns. Scores of attention are not computed anew; layers that the model
            checkpoints are, and count with the backward pass.
        strict: raise if anything is not counted. Otherwise it is named: see `ModelCost.uncounted`.

    Raises:
        CostError: if the model cannot run on fake tensors (e.g. because it branches on values); if nothing has a
            gradient that `backward` asks for; under `strict`, what is not counted.
        DeclarationError: what is no model, or a plan for a path that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise DeclarationError(f"cost_model takes a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_modules())
    for path in plans or {}:
        if path not in named:
            raise DeclarationError(f"plans names {path!r}, which is no module of {type(model).__name__}")
    for path, module in named.items():
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise CostError(f"{path or type(model).__name__} has no shapes before its first call; run the model once")
    compiled = {path: p for path, m in named.items() if (p := (plans or {}).get(path) or plan_of(m)) is not None}
    standins = {path: partial(_by_formula, p, named[path], backward) for path, p in compiled.items()}
    charged = Run(named, standins, backward=backward).run(inputs)
    uncounted = _summed(charged.uncounted)
    if strict and uncounted:
        raise CostError(f"not counted in {type(model).__name__}: {'; '.join(map(str, uncounted))}")
    return ModelCost(_rows(named, compiled, charged, backward=backward), uncounted)


def _rows(
    named: Mapping[str, nn.Module], compiled: Mapping[str, Plan], charged: Charged, *, backward: bool
) -> tuple[ModuleCost, ...]:
    """Every module with what is inside it; layers that are counted by formula as one."""
    inside = {path: _subtree(named, path) for path in named}
    covered = {below for path in compiled for below in inside[path] if below != path}
    rows = []
    for path, module in named.items():
        if path in covered:
            continue
        stored = {id(p): p for p in (*module.parameters(), *module.buffers())}.values()
        forward = sum((charged.forward.get(p, Work()) for p in inside[path]), start=Work())
        packed, packed_bytes = _packed(module)
        rows.append(
            ModuleCost(
                forward.matmul_flops,
                forward.elementwise_flops,
                forward.special_flops,
                forward.read_bytes,
                forward.written_bytes,
                path,
                type(module).__name__,
                parameters=sum(p.numel() for p in module.parameters()) + packed,
                weight_bytes=sum(t.numel() * t.element_size() for t in stored) + packed_bytes,
                backward=sum((charged.backward.get(p, Work()) for p in inside[path]), start=Work())
                if backward
                else None,
                by_formula=path in compiled,
            )
        )
    return tuple(rows)


def _subtree(named: Mapping[str, Any], path: str) -> list[str]:
    return [p for p in named if not path or p == path or p.startswith(f"{path}.")]


def _packed(module: nn.Module) -> tuple[int, int]:
    """Numbers and bytes of weights that quantised modules keep out of sight, biases included."""
    parts: list[Any] = [vars(part).get("_packed_params") for part in module.modules()]
    packed: list[Any] = list({id(p): p for p in parts if isinstance(p, ScriptObject)}.values())
    tensors = [t for p in packed for t in p.unpack() if t is not None]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _summed(every: Sequence[Uncounted]) -> tuple[Uncounted, ...]:
    """One line for each operation or module, with all of its calls."""
    lines: dict[tuple[str, str, str], int] = {}
    for u in every:
        lines[u.what, u.path, u.why] = lines.get((u.what, u.path, u.why), 0) + u.calls
    return tuple(Uncounted(what, path, calls, why) for (what, path, why), calls in lines.items())


# ---- layers that tnmoe built -----------------------------------------------------------------------------------


def _by_formula(planned: Plan, module: nn.Module, backward: bool, counter: WorkCounter, x: Tensor) -> Tensor:
    """Results of the right shape and no more: routing depends on values, a layer's formulas do not."""
    width = int(planned.bound.sizes[planned.layer.output.indices[-1]])
    parameters = dict(module.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    shape, tokens = (*x.shape[:-1], width), x.shape[:-1].numel()
    if not tokens:
        return x.new_empty(shape, dtype=dtype)
    if not x.requires_grad:
        planned = replace(planned, input_gradients=())
    names = {p.name for p in planned.program.parameters}
    frozen = [name for name, p in parameters.items() if backward and name in names and not p.requires_grad]
    report = cost(
        planned,
        tokens=tokens if planned.layer.batched else None,
        dtype=str(dtype).removeprefix("torch."),
        frozen=frozen,
    )
    charged(counter, _forward_work(report))
    if not backward:
        return x.new_empty(shape, dtype=dtype)
    return opaque(lambda _: charged(counter, _backward_work(report)), shape, dtype, x, *parameters.values())


def _forward_work(report: CostReport) -> Work:
    moved = report.read_bytes, report.activation_bytes
    return Work(report.matmul_flops, report.elementwise_flops, report.special_flops, *moved)


def _backward_work(report: CostReport) -> Work:
    return Work(
        report.backward_matmul_flops,
        report.backward_elementwise_flops,
        report.backward_special_flops,
        report.backward_read_bytes,
        report.backward_written_bytes,
    )
