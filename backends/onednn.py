"""Products of the flavour `fast`. The emitter copies all that stands below the imports."""

from __future__ import annotations

import torch
from torch import Tensor


def _find_onednn():  # type: ignore[no-untyped-def]
    """oneDNN's x @ W.T + b, private in torch, if this torch has it and it multiplies; else None.

    Where a CPU has AVX-512, it can be twice as fast as torch's own product; elsewhere it is slower.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise
        found = product(torch.eye(2), torch.ones(2, 2), None, "none", [], "")
        return product if torch.equal(found, torch.ones(2, 2)) else None
    except (AttributeError, RuntimeError):
        return None


_onednn = _find_onednn()  # type: ignore[no-untyped-call]


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b, plus a bias if given: by oneDNN for float32 on a CPU, else by public products."""
    eager = not torch.compiler.is_compiling() and torch.backends.mkldnn.enabled
    float32 = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if _onednn is not None and eager and float32 and 0 not in a.shape:
        return _onednn(a, b.mT, bias, "none", [], "")  # type: ignore[no-any-return]  # without autograd: for functions only
    return a @ b if bias is None else torch.addmm(bias, a, b)
