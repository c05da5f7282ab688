"""A dispatch mode that adds up the work of every operation, and names those that it has no formula for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tnmoe.counting.results import result_of
from tnmoe.counting.torch_formulas.attention import attention_backward_flops, attention_flops
from tnmoe.counting.torch_formulas.call import Call, tensor_bytes
from tnmoe.counting.torch_formulas.registry import formula_of, moved_bytes
from tnmoe.counting.work import Flops, Uncounted, Work


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # by torch's __init_subclass__
    """Charges each operation to the module that runs, or in a backward pass to the one that ran it forward.

    Args:
        device: where tensors lie that are on no device, as the fake ones do.
        place: the path of the module to charge, and whether it is the backward pass.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device, place: Callable[[], tuple[str, bool]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: dict[tuple[str, bool], Work] = {}
        self._missing: Counter[tuple[str, str, str]] = Counter()
        self._device, self._place = device, place

    @property
    def uncounted(self) -> tuple[Uncounted, ...]:
        """What ran without a formula."""
        return tuple(Uncounted(what, path, calls, why) for (what, path, why), calls in self._missing.items())

    def add(self, flops: Flops, moved: tuple[int, int] = (0, 0)) -> None:
        """Charge work to the module that runs now."""
        place = self._place()
        added = Work(flops.matmul, flops.elementwise, flops.special, *moved)
        self.work[place] = self.work.get(place, Work()) + added

    def name(self, what: str, why: str) -> None:
        """Say that something was not counted."""
        self._missing[what, self._place()[0], why] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        if func.namespace == "prim":  # asks where a tensor lies
            return func(*args, **kwargs)
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(torch.Tensor, self._present, (args, kwargs))
        formula = formula_of(func)
        if formula is None:
            with self:  # in inference mode, operations come here before they are taken apart
                if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts
        if func is torch.ops.aten.rand.default and not args[0]:
            return torch.tensor(1.0)  # whether to drop a layer: fake draws have no value, and every layer counts
        out = result_of(func, args, kwargs)
        call = Call.of(func, args, kwargs, out)
        if formula is None:
            self.name(str(func._overloadpacket), "no formula")
            self.add(Flops(), moved_bytes(func, call))
        else:
            self.add(formula(call), moved_bytes(func, call))
        return out

    def _present(self, t: torch.Tensor) -> torch.Tensor:
        """The tensor where the others are: meta tensors that a model has made for itself lie nowhere."""
        if t.device.type != "meta" or self._device.type == "meta":
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self._device)

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Attention that is put together by its user has a formula; other programs inside operations are named."""
        out = func(*args, **kwargs)
        if func.name() in ("flex_attention", "flex_attention_backward"):
            query, key, value = args[:3]
            count = attention_flops if func.name() == "flex_attention" else attention_backward_flops
            results = [t for t in out if isinstance(t, torch.Tensor)]
            moved = sum(map(tensor_bytes, args[:3])), sum(map(tensor_bytes, results))
            self.add(count(query.shape, key.shape, value.shape), moved)
        else:
            self.name(func.name(), "a program inside an operation")
        return out
