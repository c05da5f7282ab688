"""What surrounds a counted run: eager, by one form of each operation, and silent. All of it is put back afterwards."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention  # whose parts are replaced below

from tnmoe.counting.counter import WorkCounter
from tnmoe.counting.standins import attention, flexible_attention

_ONE = threading.RLock()


@contextmanager
def surroundings(counter: WorkCounter) -> Iterator[None]:
    """Make torch run what a model means, whatever a device, a mode or a compiler would run.

    * Compiled modules run eagerly.
    * The encoder's fast path in evaluation, and recurrent layers as one kernel, are taken apart: the same figures in
      training and in evaluation, on every device.
    * Attention goes to a stand-in; what calls it by a name imported before takes its mathematical form.
    * Modules that move or convert parts of themselves while they run may do so.
    * torch and transformers do not log or warn about fake tensors.

    Some of it holds for the whole process, so one model is counted at a time. What other threads compute meanwhile is
    left alone, but for kernels that round in another way.
    """
    with _ONE, ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_silent("torch", "transformers"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_fast_path())
        stack.enter_context(_without_mkldnn())
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        flexible = torch.nn.attention.flex_attention
        for place, name, standin in (
            (torch.nn.functional, "scaled_dot_product_attention", attention(counter)),
            (flexible, "flex_attention_hop", flexible_attention(counter)),
            (flexible, "_validate_device", lambda *_: None),
            (torch.nn.Module, "_apply", _apply),
        ):
            if (plain := getattr(place, name, None)) is not None:  # not every torch has all of them
                stack.enter_context(mock.patch.object(place, name, _here(standin, plain)))
        yield


def _here(standin: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The stand-in in this thread, what it stands for in all others."""
    thread = threading.get_ident()

    def function(*args: Any, **kwargs: Any) -> Any:
        return (standin if threading.get_ident() == thread else plain)(*args, **kwargs)

    return function


def _apply(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`nn.Module._apply`, without replacing tensors in place, which fake ones do not bear."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for stored in (module._parameters, module._buffers):
        for name, tensor in stored.items():
            if tensor is not None:
                stored[name] = function(tensor)  # type: ignore[assignment]
    return module


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    nothing = _Nothing()
    loggers = _below(names)
    for logger in loggers:
        logger.addFilter(nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)


class _Nothing(logging.Filter):
    """Lets no record through."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


def _below(names: tuple[str, ...]) -> list[logging.Logger]:
    """The loggers of packages and of all their modules: a filter holds for records of its own logger alone."""
    every = [*names, *(n for n in logging.root.manager.loggerDict if n.startswith(tuple(f"{p}." for p in names)))]
    return [logging.getLogger(name) for name in every]


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
