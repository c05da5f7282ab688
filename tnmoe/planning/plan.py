"""A plan: a layer, an order for each of its networks, and the sizes it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from rich.text import Text

from tnmoe.autodiff.adjoint import Adjoint
from tnmoe.autodiff.backward_plan import Function
from tnmoe.costing.backward import gradient_names, training_cost
from tnmoe.costing.objective import FLOPS, Objective
from tnmoe.costing.op_cost import Estimate, estimate, op_cost
from tnmoe.costing.saved import saved_elements
from tnmoe.costing.step_table import step_table
from tnmoe.errors import PlanError
from tnmoe.footprint.liveness import bound
from tnmoe.io.files import json_text
from tnmoe.ir.bound import BoundProgram
from tnmoe.ir.contractions import Permute
from tnmoe.ir.fused_ops import FusedOp
from tnmoe.ir.layer import Layer
from tnmoe.ir.network import note
from tnmoe.ir.path import ContractionPath
from tnmoe.ir.program import Folded, Program
from tnmoe.lowering.fold_weights import fold_weights
from tnmoe.lowering.lower import lower, lower_steps, turnable
from tnmoe.lowering.orient import Layout, resolve
from tnmoe.planning import plan_json
from tnmoe.planning.shortlist import Shortlist
from tnmoe.render.contraction_tree import contraction_tree
from tnmoe.render.scene import Scene
from tnmoe.render.table import Table


@dataclass(frozen=True)
class Plan:
    """What `tnmoe.plan` returns. Its figures are read off the program; it has no cost formula of its own.

    Attributes:
        layer: what was planned.
        paths: the order of each network, by the name of the value it defines.
        values: the integer of every symbol, declared or assumed while planning (the tokens are `T`).
        minimised: the objective; `objective` is its text.
        input_gradients: names of the inputs that need a gradient, for the figures about training.
        function: what the emitted module computes with a backward pass of its own; None leaves that to autograd.
        shortlist: what it was chosen among, under the objectives "time" and "layout".
        saved_limit: the most that `saved` was allowed to be; what is proven is proven of orders within it.
        memory_limit: the most bytes that a forward pass was allowed to hold at once; likewise.
        turned: names of the weights stored (columns, inner), as `nn.Linear` does, all others being (inner, columns),
            where a matrix product may read them either way (`turnable`); None leaves that to their sizes.
    """

    layer: Layer
    paths: Mapping[str, ContractionPath]
    values: Mapping[str, int]
    minimised: Objective = FLOPS
    input_gradients: tuple[str, ...] = ()
    shortlist: Shortlist | None = None
    function: Function | None = None
    saved_limit: int | None = None
    memory_limit: int | None = None
    turned: tuple[str, ...] | None = None

    @property
    def objective(self) -> str:
        """What was minimised, as text: `tnmoe.plan` reads it, too."""
        return str(self.minimised)

    @cached_property
    def program(self) -> Program:
        """The ops, with symbolic sizes."""
        return lower(self.layer, self.paths, self.layer.bound_sizes(self.values), self.turned)

    @property
    def turnable(self) -> tuple[str, ...]:
        """Names of the weights that may be stored (columns, inner) as well as (inner, columns)."""
        return tuple(turnable(self.program))

    def store(self, layout: Layout) -> Plan:
        """The plan with its weights stored another way; what it keeps for the backward pass stays the same.

        Args:
            layout: "auto" by their sizes; "rows": every weight (inner, columns), as `x @ weight` reads it; "columns":
                every one (columns, inner), as `nn.Linear` stores it; or the names of those that are (columns, inner).

        Raises:
            PlanError: another text, or a name that is none of `turnable`.
        """
        turned = resolve(layout, self.turnable)
        return self if turned == self.turned else replace(self, turned=turned)

    @cached_property
    def bound(self) -> BoundProgram:
        """The ops, with integer sizes, as they are emitted unless `executed` fuses some."""
        return bound(self.program, self.values)

    @cached_property
    def executed(self) -> Program:
        """The ops, with integer sizes, as the emitted module's forward pass runs them."""
        return self.bound if self.adjoint is None else self.adjoint.executed

    @cached_property
    def folded(self) -> Folded:
        """The program, with symbolic sizes, parted into what weights alone determine and what every call does."""
        return fold_weights(self.program)

    @cached_property
    def _numbers(self) -> Estimate:
        return estimate(self.executed)

    @property
    def path(self) -> tuple[tuple[int, int], ...]:
        """SSA pairs of the only network.

        Raises:
            PlanError: if the layer has several; see `paths`.
        """
        if len(self.paths) != 1:
            raise PlanError(f"this plan orders {len(self.paths)} networks; take one of paths[{', '.join(self.paths)}]")
        (only,) = self.paths.values()
        return only.steps

    @property
    def orders(self) -> dict[str, str]:
        """The order of each network as text, nested products of its tensors."""
        return {
            node.out.name: self.paths[node.out.name].tree([t.name for t in node.network.tensors])
            for node in self.layer.contractions
        }

    @property
    def macs(self) -> int:
        """MACs of one forward pass."""
        return int(self._numbers.total.macs)

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass, all classes."""
        return int(self._numbers.total.flops)

    @property
    def folding_flops(self) -> int:
        """Those of `flops` that make what depends on weights alone: where these stay the same, they are spent once."""
        once = self.executed.weight_only
        work = zip(self.executed.ops, self._numbers.per_op, strict=True)
        return sum(int(cost.flops) for op, cost in work if op.out.name in once)

    @property
    def copied(self) -> int:
        """Elements that one forward pass copies because two steps want them in different orders of axes."""
        work = zip(self.executed.ops, self._numbers.per_op, strict=True)
        return sum(int(cost.activations) for op, cost in work if isinstance(op, Permute))

    @property
    def training_flops(self) -> int:
        """FLOPs of one forward and backward pass, all classes."""
        own = self.adjoint
        if own is not None:
            return int(own.training_cost().flops)
        return int(training_cost(self.bound.ops, self.bound.sizes, self._requires_grad).flops)

    @property
    def saved(self) -> int:
        """Elements that one forward pass keeps for the backward pass, besides parameters and inputs."""
        own = self.adjoint
        return int(saved_elements(self.bound, self._requires_grad) if own is None else own.saved_elements())

    @cached_property
    def adjoint(self) -> Adjoint | None:
        """The backward pass of the emitted function, with integer sizes; None if autograd does it."""
        return None if self.function is None else self.function.adjoint(self.bound, self._requires_grad)

    @property
    def flavour(self) -> str:
        """Of the emitted function's products, one of `tnmoe.autodiff.backward_plan.FLAVOURS`."""
        return "portable" if self.function is None else self.function.flavour

    @cached_property
    def _requires_grad(self) -> frozenset[str]:
        return gradient_names(self.bound, self.input_gradients)

    @property
    def exact(self) -> bool:
        """True if every order is proven to be the best under the objective."""
        return all(p.exact for p in self.paths.values())

    @property
    def proof(self) -> str:
        """What is known of the choice, in a few words."""
        if self.shortlist is not None:
            return self.shortlist.summary
        proof = "proven optimal" if self.exact else "not proven optimal"
        if self.memory_limit is not None:
            return f"{proof} with at most {self.memory_limit:,} bytes alive at once"
        return proof if self.saved_limit is None else f"{proof} with at most {self.saved_limit:,} elements saved"

    def table(self) -> Table:
        """One row for each op: operands, result, MACs, FLOPs and size, in the order in which they run."""
        sizes = ", ".join(f"{k} = {v:,}" for k, v in sorted(self.values.items()))
        planners = ", ".join(sorted({p.planner for p in self.paths.values()}))
        notes: tuple[str, ...] = (
            f"Objective {self.objective}, {self.proof} ({planners}). Sizes: {sizes}.",
            f"Total: {self.macs:,} MACs, {self.flops:,} FLOPs. Size counts elements.",
        )
        if once := self.folding_flops:
            notes += (f"Of these, {once:,} FLOPs make what depends on weights alone.",)
        if copied := self.copied:
            notes += (f"{copied:,} elements are copied into another order of axes.",)
        notes += tuple(f"{n.out.name}: {said}" for n in self.layer.contractions if (said := note(n.network)))
        if self.turned is not None:
            notes += (f"Weights stored (columns, inner): {', '.join(self.turned) or 'none'}.",)
        if self.shortlist is not None:
            notes += self.shortlist.notes()
        if fused := [op.out.name for op in self.executed.ops if isinstance(op, FusedOp)]:
            notes += (f"Computed in one kernel, with the products that are read there alone: {', '.join(fused)}.",)
        table = step_table(self.executed, self._numbers, f"Plan of {self.layer.name} ({self.layer.summary})")
        return replace(table, notes=notes)

    def diagram(self, network: str | None = None) -> Scene:
        """The order of a network as a tree, a node's area being its step's share of the forward FLOPs.

        Args:
            network: the value that the network defines; it may be left out where only one network has an order to
                choose.

        Raises:
            PlanError: there is no such network, or several to choose from.
        """
        nodes = {c.out.name: c for c in self.layer.contractions}
        if network is None:
            chosen = [name for name, c in nodes.items() if len(c.network.tensors) > 2] or list(nodes)
            if len(chosen) > 1:
                raise PlanError(f"this plan orders several networks; name one of {', '.join(chosen)}")
            (network,) = chosen
        if network not in nodes:
            raise PlanError(f"no network defines {network!r}; the plan has {', '.join(nodes)}")
        node, path = nodes[network], self.paths[network]
        steps = lower_steps(node, path)
        costs = [sum(int(op_cost(op, self.bound.sizes).flops) for op in step) for step in steps]
        results = [" ".join(step[-1].out.indices) for step in steps]
        leaves = [f"{t.name} [{' '.join(t.indices)}]" for t in node.network.tensors]
        return contraction_tree(leaves, path.steps, results[: len(path.steps)], costs, title=f"Order of {network}")

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Text:
        return Text(str(self))

    def _repr_html_(self) -> str:
        chosen = [c.out.name for c in self.layer.contractions if len(c.network.tensors) > 2]
        trees = [f"<p><b>{name}</b></p>{self.diagram(name).svg()}" for name in chosen]
        return "\n".join([self.table().render("html"), *trees])

    # ---- JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON: the declaration, the values, the objective and the SSA paths."""
        return json_text(
            {
                "format": plan_json.FORMAT,
                "declaration": dict(self.layer.declaration),
                "values": dict(self.values),
                "objective": self.objective,
                "input_gradients": list(self.input_gradients),
                "paths": {name: path.to_mapping() for name, path in self.paths.items()},
                **({} if self.shortlist is None else {"shortlist": self.shortlist.to_mapping()}),
                **({} if self.saved_limit is None else {"saved_limit": self.saved_limit}),
                **({} if self.memory_limit is None else {"memory_limit": self.memory_limit}),
                **({} if self.turned is None else {"turned": list(self.turned)}),
                **({} if self.function is None else {"function": self.function.to_mapping()}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: if it is no such text, or its paths do not fit its networks.
            DeclarationError: if its declaration is faulty.
        """
        fields = plan_json.read(text)
        plan = cls(
            fields.layer,
            fields.paths,
            fields.values,
            fields.objective,
            fields.inputs,
            fields.shortlist,
            saved_limit=fields.saved_limit,
            memory_limit=fields.memory_limit,
        )
        plan = plan if fields.turned is None else plan.store(fields.turned)
        function = fields.function.maybe(lambda data: Function.read(data, plan.bound, plan._requires_grad))
        return replace(plan, function=function)
