"""From networks and orders to primitive ops. Planners price a step with `lower_step`, the very code that runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tnmoe.errors import PlanError
from tnmoe.ir.contractions import Add, Contract, Multiply, Permute, Reduce
from tnmoe.ir.dataflow import needed
from tnmoe.ir.layer import Contraction, Layer
from tnmoe.ir.network import Network
from tnmoe.ir.ops import Op
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.program import Program, data_lengths
from tnmoe.ir.value import Value
from tnmoe.ir.verify import verify
from tnmoe.lowering.assign_layouts import assign_layouts
from tnmoe.lowering.fuse_bias import fuse_bias
from tnmoe.lowering.orient import Stored, orient
from tnmoe.lowering.orient import turnable as turnable_of
from tnmoe.lowering.prune import prune
from tnmoe.lowering.share import share


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor while its network is contracted.

    Attributes:
        main: the tensor without the extra entry of a folded index.
        folded: True while it carries the folded index.
        extra: its slice at the extra entry; None stands for all ones (the data tensor's own).
    """

    main: Value
    folded: bool = False
    extra: Value | None = None


def leaf_operands(network: Network, part: str = "") -> tuple[Operand, ...]:
    """The network's tensors as operands, in order."""
    bias = network.bias
    leaves = []
    for tensor in network.tensors:
        main = Value(tensor.name, tensor.indices, part)
        if bias is not None and tensor.name == bias.weight:
            leaves.append(Operand(main, True, Value(bias.tensor.name, bias.tensor.indices, part)))
        else:
            leaves.append(Operand(main, bias is not None and tensor.name == bias.data))
    return tuple(leaves)


def lower_pair(lhs: Value, rhs: Value, keep: frozenset[str], name: str) -> tuple[Op, ...]:
    """Ops that multiply two values and sum every index outside `keep`, the result being called `name`.

    An index that only one operand has, and that is not kept, is summed out of it first.
    """
    ops: list[Op] = []
    left, right = lhs.indices, rhs.indices
    for side, (value, other) in enumerate(((lhs, right), (rhs, left))):
        wanted = tuple([i for i in value.indices if i in keep or i in other])
        if wanted != value.indices:
            reduced = Value(f"{name}_{value.name}", wanted, value.part)
            ops.append(Reduce(reduced, value))
            lhs, rhs = (reduced, rhs) if side == 0 else (lhs, reduced)
    left, right = lhs.indices, rhs.indices
    joint = left + tuple([i for i in right if i not in left])
    kept = tuple([i for i in joint if i in keep])
    out = Value(name, kept, lhs.part)
    ops.append(Multiply(out, lhs, rhs) if len(kept) == len(joint) else Contract(out, lhs, rhs))
    return tuple(ops)


def lower_step(lhs: Operand, rhs: Operand, keep: frozenset[str], name: str) -> tuple[tuple[Op, ...], Operand]:
    """Ops of one contraction step and its result; a folded bias goes along as a slice of its own.

    With x̃ = (x, 1) and Ũ = (U, u): x̃ᵀŨ = xᵀU + u. While the folded index is open, a product with a third
    tensor is taken of the main part and of the slice; ones are never stored.
    """
    if not (lhs.folded or rhs.folded):
        ops = lower_pair(lhs.main, rhs.main, keep, name)
        return ops, Operand(ops[-1].out)
    if lhs.folded and rhs.folded:
        product = lower_pair(lhs.main, rhs.main, keep, f"{name}_linear")
        extra: tuple[Op, ...] = ()
        if lhs.extra is None and rhs.extra is None:
            raise PlanError(f"step {name!r} joins two folded operands without a bias")
        if lhs.extra is not None and rhs.extra is not None:
            extra = lower_pair(lhs.extra, rhs.extra, keep, f"{name}_bias")
        else:
            extra = _reduce(lhs.extra or rhs.extra, keep, f"{name}_bias")
        source = extra[-1].out if extra else (lhs.extra or rhs.extra)
        assert source is not None
        linear = product[-1].out
        out = Value(name, linear.indices, linear.part)
        return (*product, *extra, Add(out, linear, source)), Operand(out)
    folded, other = (lhs, rhs) if lhs.folded else (rhs, lhs)
    product = lower_pair(folded.main, other.main, keep, name)
    if folded.extra is None:
        extra = _reduce(other.main, keep, f"{name}_bias")
        slice_ = extra[-1].out if extra else other.main
    else:
        extra = lower_pair(folded.extra, other.main, keep, f"{name}_bias")
        slice_ = extra[-1].out
    return product + extra, Operand(product[-1].out, True, slice_)


def _reduce(value: Value | None, keep: frozenset[str], name: str) -> tuple[Op, ...]:
    assert value is not None
    wanted = tuple([i for i in value.indices if i in keep])
    return () if wanted == value.indices else (Reduce(Value(name, wanted, value.part), value),)


