"""A stand-in for the μMoE reference implementation, `james-oldfield/muMoE`: the oracle of `test_reference.py`.

Written from the facts about its behaviour, not from its code: the same names and layouts in the state dict, the same
initial draws in the same order, and the same operations (a column of ones for the bias, a fixed order of einsums).
What it gets wrong is kept as well: `(B, I)` input grows a token axis, other ranks raise, the ones are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from entmax import entmax15
from torch import Tensor, einsum, nn


def _uniform(shape: Sequence[int], fan_in: int) -> nn.Parameter:
    """U(±1/√fan_in). The reference draws normals first and overwrites them, which moves the generator on."""
    weight = torch.randn(*shape)
    return nn.Parameter(weight.uniform_(-(fan_in**-0.5), fan_in**-0.5))


class CPFactors(nn.Module):
    """One CP layer: a factor (mode, R) for every level, the input (with a row for the bias) and the output."""

    def __init__(self, inputs: int, outputs: int, experts: Sequence[int], rank: int, bias: bool) -> None:
        super().__init__()
        self.bias = bias
        levels = []
        for level, count in enumerate(experts):
            start = torch.randn(count, rank) + 1.0
            levels.append(nn.Parameter(start if level == 0 else torch.ones_like(start)))
        self.factors = nn.ParameterList(
            [*levels, _uniform((inputs + bias, rank), inputs), _uniform((outputs, rank), rank)]
        )

    def forward(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        *levels, factor_in, factor_out = self.factors
        mixed = [einsum("btn,nr->btr", a, level) for a, level in zip(gates, levels)]
        projected = einsum("bti,ir->btr", _with_ones(x) if self.bias else x, factor_in)
        # One einsum of three or four operands, as the reference has it.
        terms = ",".join(["btr"] * (len(mixed) + 1)) + ",or->bto"
        return einsum(terms, *mixed, projected, factor_out)


class TensorRingFactors(nn.Module):
    """One tensor-ring layer: a core (r, mode, r') for every level, the input (with a row for the bias) and the output.

    `ranks` are r1 … r_{E+2}; core j lies between r_j and r_{j+1}, the last one between r_{E+2} and r1.
    """

    def __init__(self, inputs: int, outputs: int, experts: Sequence[int], ranks: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.bias = bias
        bonds = [*ranks, ranks[0]]
        cores = []
        for level, count in enumerate(experts):
            left, right = bonds[level], bonds[level + 1]
            core = torch.zeros(left, count, right)
            for n in range(count):  # drawn for every slice, used on the first level only
                noise = torch.randn(left, right)
                core[:, n, :] = torch.eye(left, right) * (1.0 + noise * (level == 0))
            cores.append(nn.Parameter(core))
        left, right = bonds[-3:-1]
        cores.append(_uniform((left, inputs + bias, right), inputs))
        cores.append(_uniform((right, outputs, bonds[0]), right * bonds[0]))
        self.factors = nn.ParameterList(cores)

    def forward(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        *levels, core_in, core_out = self.factors
        # Always from the first expert core onwards, whatever that costs.
        ring, *more = (einsum("btn,pnq->btpq", a, core) for a, core in zip(gates, levels))
        more.append(einsum("bti,pir->btpr", _with_ones(x) if self.bias else x, core_in))
        for matrix in more:
            ring = einsum("btpq,btqr->btpr", ring, matrix)
        return einsum("btpr,rop->bto", ring, core_out)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(*x.shape[:2], 1, device=x.device)], -1)


class ReferenceMuMoE(nn.Module):
    """A gated layer inputs → outputs, or with `second` a block inputs → outputs → second that shares the gate.

    Args:
        factors: `CPFactors` with an int, or `TensorRingFactors` with a list, for `ranks`.
        norm: of the gate's logits, "bn" (over batch and tokens) or "ln".
        apply_ln: normalise the input first; the gate reads it before the norm.
    """

    def __init__(
        self,
        factors: Callable[..., nn.Module],
        inputs: int,
        outputs: int,
        experts: Sequence[int],
        ranks: int | Sequence[int],
        *,
        second: int = 0,
        norm: str = "bn",
        bias: bool = True,
        apply_ln: bool = False,
        activation: Callable[[Tensor], Tensor] = entmax15,
    ) -> None:
        super().__init__()
        self.MuMoE = factors(inputs, outputs, experts, ranks, bias)
        if second:
            self.MuMoE2 = factors(outputs, second, experts, ranks, bias)
        self.input_ln = nn.LayerNorm(inputs) if apply_ln else nn.Identity()
        self.projs = nn.ParameterList([nn.Parameter(torch.zeros(inputs, n)) for n in experts])
        if norm == "bn":
            self.bn = nn.ModuleList([nn.BatchNorm1d(n, affine=False) for n in experts])
        else:
            self.ln = nn.ModuleList([nn.LayerNorm(n, elementwise_affine=False) for n in experts])
        self.activation = activation

    def gates(self, x: Tensor) -> list[Tensor]:
        """Expert coefficients (B, T, N_e) of every level."""
        found = []
        for e, projection in enumerate(self.projs):
            logits = x @ projection
            if hasattr(self, "bn"):
                logits = self.bn[e](logits.transpose(1, 2)).transpose(1, 2)
            else:
                logits = self.ln[e](logits)
            found.append(self.activation(logits))
        return found

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            x = x[:, None, :]
        gates = self.gates(x)
        y = self.MuMoE(self.input_ln(x), gates)
        return self.MuMoE2(nn.functional.gelu(y), gates) if hasattr(self, "MuMoE2") else y
