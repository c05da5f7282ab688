"""What `benchmarks/blocks.py` compares: emitted modules, the reference's op order, an MLP, other libraries' layers."""

from __future__ import annotations

import contextlib
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import opt_einsum
import torch
from torch import Tensor, nn

import tnmoe

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.reference_module import CPFactors, ReferenceMuMoE, TensorRingFactors

CHUNK = 512

Block = tnmoe.MuMoE | tnmoe.MuMoEBlock


@dataclass
class Contender:
    """A module, how it is run, and the setting it runs under.

    Attributes:
        module: that runs forward, without gradients.
        trained: that is trained, if it is another one; None if none is.
        flag: with the user's opt-in to reduced precision, which sends float32 products to oneDNN.
        says: what was chosen for it, if something was.
        autocast: to bfloat16, forward.
    """

    module: nn.Module
    trained: nn.Module | None = None
    flag: bool = False
    says: str = ""
    autocast: bool = False

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """Without gradients."""
        with torch.no_grad(), onednn_flag(self.flag), self._autocast():
            result: Tensor = self.module(x)
            return result

    def training(self, x: Tensor, grad: Tensor) -> Tensor:
        """Forward and backward, with the gradient of the input and of every weight."""
        module = self.module if self.trained is None else self.trained
        x.grad = None
        for p in module.parameters():
            p.grad = None
        with onednn_flag(self.flag):
            with self._autocast():
                result: Tensor = module(x)
            result.backward(grad.view_as(result))
        return result.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


@contextlib.contextmanager
def onednn_flag(on: bool) -> Iterator[None]:
    """The user's opt-in to reduced precision for float32 products, which on many CPUs is oneDNN's float32."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if on else before
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def uses_onednn(module: nn.Module) -> bool:
    """Whether an emitted module of the flavour `fast` finds oneDNN's product worth calling here."""
    return getattr(sys.modules[type(module).__module__], "_onednn", None) is not None


def reference(spec: Block) -> ReferenceMuMoE:
    """The layer in the reference's op order, with gates that choose."""
    cp = isinstance(spec.factorization, tnmoe.CP)
    block = isinstance(spec, tnmoe.MuMoEBlock)
    module = ReferenceMuMoE(
        CPFactors if cp else TensorRingFactors,
        spec.inputs,
        spec.hidden if block else spec.outputs,
        spec.levels,
        spec.factorization.rank if cp else spec.factorization.ranks,
        second=spec.outputs if block else 0,
        norm="ln" if spec.gate.norm == "layer" else "bn",
        apply_ln=spec.input_norm,
    )
    for projection in module.projs:
        nn.init.normal_(projection, 0, 0.1)
    return module


def contenders(spec: Block, tokens: int, compiled: bool, tuning: float) -> dict[str, Contender]:
    """What is compared, by row; `tuning` is how many seconds `tnmoe.tune` may take for each of the two modes."""
    baseline = reference(spec)
    state = baseline.state_dict()
    compared = {"reference": Contender(baseline, baseline), "ref+flag": Contender(baseline, baseline, True)}
    if compiled:
        compared["compiled reference"] = Contender(torch.compile(baseline))
    chunk = CHUNK if tokens > CHUNK else None

    def built(plan: tnmoe.Plan) -> nn.Module:
        module = tnmoe.build(plan)
        module.load_state_dict(tnmoe.from_reference(plan, state))
        return module

    for row, way in {
        "portable": {},
        "portable, chunks": {"memory": "save", "chunk": chunk},
        "fast": {"flavour": "fast"},
        "fast, chunks": {"flavour": "fast", "chunk": chunk},
        "fast, recompute": {"flavour": "fast", "memory": "recompute", "chunk": chunk},
    }.items():
        if "chunks" not in row or chunk is not None:
            module = built(tnmoe.plan(spec, tokens=tokens, **way))
            compared[row] = Contender(module, module)
    if compiled:
        compared["portable, compiled"] = Contender(torch.compile(compared["portable"].module))
    if tuning:
        tuned = [tnmoe.tune(spec, tokens=tokens, training=t, budget=tuning) for t in (False, True)]
        said = "; ".join(f"{mode} {_said(t)}" for mode, t in zip(("forward", "training"), tuned, strict=True))
        compared["tuned"] = Contender(*(built(t.plan) for t in tuned), says=said)
    dense = mlp(spec)
    return compared | {"mlp": Contender(dense, dense), "mlp+flag": Contender(dense, dense, True)}


