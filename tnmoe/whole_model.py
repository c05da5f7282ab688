"""The cost of any torch model: layers that tnmoe built by their formulas, everything else as torch counts it.

The model runs once on fake tensors, which have shapes and no memory, so its size does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tnmoe.api import cost
from tnmoe.built import plan_of
from tnmoe.errors import CostError, DeclarationError, unknown
from tnmoe.plan import Plan
from tnmoe.report import Cell, Table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """One forward pass of one module, what is inside it included.

    Attributes:
        path: its name in the model, "" for the model itself.
        kind: its class.
        parameters: numbers in its parameters, shared ones once.
        weight_bytes: of parameters and buffers.
        matmul_flops: what `torch.utils.flop_counter` counts: products of matrices, convolutions, attention.
        other_flops: element-wise and special FLOPs of the layers counted by formula; torch counts none.
        read_bytes, written_bytes: of every operation's tensors, each operand once an operation, views aside.
        by_formula: True if it is a layer that tnmoe built.
    """

    path: str
    kind: str
    parameters: int = 0
    weight_bytes: int = 0
    matmul_flops: int = 0
    other_flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    by_formula: bool = False


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model's modules, each before what is inside it; the first is the model."""

    modules: tuple[ModuleCost, ...]

    @property
    def total(self) -> ModuleCost:
        """The whole model."""
        return self.modules[0]

    def __getitem__(self, path: str) -> ModuleCost:
        for module in self.modules:
            if module.path == path:
                return module
        raise CostError(unknown("module", path, [m.path for m in self.modules[1:]]))

    def table(self, depth: int | None = None) -> Table:
        """One row for each module, indented, down to `depth` (the model itself is at depth 0)."""
        rows: list[tuple[Cell, ...]] = []
        for m in self.modules:
            level = m.path.count(".") + 1 if m.path else 0
            if depth is None or level <= depth:
                name = "  " * level + (m.path.rpartition(".")[2] or "model")
                figures = (m.parameters, m.matmul_flops, m.other_flops, m.weight_bytes, m.read_bytes, m.written_bytes)
                rows.append((name, m.kind, *figures, "formula" if m.by_formula else "torch"))
        columns = (
            ("module", "module"),
            ("kind", "kind"),
            ("parameters", "parameters"),
            ("matmul_flops", "matmul FLOPs"),
            ("other_flops", "other FLOPs"),
            ("weight_bytes", "weight bytes"),
            ("read_bytes", "bytes read"),
            ("written_bytes", "bytes written"),
            ("counted", "counted by"),
        )
        notes = (
            "One forward pass. matmul FLOPs: 2 per multiplication of matrix products, convolutions and attention. "
            "other FLOPs: element-wise and special ones, known for layers counted by formula alone.",
            "Each row includes the rows indented below it; parameters that modules share count once.",
        )
        return Table(f"Cost of {self.total.kind}", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().render("html")


def cost_model(
    model: torch.nn.Module,
    inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    plans: Mapping[str, Plan] | None = None,
) -> ModelCost:
    """Parameters, FLOPs and bytes of one forward pass of a model, module by module. Nothing is allocated.

    Args:
        model: on any device, "meta" included; it stays as it is.
        inputs: an example: a tensor, the positional arguments, or the keyword arguments. Shapes and dtypes count alone.
        plans: the plans of layers, by path, that tnmoe emitted into files; those built in this process are known.

    Raises:
        CostError: if the model cannot run on fake tensors (e.g. because it branches on values).
        DeclarationError: what is no model, or a plan for a path that the model does not have.
    """
    import torch  # costing layers does without

    if not isinstance(model, torch.nn.Module):
        raise DeclarationError(f"cost_model takes a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_modules())
    for path in plans or {}:
        if path not in named:
            raise DeclarationError(f"plans names {path!r}, which is no module of {type(model).__name__}")
    compiled = {path: p for path, m in named.items() if (p := (plans or {}).get(path) or plan_of(m)) is not None}
    own = _Run(named, compiled).run(model, inputs)
    inside = {path: _subtree(named, path) for path in named}
    covered = {below for path in compiled for below in inside[path] if below != path}
    direct = {}
    for path in named:
        if path in compiled:
            direct[path] = _by_formula(path, named[path], compiled[path], own.calls.get(path, []))
        else:
            matmul, read, written = own.direct[path]
            direct[path] = ModuleCost(path, "", matmul_flops=matmul, read_bytes=read, written_bytes=written)
    rows = []
    for path, module in named.items():
        if path in covered:
            continue
        parts = [direct[below] for below in inside[path] if below not in covered]
        stored = {id(p): p for p in (*module.parameters(), *module.buffers())}.values()
        rows.append(
            ModuleCost(
                path,
                type(module).__name__,
                parameters=sum(p.numel() for p in module.parameters()),
                weight_bytes=sum(t.numel() * t.element_size() for t in stored),
                matmul_flops=sum(p.matmul_flops for p in parts),
                other_flops=sum(p.other_flops for p in parts),
                read_bytes=sum(p.read_bytes for p in parts),
                written_bytes=sum(p.written_bytes for p in parts),
                by_formula=path in compiled,
            )
        )
    return ModelCost(tuple(rows))


def _subtree(named: Mapping[str, Any], path: str) -> list[str]:
    return [p for p in named if not path or p == path or p.startswith(f"{path}.")]


def _by_formula(path: str, module: torch.nn.Module, planned: Plan, calls: Sequence[tuple[int, str]]) -> ModuleCost:
    """The layer's own report, summed over its calls: (tokens, dtype) of each."""
    found = ModuleCost(path, type(module).__name__)
    for tokens, dtype in calls:
        if tokens:
            report = cost(planned, tokens=tokens if planned.layer.batched else None, dtype=dtype)
            found = replace(
                found,
                matmul_flops=found.matmul_flops + report.matmul_flops,
                other_flops=found.other_flops + report.flops - report.matmul_flops,
                read_bytes=found.read_bytes + report.read_bytes,
                written_bytes=found.written_bytes + report.activation_bytes,
            )
    return found


class _Run:
    """One forward pass on fake tensors. What torch counts is charged to the module that runs at the time."""

    def __init__(self, named: Mapping[str, torch.nn.Module], compiled: Mapping[str, Plan]) -> None:
        self.direct = dict.fromkeys(named, (0, 0, 0))
        self.calls: dict[str, list[tuple[int, str]]] = {}
        self._named, self._compiled = named, compiled
        self._stack = [""]
        self._counted = (0, 0, 0)

    def run(self, model: torch.nn.Module, inputs: Any) -> _Run:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils._pytree import tree_map_only
        from torch.utils.flop_counter import FlopCounterMode

        fake = FakeTensorMode(allow_non_fake_inputs=True)
        # By owner: a tied weight has a name in each, a shared module but one, so that each is put back once.
        stored: dict[str, torch.Tensor] = {}
        for path, module in self._named.items():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            stored |= {f"{path}.{name}" if path else name: t for name, t in own}
        devices = {t.device for t in stored.values()}
        (device,) = devices if len(devices) == 1 else (None,)
        arguments = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        keywords = dict(arguments) if isinstance(arguments, Mapping) else {}
        positional = () if isinstance(arguments, Mapping) else tuple(arguments)

        def shape_of(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device or t.device)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(fake)
            twins = {id(t): shape_of(t) for t in stored.values()}  # tied weights stay tied
            state = {name: twins[id(t)] for name, t in stored.items()}
            positional, keywords = tree_map_only(torch.Tensor, shape_of, (positional, keywords))
            for path, module in self._named.items():
                if path in self._compiled and self._compiled[path].layer.batched:
                    stack.enter_context(_shapes_alone(module, self._compiled[path]))
                before = module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            self._flops = stack.enter_context(FlopCounterMode(display=False))
            self._traffic = stack.enter_context(_traffic_mode())
            try:
                torch.func.functional_call(model, state, positional, keywords, tie_weights=False)
            except Exception as error:
                raise CostError(
                    f"{type(model).__name__} does not run on fake tensors of these shapes "
                    f"({type(error).__name__}: {error}); check the example, and that it does not branch on values"
                ) from error
            self._charge()
        return self

    def _enter(self, path: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._charge()
            self._stack.append(path)
            if path in self._compiled:
                x = next(iter((*arguments, *keywords.values())))
                dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
                self.calls.setdefault(path, []).append((x.shape[:-1].numel(), dtype))

        return hook

    def _leave(self, module: torch.nn.Module, arguments: Any, result: Any) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        """Give what was counted since the last call to the module on top."""
        now = (self._flops.get_total_flops(), self._traffic.read, self._traffic.written)
        path, before = self._stack[-1], self.direct[self._stack[-1]]
        added = tuple(b + n - c for b, n, c in zip(before, now, self._counted, strict=True))
        self.direct[path] = (added[0], added[1], added[2])
        self._counted = now


@contextmanager
def _shapes_alone(module: torch.nn.Module, planned: Plan) -> Iterator[None]:
    """Let a built layer give results of the right shape and no more: routing depends on values, its formulas do not."""
    width = int(planned.bound.sizes[planned.layer.output.indices[-1]])
    dtype = next(module.parameters()).dtype

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], width), dtype=dtype)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is seen again


def _traffic_mode() -> Any:
    """A dispatch mode that adds up the bytes of every operation's operands and results, views aside."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def memory(t: torch.Tensor) -> int:
        return int(t.untyped_storage()._cdata)

    class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # by torch's __init_subclass__
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.read = self.written = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}.values()
            owners = {memory(t) for t in given}
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            new = [t for t in made if func._schema.is_mutable or memory(t) not in owners]
            if new:
                self.read += sum(t.numel() * t.element_size() for t in given)
                self.written += sum(t.numel() * t.element_size() for t in new)
            return out

    return Traffic()
