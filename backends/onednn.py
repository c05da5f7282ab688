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
    """a @ b, plus a bias if given: by oneDNN for float32 on a CPU, else by public products.

    oneDNN's has no autograd, and for a single row it is slower.
    """
    tensors = [t for t in (a, b, bias) if t is not None]
    if _onednn is not None and not torch.compiler.is_compiling():
        asked = torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
        float32 = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if asked and float32 and not learns and min(a.shape) > 1:
            return _onednn(a, b.mT, bias, "none", [], "")  # type: ignore[no-any-return]
    return a @ b if bias is None else torch.addmm(bias, a, b)
