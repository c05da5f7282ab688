"""The memory report of a planned layer: peaks, what is saved and why, and the timeline."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from tnmoe.costing.backward import gradient_sizes
from tnmoe.errors import CostError, unknown
from tnmoe.footprint.allocations import SCRATCH
from tnmoe.footprint.forward import inference, training
from tnmoe.footprint.own_backward import FunctionMemory
from tnmoe.footprint.routing_allocations import LOAD
from tnmoe.footprint.saved_tensors import Saved, merged, saved_by_autograd, saved_by_function
from tnmoe.footprint.tensor_bytes import TensorBytes
from tnmoe.footprint.timeline import CLASSES, Step
from tnmoe.ir.aliases import is_view
from tnmoe.ir.bound import BoundProgram
from tnmoe.ir.ops import propagate, results
from tnmoe.ir.routing_ops import GroupedContract
from tnmoe.ir.value import DTYPE_BYTES, INTEGER_BYTES, Role, Value
from tnmoe.planning.plan import Plan
from tnmoe.render.table import Cell, Table


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one layer, for one forward pass without grad, and for one training step.

    Attributes:
        plan: what is reported on; it also says which inputs need a gradient.
        dtype: of weights and activations.
        frozen: names of parameters that need no gradient, besides those declared so.
        call: what each call of the inference form runs, bound, if that is reported on: then there is no training.

    Raises:
        CostError: an unknown dtype or parameter, or a layer that cannot be emitted.
    """

    plan: Plan
    dtype: str = "float32"
    frozen: tuple[str, ...] = ()
    call: BoundProgram | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise CostError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPE_BYTES)}")
        names = [p.name for p in self.program.parameters]
        for name in self.frozen:
            if name not in names:
                raise CostError(unknown("parameter", name, names))

    @property
    def program(self) -> BoundProgram:
        """What is run, bound."""
        return self.plan.bound if self.call is None else self.call

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def _tensors(self) -> TensorBytes:
        requires_grad = propagate(self.program.ops, self.requires_grad, integers=False)
        return TensorBytes(self.program, self.itemsize, requires_grad)

    @cached_property
    def requires_grad(self) -> frozenset[str]:
        """Names of the leaves that need a gradient."""
        if self.call is not None:
            return frozenset()
        program = self.program
        inputs = [v.name for v in program.inputs if v.name in self.plan.input_gradients]
        weights = {p.name for p in program.parameters if p.role is Role.WEIGHT} - set(self.frozen)
        return frozenset(weights.union(inputs))

    @cached_property
    def _function(self) -> FunctionMemory | None:
        """Of a backward pass of its own; None if autograd makes it."""
        adjoint, function = self.plan.adjoint, self.plan.function
        if adjoint is None or function is None or self.call is not None:
            return None
        return FunctionMemory(adjoint, function.chunk, self.itemsize, self.requires_grad, function.flavour != "fast")

    @cached_property
    def inference(self) -> tuple[Step, ...]:
        """The timeline of a forward pass without grad, in evaluation mode."""
        own = self._function
        return tuple(inference(self.program, self.itemsize) if own is None else own.inference())

    @cached_property
    def training(self) -> tuple[Step, ...]:
        """The timeline of a forward pass with grad, and of `y.backward(gradient)`."""
        if self.call is not None:
            return ()
        own = self._function
        return tuple(training(self.program, self.itemsize, self.requires_grad) if own is None else own.training())

    @cached_property
    def saved(self) -> tuple[Saved, ...]:
        """What is kept for the backward pass besides weights and inputs, with the reason, in order of the forward."""
        own = self._function
        if own is None:
            return saved_by_autograd(self._tensors, self.program.order)
        by_autograd = saved_by_autograd(self._tensors, own.before)
        return merged(by_autograd, saved_by_function(own.adjoint, self._tensors) if own.differentiated else ())

    @property
    def weight_bytes(self) -> int:
        """Parameters and buffers."""
        return self._leaves(lambda v: v.name not in {i.name for i in self.program.inputs})

    @property
    def input_bytes(self) -> int:
        """Inputs, which are the caller's."""
        return self._leaves(lambda v: v.name in {i.name for i in self.program.inputs})

    @property
    def gradient_bytes(self) -> int:
        """Gradients of weights, after a training step; of sparse ones what they hold, positions once."""
        inputs = {v.name for v in self.program.inputs}
        numbers, positions = gradient_sizes(self.program, self.requires_grad - inputs)
        return int(self.itemsize * numbers + INTEGER_BYTES * positions)

    @property
    def input_gradient_bytes(self) -> int:
        """Gradients of inputs, which are the caller's."""
        return self._leaves(lambda v: v in self.program.inputs and v.name in self.requires_grad)

    @property
    def saved_bytes(self) -> int:
        """What is kept for the backward pass."""
        return sum(s.bytes for s in self.saved)

    @property
    def inference_peak(self) -> int:
        """Most bytes alive in a forward pass without grad, weights and input included."""
        return max((m.peak for m in self.inference), default=0)

    @property
    def forward_peak(self) -> int:
        """Most bytes alive in a forward pass with autograd, weights and input included."""
        return max((m.peak for m in self.training if m.phase == "forward"), default=0)

    @property
    def backward_peak(self) -> int:
        """Most bytes alive in the backward pass, weights, input, gradients, result and its gradient included.

        Of a gradient of the result that is not contiguous a backward pass of its own makes a copy, of one chunk at a
        time if it has chunks; where autograd makes it, each of the products that read it may. This is not counted: an
        expanded gradient, of a sum or a mean, takes hardly any bytes, so that its copy is what is counted for it.
        """
        return max((m.peak for m in self.training if m.phase == "backward"), default=0)

    @property
    def training_peak(self) -> int:
        """Most bytes alive in a training step, without the states of an optimizer."""
        return max(self.forward_peak, self.backward_peak)

    @property
    def largest(self) -> tuple[str, int]:
        """Name and bytes of the largest intermediate."""
        written = (v for op in self.program.ops if not is_view(op) for v in results(op))
        return max(((v.name, self._tensors.of(v)) for v in written), key=lambda pair: pair[1], default=("none", 0))

    def _leaves(self, wanted: Callable[[Value], bool]) -> int:
        return sum(self._tensors.of(v) for v in self.program.leaves if wanted(v))

    # ---- tables ----------------------------------------------------------------------------------------------

    def summary(self) -> Table:
        """One row for each figure."""
        name, largest = self.largest

        def at(steps: Collection[Step]) -> str:
            highest = max(steps, key=lambda m: m.peak, default=None)
            return "" if highest is None else f"at {highest.step}"

        forward = [m for m in self.training if m.phase == "forward"]
        backward = [m for m in self.training if m.phase == "backward"]
        trained = self.call is None
        kept: tuple[tuple[Cell, ...], ...] = (
            ("gradients", self.gradient_bytes + self.input_gradient_bytes, "of weights and inputs"),
            ("saved", self.saved_bytes, "kept for the backward pass"),
        )
        peaks: tuple[tuple[Cell, ...], ...] = (
            ("peak of forward", self.forward_peak, f"{at(forward)}, with autograd"),
            ("peak of backward", self.backward_peak, at(backward)),
        )
        rows: tuple[tuple[Cell, ...], ...] = (
            ("weights", self.weight_bytes, "parameters and buffers"),
            ("inputs", self.input_bytes, "the caller's"),
            *(kept if trained else ()),
            ("largest intermediate", largest, name),
            ("peak of inference", self.inference_peak, at(self.inference)),
            *(peaks if trained else ()),
        )
        columns = (("figure", "figure"), ("bytes", "bytes"), ("where", "where"))
        sorted_rows = any(isinstance(op, GroupedContract) for op in self.program.ops)
        notes = (
            "Peaks include weights and inputs; in training also the gradients, the result and its gradient, which the "
            "caller holds, contiguous; no states of an optimizer.",
            SCRATCH,
            *((LOAD,) if sorted_rows else ()),
        )
        return Table(f"Memory of {self._title}", columns, rows, notes)

    def saved_table(self) -> Table:
        """One row for each tensor that is kept for the backward pass, with the reason."""
        rows = tuple((s.name, " ".join(s.indices), s.bytes, "; ".join(s.reasons)) for s in self.saved)
        columns = (("tensor", "tensor"), ("indices", "indices"), ("bytes", "bytes"), ("reason", "reason"))
        notes = ("Weights and inputs that are read backwards exist anyway.",)
        return Table(f"Saved for backward by {self._title}", columns, rows, notes)

    def timeline(self) -> Table:
        """One row for each step: what is alive while it runs, by class, and afterwards."""
        rows: list[tuple[Cell, ...]] = []
        for m in (*self.inference, *self.training):
            rows.append((m.phase, m.step, *(m.live[c] for c in CLASSES), m.peak, m.after))
        columns = (
            ("phase", "phase"),
            ("step", "step"),
            *((c, c) for c in CLASSES),
            ("peak", "peak"),
            ("after", "after"),
        )
        notes = ("Bytes alive while a step runs, its scratch among the temporaries; and after it.",)
        return Table(f"Timeline of {self._title}", columns, tuple(rows), notes)

    def tables(self) -> tuple[Table, ...]:
        """All three; of an inference form, for which nothing is saved, two."""
        if self.call is not None:
            return self.summary(), self.timeline()
        return self.summary(), self.saved_table(), self.timeline()

    @property
    def _title(self) -> str:
        layer = self.plan.layer
        tokens = f", {self.plan.values[layer.token_symbol]:,} tokens" if layer.batched else ""
        form = "" if self.call is None else ", inference form"
        return f"{layer.name} ({layer.summary}){tokens}, {self.dtype}{form}"

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))