def mlp(spec: Block) -> nn.Module:
    """The MLP of the same shape, or the linear layer if there is no hidden one."""
    if not isinstance(spec, tnmoe.MuMoEBlock):
        return nn.Linear(spec.inputs, spec.outputs)
    layers = [nn.Linear(spec.inputs, spec.hidden), nn.GELU(), nn.Linear(spec.hidden, spec.outputs)]
    return nn.Sequential(*([nn.LayerNorm(spec.inputs)] if spec.input_norm else []), *layers)


def in_setting(spec: Block, tokens: int, *, bfloat16: bool, compiled: bool) -> dict[str, Contender]:
    """The reference, emitted modules and the MLP, each of them under autocast, compiled, or both."""
    baseline = reference(spec)
    modules: dict[str, nn.Module] = {"reference": baseline}
    for flavour in ("portable",) if compiled else ("portable", "fast"):
        plan = tnmoe.plan(spec, tokens=tokens, flavour=flavour)
        modules[flavour] = tnmoe.build(plan)
        modules[flavour].load_state_dict(tnmoe.from_reference(plan, baseline.state_dict()))
    modules["mlp"] = mlp(spec)
    if compiled:
        modules = {row: torch.compile(m) for row, m in modules.items()}
    return {row: Contender(m, m, autocast=bfloat16) for row, m in modules.items()}


def _said(tuned: object) -> str:
    """What was chosen, in a few words."""
    best = tuned.measured[tuned.chosen]
    v, function = best.variant, best.plan.function
    memory = "autograd" if function is None else v.memory or "save"
    return f"{v.layout}, {v.flavour}, {memory}, chunk {v.chunk or 'all'}"


def prepared_ring(tokens: int) -> dict[str, Callable[[], object]]:
    """The network of a GPT-2 TR layer alone: as opt_einsum's prepared expression, and emitted on the same order."""
    network = tnmoe.Network.parse("bn,anc,bi,cid,doa->bo", weights="anc cid doa")
    sizes = {"b": tokens, "n": 256, "i": 768, "o": 3072, "a": 4, "c": 4, "d": 149}
    plans = {flavour: tnmoe.plan(network, sizes=sizes, flavour=flavour) for flavour in ("portable", "fast")}
    arrays = {t.name: torch.randn([sizes[i] for i in t.indices]) for t in network.tensors}
    ids, linear = list(range(5)), []
    for k, (i, j) in enumerate(plans["portable"].path):
        linear.append((ids.index(i), ids.index(j)))
        ids = [n for n in ids if n not in (i, j)] + [5 + k]
    expression = opt_einsum.contract_expression(
        network.expression, *(tuple(a.shape) for a in arrays.values()), optimize=linear
    )
    runs: dict[str, Callable[[], object]] = {"contract_expression": lambda: expression(*arrays.values())}
    for flavour, plan in plans.items():
        module = tnmoe.build(plan)
        with torch.no_grad():
            for p in plan.program.parameters:
                order = [network.tensor(p.name).indices.index(i) for i in p.indices]
                getattr(module, p.name).copy_(arrays[p.name].permute(order))
            data = [arrays[v.name] for v in plan.layer.inputs]
            torch.testing.assert_close(module(*data), expression(*arrays.values()), rtol=1e-3, atol=1e-1)
        runs[flavour] = partial(module, *data)
    return runs


# ---- another library -------------------------------------------------------------------------------------------


