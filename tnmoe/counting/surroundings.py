"""What surrounds a counted run: eager, by one form of each operation, and silent. All of it is put back afterwards."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from tnmoe.counting.counter import WorkCounter
from tnmoe.counting.standins import attention


@contextmanager
def surroundings(counter: WorkCounter) -> Iterator[None]:
    """Make torch run what a model means, whatever a device, a mode or a compiler would run.

    * Compiled modules run eagerly.
    * The encoder's fast path in evaluation, and recurrent layers as one kernel, are taken apart: the same figures in
      training and in evaluation, on every device.
    * Attention goes to a stand-in; what calls it by a name imported before takes its mathematical form.
    * torch and transformers do not log or warn about fake tensors.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_silent("torch", "transformers"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_fast_path())
        stack.enter_context(_without_mkldnn())
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        place = "torch.nn.functional.scaled_dot_product_attention"
        stack.enter_context(mock.patch(place, attention(counter)))
        yield


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.disabled, logger.level) for logger in loggers]
    filters = [(logger, _Nothing()) for logger in _below(names)]
    try:
        for logger, nothing in filters:
            logger.addFilter(nothing)
        yield
    finally:
        for logger, nothing in filters:
            logger.removeFilter(nothing)
        for logger, disabled, level in before:
            logger.disabled, logger.level = disabled, level


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
