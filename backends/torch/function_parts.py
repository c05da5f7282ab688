"""What the emitted functions of both forms, whole and in chunks, say alike."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.backends.torch.lines import WIDTH, broken, docstring, listed, wrapped
from tnmoe.ir.value import Value


def described(a: Adjoint, kept: Sequence[Value], chunk: int | None) -> list[str]:
    """The docstring of the class: what it maps, keeps, and computes again."""
    stored = {p.name for p in (*a.program.parameters, *a.program.buffers)}
    text = f"From {listed([v.name for v in a.inputs if v.name not in stored]) or 'the weights'} to the output"
    text += "." if chunk is None else f", {chunk} tokens at a time."
    text += f" Keeps {listed([v.name for v in kept])}" if kept else " Keeps nothing but its inputs"
    again = listed([op.out.name for op in a.repeated])
    text += f"; the backward pass computes {again} again." if again else "."
    return docstring(textwrap.wrap(text, WIDTH - 10), 4)


def restored(a: Adjoint, saved: Sequence[str], first: int) -> list[str]:
    """The head of `backward`: what was saved, which gradients are wanted, and the refusal of those not planned.

    Args:
        a: whose backward pass it is.
        saved: how what it reads is written.
        first: arguments of the function before its inputs.
    """
    lines = wrapped("", saved, " = ctx.saved_tensors", parenthesised=True, margin=8)
    lines.append("needs = ctx.needs_input_grad")
    for k, v in enumerate(a.inputs):
        if v.name not in a.wanted:
            lines.append(f"if needs[{k + first}]:")
            lines += broken(f'    raise RuntimeError("this module was planned without a gradient of {v.name}")')
    return lines


def dense_seed(target: str, source: str) -> list[str]:
    """The gradient of the output, copied once if it is expanded or sliced, as those of sums and means are."""
    return [f"{target} = {source}.contiguous()  # one copy, where each product would make its own"]