def lower_network(node: Contraction, path: ContractionPath) -> tuple[Op, ...]:
    """Ops of one network in the order of `path`; the last one defines `node.out`."""
    return tuple(op for step in lower_steps(node, path) for op in step)


def lower_steps(node: Contraction, path: ContractionPath) -> tuple[tuple[Op, ...], ...]:
    """Ops of each step of one network; a network of one tensor takes one step."""
    network = node.network
    path.check(len(network.tensors))
    live = dict(enumerate(leaf_operands(network, node.out.part)))
    inside = {k: frozenset([t.name]) for k, t in enumerate(network.tensors)}
    wanted = frozenset(network.output)
    steps: list[tuple[Op, ...]] = []
    for k, (i, j) in enumerate(path.steps):
        lhs, rhs = live.pop(i), live.pop(j)
        new = len(network.tensors) + k
        inside[new] = inside[i] | inside[j]
        keep = wanted.union(*(t.indices for n, t in enumerate(network.tensors) if t.name not in inside[new]))
        name = node.out.name if not live else node.names.get(inside[new], f"{node.out.name}_partial_{k}")
        step, live[new] = lower_step(lhs, rhs, keep, name)
        steps.append(step)
    (last,) = live.values()
    if not path.steps:  # a single tensor, to be summed or at least given its own name
        kept = tuple(i for i in last.main.indices if i in wanted)
        out = Value(node.out.name, kept, node.out.part)
        steps.append((Reduce(out, last.main) if kept != last.main.indices else Permute(out, last.main),))
    return tuple(steps)


def lower(
    layer: Layer,
    paths: Mapping[str, ContractionPath],
    sizes: Mapping[str, int],
    turned: Collection[str] | None = None,
) -> Program:
    """The program of a layer, with symbolic sizes.

    Args:
        layer: what to compute.
        paths: each network's order, by the name of the value it defines.
        sizes: an integer for every index, by which layouts are chosen: how weights are stored, and whether a small
            matrix is broadcast instead of a tensor copied. No other op depends on it.
        turned: names of the weights that are stored (columns, inner); by default the sizes decide.

    Raises:
        PlanError: if a path is missing or does not fit.
    """
    return stages(layer, paths, sizes, turned)[-1][1]


def stages(
    layer: Layer,
    paths: Mapping[str, ContractionPath],
    sizes: Mapping[str, int],
    turned: Collection[str] | None = None,
) -> tuple[tuple[str, Program], ...]:
    """The program as it is lowered, then as each pass leaves it, by the name of the pass; arguments as of `lower`."""
    ops: list[Op] = []
    for node in layer.nodes:
        if isinstance(node, Contraction):
            if node.out.name not in paths:
                raise PlanError(f"no path for {node.out.name!r}; the plan has {sorted(paths)}")
            ops += lower_network(node, paths[node.out.name])
        else:
            ops.append(node)
    program = Program(
        inputs=layer.inputs,
        parameters=layer.parameters,
        buffers=layer.buffers,
        ops=tuple(ops),
        output=layer.output,
        sizes=layer.sizes,
        coefficients=layer.coefficients,
        diagnostics=layer.diagnostics,
    )
    return run_passes(replace(program, lengths=data_lengths(program)), sizes, turned)


def run_passes(
    program: Program, sizes: Mapping[str, int], turned: Collection[str] | None = None
) -> tuple[tuple[str, Program], ...]:
    """Every pass, in order; each is a pure function of a program and is verified."""
    stages = [("lowered", verify(program))]

    def then(name: str, after: Program, laid_out: bool = False) -> Program:
        stages.append((name, verify(after, laid_out=laid_out)))
        return after

    program = then("share", share(program))
    program = then("prune", prune(program))
    program = then("fuse_bias", fuse_bias(program))
    program = _together(program)
    program = assign_layouts(program, sizes)
    then("assign_layouts", _apart(program), laid_out=True)
    then("orient", _apart(orient(program, sizes, turned)), laid_out=True)
    return tuple(stages)


def turnable(program: Program) -> dict[str, Stored]:
    """The weights of a lowered program that may be stored either way, by name."""
    return turnable_of(_together(program))


def _together(program: Program) -> Program:
    """Diagnostics at the end of the ops, so that layouts are decided for all at once."""
    return replace(program, ops=program.ops + program.diagnostics)


def _apart(program: Program) -> Program:
    """Only what the output needs among the ops, the rest as diagnostics; `_together` undone."""
    if not program.diagnostics:
        return program
    ops = needed(program.ops, [program.output.name])
    return replace(program, ops=ops, diagnostics=tuple(op for op in program.ops if op not in ops))
