"""The adjoint of a program: its backward pass as ops of the same closed set, with what is kept and what is repeated.

Reverse mode along the planned order. Layouts are settled: where the forward product is a matrix product over views, so
are those of both gradients, and each gradient has the layout of its value. So nothing is copied, and `op_cost` prices
the backward pass as it prices the forward one.

Gates and norms have no adjoint here: they, and all that they depend on, stay with torch's autograd. What remains is
the end of the program, from the gates on.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property

from tnmoe.autodiff.reverse_mode import DIFFERENTIABLE, fresh
from tnmoe.autodiff.reverse_mode import gradients as reverse
from tnmoe.costing.backward import training_cost
from tnmoe.costing.cost import Cost
from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.saved import saved_elements, saved_values
from tnmoe.errors import PlanError
from tnmoe.ir.aliases import is_view, memory_owners
from tnmoe.ir.dataflow import elements, gate_ops
from tnmoe.ir.ops import Op, operands
from tnmoe.ir.program import Program
from tnmoe.ir.value import Value
from tnmoe.ir.verify import verify
from tnmoe.lowering.fuse_products import fuse_products
from tnmoe.symbolic.dims import Dim


@dataclass(frozen=True)
class Adjoint:
    """A program whose end runs as one function with a backward pass of its own.

    Attributes:
        program: the whole forward program.
        requires_grad: names of all values that need a gradient; some may have been frozen since the gradients were
            made.
        before: ops that stay with autograd.
        ops: ops of the function; the last one defines the program's output.
        inputs: what the function reads: data, then stored values.
        gradients: the backward ops, from the gradient `seed` of the output to those of the inputs.
        seed: the gradient of the output.
        wanted: the gradient of each input that needs one, by the input's name.
        kept: names of the results of `ops` that are kept for the backward pass.
        fused: names of the results that the forward pass need not write, if they are not kept.
    """

    program: Program
    requires_grad: frozenset[str]
    before: tuple[Op, ...]
    ops: tuple[Op, ...]
    inputs: tuple[Value, ...]
    gradients: tuple[Op, ...]
    seed: Value
    wanted: Mapping[str, Value]
    kept: frozenset[str]
    fused: frozenset[str] = frozenset()

    @cached_property
    def forward(self) -> tuple[Op, ...]:
        """What the forward pass runs: `ops`, with what is fused and not kept computed inside what reads it."""
        return fuse_products(self.ops, self.fused - self.kept)

    @cached_property
    def executed(self) -> Program:
        """The whole forward program as it runs: that with `forward` at its end."""
        forward = self.forward
        return self.program if forward == self.ops else self.ending_in(forward)

    def ending_in(self, forward: tuple[Op, ...]) -> Program:
        """The whole forward program with `forward` after what stays before it; nothing is released."""
        return verify(replace(self.program, ops=self.before + forward, released={}), laid_out=True)

    @cached_property
    def reads(self) -> tuple[Value, ...]:
        """Values of the forward pass that the gradients are made from."""
        made = {op.out.name for op in self.gradients} | {self.seed.name}
        return tuple({v.name: v for op in self.gradients for v in operands(op) if v.name not in made}.values())

    @cached_property
    def repeated(self) -> tuple[Op, ...]:
        """Forward ops that the backward pass runs again: what it reads and has not kept."""
        missing = {v.name for v in self.reads}
        again: list[Op] = []
        for op in reversed(self.ops):
            if op.out.name in missing and op.out.name not in self.kept:
                again.append(op)
                missing |= {v.name for v in operands(op)}
        return tuple(reversed(again))

    @cached_property
    def backward(self) -> tuple[Op, ...]:
        """Everything that the backward pass runs, each repeated op right before its first use."""
        waiting = {op.out.name: op for op in self.repeated}
        ops: list[Op] = []

        def make(op: Op) -> None:
            for value in operands(op):
                if value.name in waiting:
                    make(waiting.pop(value.name))
            ops.append(op)

        for op in self.gradients:
            make(op)
        return tuple(ops)

    @cached_property
    def only_for(self) -> Mapping[Op, str]:
        """Backward ops that serve the gradient of one input alone, and that input; without it they do not run."""
        serves: dict[str, set[str]] = {}
        for name, gradient in self.wanted.items():
            serves.setdefault(gradient.name, set()).add(name)
        alone: dict[Op, str] = {}
        for op in reversed(self.backward):
            purposes = serves.get(op.out.name, set())
            for value in operands(op):
                serves.setdefault(value.name, set()).update(purposes)
            if len(purposes) == 1:
                alone[op] = next(iter(purposes))
        return alone

    @property
    def differentiated(self) -> bool:
        """Whether any input of the function needs a gradient, so that it has a backward pass at all."""
        return any(v.name in self.requires_grad for v in self.inputs)

    @cached_property
    def run(self) -> tuple[Op, ...]:
        """What the backward pass runs: ops that serve the gradient of one frozen input alone are left out."""
        only = self.only_for
        return tuple(op for op in self.backward if only.get(op, "") in self.requires_grad or op not in only)

    @cached_property
    def saved(self) -> tuple[Value, ...]:
        """Inputs and results of the function that are kept for its backward pass, in order of their definition."""
        used = {v.name for op in self.backward for v in operands(op)}
        results = tuple(op.out for op in self.ops if op.out.name in self.kept)
        return tuple(v for v in self.inputs + results if v.name in used)

    @cached_property
    def token(self) -> str:
        """The index along which the function can run in chunks: the first of the output and of all inputs that have it.

        Raises:
            PlanError: if there is none, or an op needs all of it at once.
        """
        out = self.program.output
        token = out.indices[0] if out.indices else ""
        data = [v.indices for v in self.inputs if token in v.indices]
        if token not in self.program.dynamic or not data or any(indices[0] != token for indices in data):
            raise PlanError(
                "chunk= needs tokens: an axis of the data alone, the first of the output and of every input that has it"
            )
        for op in self.ops:
            if any(token in v.indices for v in operands(op)) and token not in op.out.indices:
                raise PlanError(f"{op.out.name!r} sums over the tokens ({token}), so they cannot run in chunks")
        return token

    @cached_property
    def backward_program(self) -> Program:
        """The backward pass as a program; its inputs are what was saved and the gradient of the output."""
        stored = {p.name for p in (*self.program.parameters, *self.program.buffers)}
        data = tuple(v for v in self.saved if v.name not in stored)
        ops = self.backward
        program = replace(
            self.program,
            inputs=(*data, self.seed),
            ops=ops,
            output=ops[-1].out,
            released={},
            coefficients=(),
            diagnostics=(),
        )
        return verify(program, laid_out=True)

    def training_cost(self) -> Cost:
        """Work of forward and backward together, what is repeated included."""
        sizes = self.program.sizes
        backward = self.run if self.differentiated else ()
        own = sum((op_cost(op, sizes) for op in self.ops + backward), start=Cost())
        return own + training_cost(self.before, sizes, self.requires_grad)

    def saved_elements(self) -> Dim:
        """Elements kept by autograd and by the function, parameters, buffers and inputs aside."""
        owner = memory_owners(self.program)
        there = {v.name for v in self.program.leaves}
        there |= {owner[v.name] for op in self.before for v in saved_values(op, self.program.sizes, self.requires_grad)}
        kept = self.saved if self.differentiated else ()
        own = [elements(v.indices, self.program.sizes) for v in kept if owner[v.name] not in there]
        return sum(own, start=saved_elements(self.program, self.requires_grad, self.before))


def adjoint(
    program: Program,
    requires_grad: Set[str],
    kept: Set[str] | None = None,
    fused: Set[str] = frozenset(),
    *,
    chunked: bool = False,
) -> Adjoint:
    """The adjoint of the end of a program.

    Args:
        program: laid out; sizes may be symbolic.
        requires_grad: names of all values that need a gradient, as `gradient_names` returns them.
        kept: names of intermediate results to keep; the rest is computed again, views always. By default all that is
            read is kept.
        fused: names of results that the forward pass need not write.
        chunked: the function will be called several times, so what weights alone make stays before it, made once.

    Raises:
        PlanError: if nothing at the end of the program has an adjoint, or nothing there needs a gradient.
    """
    before, ops = split(program, chunked=chunked)
    seed = replace(program.output, name=fresh(program, f"{program.output.name}_grad"))
    differentiated = bool(ops) and program.output.name in requires_grad
    gradients, known = reverse(program, ops, seed, requires_grad) if differentiated else ((), {})
    if not gradients:  # an end that hands its gradient on, as a sum does, computes nothing backwards
        raise PlanError(
            "no backward pass can be written for this layer: its output comes straight from "
            f"{type(before[-1]).__name__ if before else 'its inputs'} or needs no gradient; leave memory= out"
        )
    made = {op.out.name for op in ops}
    read = {v.name: v for op in ops for v in operands(op) if v.name not in made}
    stored = [v for v in program.leaves if v not in program.inputs]
    data = [v for v in read.values() if v not in stored]
    data.sort(key=lambda v: v.indices[:1] != program.output.indices[:1])  # chunks are taken of the first ones
    inputs = (*data, *(v for v in stored if v.name in read))
    wanted = {v.name: known[v.name] for v in inputs if v.name in known}
    whole = Adjoint(
        program,
        frozenset(requires_grad),
        before,
        ops,
        inputs,
        gradients,
        seed,
        wanted,
        frozenset(kept or ()) - {op.out.name for op in ops if is_view(op)},
        frozenset(fused),
    )
    if kept is None:
        owner = memory_owners(program)
        whole = replace(whole, kept=frozenset({owner[v.name] for v in whole.reads} & made))
    _ = whole.backward_program  # which is verified
    return whole


def split(program: Program, *, chunked: bool = False) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The ops that stay with autograd, and the end of the program, of which every op has an adjoint.

    With `chunked`, what weights alone make stays before that end.
    """
    once = program.weight_only if chunked else frozenset[str]()
    # What makes the coefficients is a function of its own, if it can be one.
    outside, live = set(program.coefficients) if gate_ops(program) else set(), {program.output.name}
    before: list[Op] = []
    ops: list[Op] = []
    for op in reversed(program.ops):
        if op.out.name in outside | once or not isinstance(op, DIFFERENTIABLE):
            before.insert(0, op)
            outside |= {v.name for v in operands(op)}
        elif op.out.name in live:
            ops.insert(0, op)
            live |= {v.name for v in operands(op)}
    return tuple(before), tuple(ops)
