"""What an emitted file takes of `triton_kernels.py`, as it stands there."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable
from functools import cache

from tnmoe.backends.torch.contractions import factors
from tnmoe.backends.torch.copied import as_emitted, runtime_source
from tnmoe.backends.torch.operands import Operands
from tnmoe.ir.contractions import Contract, ContractAdd, MatmulGroups, matmul_groups
from tnmoe.ir.fused_ops import ContractMix, ContractMultiply, DualContract, FusedOp, unfused
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
        definitions = {}
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                definitions[node.name] = as_emitted(source)
        return definitions

    return sources(body), sources(guarded.body)


def product_groups(op: FusedOp) -> MatmulGroups:
    """The groups of the matrix product whose shape the result has: of a mix the last, else the first."""
    parts = unfused(op)
    product = parts[-1] if isinstance(op, ContractMix) else parts[0]
    assert isinstance(product, Contract | ContractAdd)
    return matmul_groups(product)


def call(op: FusedOp, writer: Operands) -> str:
    """The function of a fused op, with its operands as matrices and each bias as a row."""
    g = product_groups(op)
    arguments = [text for part in unfused(op)[:-1] for text in _factors(part, writer)]
    if isinstance(op, ContractMix):
        arguments.insert(0, writer.matrix(op.mixer, g.batch, g.rows, g.inner))
    if isinstance(op, ContractMultiply):
        arguments.append(writer.matrix(op.factor, g.batch, g.rows, g.cols))
    while arguments[-1] == "None":
        arguments.pop()
    return f"{FUNCTIONS[type(op)]}({', '.join(arguments)})"


def _factors(product: Op, writer: Operands) -> tuple[str, str, str]:
    """Both matrices of a product, and its bias or `None`."""
    assert isinstance(product, Contract | ContractAdd)
    g = matmul_groups(product)
    bias = writer.view(product.bias, (g.cols,)) if isinstance(product, ContractAdd) else "None"
    return *factors(product, g, writer), bias