class Reshaped(nn.Module):
    """An emitted network over split axes as a layer over whole ones."""

    def __init__(self, network: nn.Module, inputs: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, inputs) to (tokens, outputs)."""
        return self.network(x.unflatten(-1, self.inputs)).flatten(1)


def factorized(
    kind: str, width: int, modes: int, share: float, tokens: int, tuning: float
) -> tuple[str, dict[str, Contender]]:
    """A square layer of tensorly-torch and the same network emitted, with the same weights; and what they are.

    The axes of the matrix are split as tensorly-torch splits them, into so many modes each; the rank is the one that it
    finds for the share of parameters; both implementations of its forward pass take part. Each is checked against the
    matrix that its own factors reconstruct. There is no bias. tensorly-torch calls `torch.einsum` with all factors,
    which takes the best order if opt_einsum is installed, as it is here; else it would begin with the outer product of
    the input and the core.
    """
    from tltorch import FactorizedLinear
    from tltorch.utils import get_tensorized_shape

    shapes = get_tensorized_shape(width, width, order=modes, verbose=False) if modes > 1 else ((width,), (width,))
    into, out = (tuple(map(int, shape)) for shape in shapes)
    theirs = FactorizedLinear(into, out, bias=False, factorization=kind, rank=share, implementation="factorized")
    other = FactorizedLinear(into, out, bias=False, factorization=theirs.weight, implementation="reconstructed")
    weights, matrix = _network_of(kind, theirs.weight, into, out)
    with torch.no_grad():
        for w in weights.values():
            w.normal_(0, w.numel() ** -0.25)
        next(iter(weights.values())).div_(theirs.weight.to_matrix().std() * width**0.5)  # outputs as large as inputs
    rows, columns = matrix[: len(out)], matrix[len(out) :]
    network = tnmoe.Network.parse(f"b{columns},{','.join(weights)}->b{rows}", weights=" ".join(weights))
    sizes = {"b": tokens, **{i: n for term, w in weights.items() for i, n in zip(term, w.shape, strict=True)}}

    def built(plan: tnmoe.Plan) -> nn.Module:
        module = tnmoe.build(plan)
        with torch.no_grad():
            for p in plan.program.parameters:
                getattr(module, p.name).copy_(weights[p.name].permute([p.name.index(i) for i in p.indices]))
        return Reshaped(module, into)

    compared = {
        "tltorch, factorized": Contender(theirs, theirs),
        "tltorch, reconstructed": Contender(other, other),
    }
    for row, way in {"portable": {}, "fast": {"flavour": "fast"}}.items():
        module = built(tnmoe.plan(network, sizes=sizes, objective="training", **way))
        compared[row] = Contender(module, module)
    if tuning:
        tuned = [tnmoe.tune(network, sizes=sizes, training=t, budget=tuning) for t in (False, True)]
        said = "; ".join(f"{mode} {_said(t)}" for mode, t in zip(("forward", "training"), tuned, strict=True))
        compared["tuned"] = Contender(*(built(t.plan) for t in tuned), says=said)
    with torch.no_grad():
        x = torch.randn(64, width)
        dense = opt_einsum.contract(f"{','.join(weights)}->{matrix}", *weights.values()).reshape(width, width)
        torch.testing.assert_close(theirs(x), x @ theirs.weight.to_matrix().T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(compared["portable"].module(x), x @ dense.T, rtol=1e-3, atol=1e-3)
    count = sum(w.numel() for w in weights.values())
    what = f"modes {out} × {into}, rank {theirs.weight.rank}, {count:,} parameters ({100 * count / width**2:.1f} %)"
    return f"{what}, no bias: {network.expression}", compared


def _network_of(
    kind: str, weight: nn.Module, into: tuple[int, ...], out: tuple[int, ...]
) -> tuple[dict[str, Tensor], str]:
    """The parameters of a factorized matrix by the terms of an einsum, and the matrix's term: outputs, then inputs."""
    letters = iter(c for c in string.ascii_lowercase if c != "b")  # which counts the tokens
    rows, columns = [next(letters) for _ in out], [next(letters) for _ in into]
    modes = [*rows, *columns]
    if kind == "cp":
        bond = next(letters)
        terms, tensors = [bond, *(m + bond for m in modes)], [weight.weights, *weight.factors]
    elif kind == "tucker":
        bonds = [next(letters) for _ in modes]
        terms = ["".join(bonds), *(m + r for m, r in zip(modes, bonds, strict=True))]
        tensors = [weight.core, *weight.factors]
    else:  # a train of matrices: cores (bond, output, input, bond), the first and the last bond being 1
        bonds = ["", *(next(letters) for _ in into[1:]), ""]
        terms = [bonds[k] + rows[k] + columns[k] + bonds[k + 1] for k in range(len(into))]
        tensors = [core.squeeze() for core in weight.factors]
    return dict(zip(terms, tensors, strict=True)), "".join(modes)
