"""Write a result over the operand that it is made from, where nobody reads that any more and nothing has a gradient.

Only GELU: it has one operand, so the result is of the operand's type under autocast too, and has a batch under `vmap`
whenever the operand has one. A Hadamard product may not, so it stays out of place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tnmoe.ir.contractions import Contract, ContractAdd, Merge, Split
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.ops import operands
from tnmoe.ir.pointwise_ops import Gelu
from tnmoe.ir.program import Program
from tnmoe.ir.routing_ops import GroupedContract


def overwrite(program: Program) -> Program:
    """A program that nobody differentiates, which names in `overwrites` each GELU that can take its operand's memory.

    The operand is a product, or all of one in other axes, that nothing else reads: no op, diagnostic or caller.
    """
    made = {op.out.name: op for op in program.ops}
    reads = Counter(v.name for op in program.ops + program.diagnostics for v in operands(op))
    reads.update([program.output.name, *program.coefficients])

    def free(name: str) -> bool:
        op = made.get(name)
        if reads[name] != 1:
            return False
        if isinstance(op, Split | Merge) and not op.padded:
            return free(op.x.name)
        return isinstance(op, Contract | ContractAdd | GroupedContract | FusedOp)

    overwrites = {op.out.name: op.x.name for op in program.ops if isinstance(op, Gelu) and free(op.x.name)}
    return replace(program, overwrites=overwrites)
