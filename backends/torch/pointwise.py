"""Expressions of gates, GELU and norms."""

from __future__ import annotations

from tnmoe.backends.torch.operands import Operands
from tnmoe.errors import EmitError, no_rule
from tnmoe.ir.pointwise_ops import (
    BatchNorm,
    Entmax15,
    Gelu,
    GeluBackward,
    LayerNorm,
    PointwiseOp,
    Sigmoid,
    Softmax,
    Sparsemax,
)


def expression(op: PointwiseOp, writer: Operands) -> str:
    """What an op computes.

    Raises:
        EmitError: a sparse gate along another axis than the last.
    """
    x = writer.ref(op.x.name)
    match op:
        case Softmax(_, value, index):
            return f"torch.softmax({x}, {value.indices.index(index) - len(value.indices)})"
        case Entmax15() | Sparsemax():
            if op.x.indices[-1] != op.index:
                raise EmitError(f"{type(op).__name__} runs over the last axis, but {op.index!r} is not last")
            return f"{'entmax15' if isinstance(op, Entmax15) else 'sparsemax'}({x})"
        case Sigmoid():
            return f"torch.sigmoid({x})"
        case Gelu(out):
            return f"{writer.gelu}({x})" if out.name in writer.program.overwrites else f"F.gelu({x})"
        case GeluBackward(_, grad, value):
            return f"torch.ops.aten.gelu_backward({writer.ref(grad.name)}, {writer.ref(value.name)})"
        case LayerNorm(_, _, index, weight, bias):
            affine = "".join(f", {writer.ref(v.name)}" for v in (weight, bias) if v)
            return f"F.layer_norm({x}, ({writer.program.sizes[index]},){affine})"
        case BatchNorm():
            return f"F.batch_norm({x}, mean, var, None, None, training, momentum)"
        case _:
            no_rule(op, "its torch form")
