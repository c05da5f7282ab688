"""What an emitted file takes of `triton_kernels.py`, as it stands there."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable
from functools import cache

from tnmoe.backends.torch.copied import as_emitted, runtime_source
from tnmoe.ir.fused_ops import ContractMix, ContractMultiply, DualContract
from tnmoe.ir.ops import Op
from tnmoe.ir.pointwise_ops import Entmax15

IMPORT = """\
try:
    import triton
    import triton.language as tl
except ImportError:  # then public operations of torch compute everything
    triton = None"""
"""Behind the other imports of a file with kernels."""

_PRODUCT = ("_matmul_precision", "_tile", "_autocast_keeps", "_affine", "_counted", "_product")
_MULTIPLY = (
    *_PRODUCT,
    "_contract_multiply_kernel",
    "_contract_multiply_flops",
    "_launch_contract_multiply",
    "_contract_multiply",
)
CALLED = {
    DualContract: _MULTIPLY,
    ContractMultiply: _MULTIPLY,
    ContractMix: (*_PRODUCT, "_contract_mix_kernel", "_contract_mix_flops", "_launch_contract_mix", "_contract_mix"),
    Entmax15: ("_entmax15_kernel", "_entmax15_backward_kernel", "_by_rows", "_Entmax15Rows", "entmax15"),
}
"""Definitions that an op needs besides the capability test."""

FUNCTIONS = {DualContract: "_contract_multiply", ContractMultiply: "_contract_multiply", ContractMix: "_contract_mix"}
"""The function that a fused op calls."""


def kernel_sources(ops: Iterable[Op]) -> tuple[str, ...]:
    """Functions, and all kernels in one block, that ops of the flavour `triton` need; none if none has a kernel."""
    wanted = {name for op in ops for name in CALLED.get(type(op), ())}
    if not wanted:
        return ()
    wanted |= {"_kernels_take", "_block"}
    functions, kernels = _definitions()
    inside = [textwrap.indent(source, "    ") for name, source in kernels.items() if name in wanted]
    block = "\n\n".join(["if triton is not None:", *inside])
    chosen = {name: source for name, source in functions.items() if name in wanted}
    return chosen.pop("_kernels_take"), chosen.pop("_block"), block, *chosen.values()


@cache
def _definitions() -> tuple[dict[str, str], dict[str, str]]:
    """Sources by name: of functions and classes, and of kernels, these without their indentation."""
    text = runtime_source("triton_kernels")
    body = ast.parse(text).body
    (guarded,) = (n for n in body if isinstance(n, ast.If))
    lines = text.splitlines()

    def sources(nodes: Iterable[ast.stmt]) -> dict[str, str]:
        found = {}
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                found[node.name] = as_emitted(source)
        return found

    return sources(body), sources(guarded.body)
