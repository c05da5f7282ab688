"""The emitted statements of a program, each as a function of its own, so that they can be timed one by one."""

from __future__ import annotations

from tnmoe.backends.torch.statements import Writer
from tnmoe.ir.ops import operands, results
from tnmoe.ir.program import Program


def step_sources(program: Program, product: str = "@") -> str:
    """Functions `step_1`, … of the inputs and the operands, one for each op: its very statement, in evaluation mode.

    They call what the emitted module has above its class, so they are to stand below it.

    Args:
        program: bound and laid out.
        product: what multiplies two matrices, as in the emitted module.
    """
    writer = Writer(program, attributes=False, product=product)
    functions = []
    for k, op in enumerate(program.ops, start=1):
        names = dict.fromkeys(writer.ref(v.name) for v in (*program.inputs, *operands(op)))
        sizes = [f"{name} = {where}" for name, where in writer.runtime_sizes([op]).items()]
        mode = ["training, momentum = False, 0.0"]
        body = [*sizes, *mode, *writer.statement(op), "return " + ", ".join(writer.ref(v.name) for v in results(op))]
        functions.append("\n".join([f"def step_{k}({', '.join(names)}):", *(f"    {line}" for line in body), ""]))
    return "\n\n".join(functions)
