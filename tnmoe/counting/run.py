"""One pass of a model on fake tensors, each operation charged to the module that it runs for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from tnmoe.counting.counter import WorkCounter
from tnmoe.counting.experts_protocol import counting_experts
from tnmoe.counting.standins import opaque
from tnmoe.counting.surroundings import surroundings
from tnmoe.counting.work import Uncounted, Work
from tnmoe.errors import CostError

DATA_DEPENDENT = (DynamicOutputShapeException, DataDependentOutputException)
"""What fake tensors raise where a shape, or a branch, depends on values."""

Standin = Callable[..., Any]
"""Runs in place of a module's forward: it gets the counter and what the module gets."""


@dataclass(frozen=True)
class Charged:
    """What a run found.

    Attributes:
        forward, backward: work by the path of the module that it was done for, without what is inside of it.
        uncounted: what ran without a formula, or did not run.
    """

    forward: Mapping[str, Work]
    backward: Mapping[str, Work]
    uncounted: tuple[Uncounted, ...]


class Run:
    """A model and what it is given, once.

    Args:
        named: the modules of the model, by path; "" is the model.
        standins: what runs in place of some modules' forward.
        backward: also differentiate what the model returns, for every parameter (and input) that asks for it.
    """

    def __init__(self, named: Mapping[str, nn.Module], standins: Mapping[str, Standin], *, backward: bool) -> None:
        self._named, self._standins, self._differentiates = named, standins, backward
        self._stack = [""]
        self._passed = False  # the forward pass
        self._nodes: dict[Any, str] = {}
        self._skipped: list[Uncounted] = []

    def run(self, inputs: Any) -> Charged:
        """The work of one pass.

        Args:
            inputs: a tensor, positional arguments, or keyword arguments.

        Raises:
            CostError: if the model does not run on fake tensors.
        """
        model = self._named[""]
        stored = _stored(self._named)
        device = _device(stored.values())
        positional, keywords = _arguments(inputs)
        counter = WorkCounter(device or torch.device("cpu"), self._place)
        # Single numbers keep their value: a scale, a count of batches.
        known = {id(t): t.item() for t in stored.values() if t.numel() == 1 and not (t.is_meta or t.requires_grad)}

        def shape_of(t: Tensor) -> Tensor:
            there = device if device is not None else t.device
            if id(t) in known:
                return torch.tensor(known[id(t)], dtype=t.dtype, device=there).reshape(t.shape)
            empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=there)
            return empty.requires_grad_(t.requires_grad) if self._differentiates else empty

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self._differentiates))
            stack.enter_context(surroundings(counter))
            stack.enter_context(counting_experts(self._named.values(), counter))
            fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            twins = {id(t): shape_of(t) for t in stored.values()}  # tied weights stay tied
            state = {name: twins[id(t)] for name, t in stored.items()}
            given = tree_map_only(Tensor, shape_of, (positional, keywords))
            for path, module in self._named.items():
                stack.enter_context(self._watched(path, module, counter))
            stack.enter_context(counter)
            try:
                with FakeCopyMode(fake):  # a cache of keys stays as it is, and none of it is copied
                    positional, keywords = copy.deepcopy(given, {id(t): t for t in _tensors(given)})
                result = torch.func.functional_call(model, state, positional, keywords, tie_weights=False)
                if self._differentiates:
                    self._passed = True
                    self._backward(result)
            except CostError:
                raise
            except Exception as error:
                before = "".join(f", after {u.path} ({u.what}) was left out: {u.why}" for u in self._skipped[:1])
                raise CostError(
                    f"{type(model).__name__} does not run on fake tensors of these shapes ({type(error).__name__}: "
                    f"{error}){before}; check the example, and that it does not branch on values"
                ) from error
        forward = {path: work for (path, after), work in counter.work.items() if not after}
        backward = {path: work for (path, after), work in counter.work.items() if after}
        return Charged(forward, backward, (*counter.uncounted, *self._skipped))

    def _backward(self, result: Any) -> None:
        """From every tensor that the model returns and that has a gradient, with a gradient of ones."""
        ends = [t for t in _tensors(result) if t.requires_grad]
        if not ends:
            raise CostError("nothing that the model returns depends on a parameter that requires a gradient")
        torch.autograd.backward(ends, [torch.empty_like(t) for t in ends])

    # ---- which module ------------------------------------------------------------------------------------------

    def _place(self) -> tuple[str, bool]:
        if self._passed and len(self._stack) == 1:
            return self._nodes.get(torch._C._current_autograd_node(), ""), True
        return self._stack[-1], self._passed  # in the backward pass, a module runs again that was checkpointed

    def _mark(self, result: Any) -> None:
        """Nodes of the graph that nobody has made yet were made by the module that runs."""
        if not self._differentiates:
            return
        open_nodes = [t.grad_fn for t in _tensors(result) if t.grad_fn is not None]
        while open_nodes:
            node = open_nodes.pop()
            if node not in self._nodes:
                self._nodes[node] = self._stack[-1]
                open_nodes += [n for n, _ in node.next_functions if n is not None]

    @contextmanager
    def _watched(self, path: str, module: nn.Module, counter: WorkCounter) -> Iterator[None]:
        """Note when the module runs; let its stand-in run, if it has one; name it, if it depends on values."""
        if isinstance(module, torch.jit.ScriptModule):
            yield
            return
        own, plain, standin = vars(module).get("forward"), module.forward, self._standins.get(path)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._mark((args, kwargs))
            self._stack.append(path)
            skipped = len(self._skipped)
            try:
                result = plain(*args, **kwargs) if standin is None else standin(counter, *args, **kwargs)
                self._mark(result)
            except DATA_DEPENDENT as error:
                result = self._without(path, module, (args, kwargs), error)
            except CostError:
                raise
            except Exception as error:
                # What a module inside was taken to give did not do: then this one is left out in its place.
                left_out = [u for u in self._skipped[skipped:] if u.path.startswith(f"{path}.")]
                if not left_out:
                    raise
                self._skipped = [u for u in self._skipped if u not in left_out]
                result = self._without(path, module, (args, kwargs), error, left_out[0].why)
            finally:
                self._stack.pop()
            return result

        vars(module)["forward"] = forward  # past the `__setattr__` of modules that wrap another one
        try:
            yield
        finally:
            del vars(module)["forward"]  # the class's own is seen again
            if own is not None:
                vars(module)["forward"] = own

    def _without(self, path: str, module: nn.Module, given: Any, error: Exception, why: str = "") -> Tensor:
        """Go on after a module whose shapes depend on values, as if it gave what it got; it is named.

        What ran of it before is counted.
        """
        numbers = [t for t in _tensors(given) if t.is_floating_point()]
        if not path or not numbers:
            raise error
        why = why or f"its work depends on values: {error}"
        self._skipped.append(Uncounted(type(module).__name__, path, 1, why))
        weights = [p for p in module.parameters() if p.requires_grad and self._differentiates]
        return opaque(lambda _: None, numbers[0].shape, numbers[0].dtype, *numbers, *weights)


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor of nested containers, and of the attributes of what is none."""
    leaves = tree_leaves(tree)
    inside = [
        v for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor) for v in vars(leaf).values()
    ]
    return [t for t in (*leaves, *inside) if isinstance(t, Tensor)]


def _stored(named: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers, by owner: a tied weight has a name in each, a shared module one."""
    stored: dict[str, Tensor] = {}
    for path, module in named.items():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        stored |= {f"{path}.{name}" if path else name: t for name, t in own}
    return stored


def _device(stored: Any) -> torch.device | None:
    """Where the fake tensors lie: where the model does, and on the CPU if that is nowhere; None: each on its own."""
    devices = {t.device for t in stored if t.device.type != "meta"}
    return next(iter(devices), torch.device("cpu")) if len(devices) < 2 else None


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, Sequence) else (inputs,), {}
