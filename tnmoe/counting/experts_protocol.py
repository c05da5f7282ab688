"""Experts of transformers: an implementation that counts, registered beside theirs.

A class decorated with `use_experts_implementation` keeps its experts as stacked matrices and calls what
`ALL_EXPERTS_FUNCTIONS` has under its configuration's `_experts_implementation`. All compute the same; only the work
differs, by what runs where (https://github.com/huggingface/transformers, `integrations/moe.py`). Here it is what
a router asks for: k · T rows through one expert each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tnmoe.counting.counter import WorkCounter
from tnmoe.counting.standins import grouped_product

NAME = "tnmoe"
"""Under which it is registered."""

_ATTRIBUTES = ("config", "has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "down_proj")


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module's experts can be exchanged so."""
    return all(hasattr(module, name) for name in _ATTRIBUTES) and hasattr(
        module.config, "_experts_implementation_internal"
    )


@contextmanager
def counting_experts(modules: Iterable[torch.nn.Module], counter: WorkCounter) -> Iterator[None]:
    """Let all such modules run the implementation that counts; afterwards everything is as it was."""
    experts: list[Any] = [m for m in modules if is_experts(m)]
    if not experts:
        yield
        return
    interface: Any = sys.modules[
        "transformers.integrations.moe"
    ].ALL_EXPERTS_FUNCTIONS  # their class was decorated there
    configs = {id(m.config): m.config for m in experts}.values()
    before = [(c, c._experts_implementation_internal) for c in configs]
    there = interface._global_mapping.get(NAME)
    interface.register(NAME, _forward(counter))
    try:
        for config in configs:
            config._experts_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._experts_implementation_internal = name
        interface._global_mapping.pop(NAME)
        if there is not None:
            interface.register(NAME, there)


def _forward(counter: WorkCounter) -> Any:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, chosen = hidden_states.shape[0], top_k_index.shape[-1]
        rows = hidden_states.repeat_interleave(chosen, 0)
        of_rows = top_k_index.reshape(-1)
        name = "gate_up_proj" if self.has_gate else "up_proj"

        def linear(x: Tensor, name: str) -> Tensor:
            weight = getattr(self, name)
            y = grouped_product(x.to(weight.dtype), weight if self.is_transposed else weight.mT, counter)
            return y + getattr(self, f"{name}_bias")[of_rows] if self.has_bias else y

        inner = linear(rows, name)
        y = linear(self._apply_gate(inner) if self.has_gate else self.act_fn(inner), "down_proj")
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1)[:, None]
        return weighted.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    return forward
