"""The inference form of an emitted class: what is stored, and how it is made from the trained weights."""

from __future__ import annotations

from tnmoe.backends.torch.lines import axes_comment, broken, indented
from tnmoe.backends.torch.methods import Frozen, Unit
from tnmoe.backends.torch.names import attribute
from tnmoe.backends.torch.statements import Writer
from tnmoe.ir.contractions import Merge, Split
from tnmoe.ir.ops import operands
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value


def freeze_method(frozen: Frozen) -> list[str]:
    """`freeze` of the trained class."""
    return [
        f"    def freeze(self) -> '{frozen.unit.name}':".replace("'", '"'),
        '        """The inference form: what weights alone determine is made once, of weights as they are."""',
        f"        return {frozen.unit.name}(self)",
    ]


def frozen_init(trained: Unit) -> list[str]:
    """`__init__` of the inference form: reads the trained weights, folds them, stores the results as buffers."""
    assert trained.frozen is not None
    folded, orders = trained.frozen.folded, trained.frozen.orders
    program = trained.frozen.unit.program
    read = folded.read
    writer = Writer(Program(read, (), (), folded.once, program.output, program.sizes))
    lines = [
        "    @torch.no_grad()",
        f'    def __init__(self, trained: "{trained.name}") -> None:',
        "        super().__init__()",
    ]
    used = {v.name for op in folded.once for v in operands(op)}
    for value in read:
        if value.name in used:
            source = _ordered(f"trained.{attribute(value.name)}", value, orders[value.name])
            lines += indented(broken(f"{writer.ref(value.name)} = {source}", axes_comment(value.indices)))
    for op in folded.once:
        lines += indented(writer.statement(op))
    views = {op.out.name for op in folded.once if isinstance(op, Split | Merge)}  # of what was trained, perhaps
    for p in (*program.parameters, *program.buffers):
        value = Value(p.name, p.indices, p.part)
        source = writer.ref(p.name)
        if value in read:
            kept = source if p.name in used else _ordered(f"trained.{attribute(p.name)}", value, orders[p.name])
            as_is = orders[p.name] == p.indices
            source = f"{kept}.clone({'' if as_is else 'memory_format=torch.contiguous_format'})"
        elif p.name in views:
            source += ".clone()"
        lines += indented(broken(f'self.register_buffer("{attribute(p.name)}", {source})', axes_comment(p.indices)))
    return [*lines, "        self.eval()"]


def _ordered(source: str, value: Value, order: tuple[str, ...]) -> str:
    """A trained weight, with its axes in the order in which this form reads them."""
    if order == value.indices:
        return source
    return f"{source}.permute({', '.join(str(order.index(i)) for i in value.indices)})"
