"""Weights in safetensors files, in and out; needs the extra `safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tnmoe.errors import FileError
from tnmoe.planning.plan import Plan

if TYPE_CHECKING:
    import torch

try:
    import safetensors
    import safetensors.torch

    INSTALLED = True
except ImportError:  # an extra
    INSTALLED = False

DECLARATION = "tnmoe_declaration"
"""Key of the metadata that says which layer the weights are of."""


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Every tensor of a file, by name.

    Raises:
        FileError: it cannot be read, or the package is not installed.
    """
    _require()
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileError(f"{os.fspath(path)} cannot be read as safetensors: {error}") from None
    return tensors


def write_safetensors(
    state: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, planned: Plan | None = None
) -> Path:
    """Write tensors, e.g. `module.state_dict()`; with the plan, the file also says which layer they are of.

    Raises:
        FileError: it cannot be written, or the package is not installed.
    """
    _require()
    metadata = {} if planned is None else {DECLARATION: json.dumps(dict(planned.layer.declaration))}
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise FileError(f"{os.fspath(path)} cannot be written: {error}") from None
    return Path(path)


def _require() -> None:
    if not INSTALLED:
        raise FileError('safetensors files need the package of that name: pip install "tnmoe[safetensors]"')
