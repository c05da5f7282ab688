"""Variance-preserving initialisation of any network of factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import sympy

from tnmoe.factorizations.base import Factors, Modes, Sizes, stage_names
from tnmoe.ir.initialise import Init, SharedUniform, Uniform
from tnmoe.ir.layer import AxisSplit
from tnmoe.ir.value import Parameter
from tnmoe.symbolic.dims import Dim

Indices = tuple[str, ...]


def start(factors: Mapping[str, Indices], modes: Modes, sizes: Sizes, opened: Sequence[str]) -> dict[str, Init]:
    """How each factor starts, by name, so that the mixed map has nn.Linear's variance 1 / (3 I).

    Entries of different factors are independent with mean zero, so the variance of an entry of W is the product of
    the factors' variances, times the sizes of all summed bonds. Each bond is paid for by the first factor after the
    first one that has it. Factors with an expert index start around one shared draw, so that the experts start
    alike but not equal; what mixing makes of that is paid for by the last factor.

    Args:
        factors: indices by name; the first one starts as nn.Linear's weights do.
        modes: of the weight tensor.
        sizes: of all indices.
        opened: the indices that are no bonds: experts, input and output (or their parts).
    """
    names = list(factors)
    unpaid = {i for indices in factors.values() for i in indices} - set(opened)
    shares: dict[str, Dim] = {}
    for name in (*names[1:], names[0]):
        paid = [i for i in factors[name] if i in unpaid]
        unpaid -= set(paid)
        shares[name] = sympy.prod([sizes.sizes[i] for i in paid])
    shares[names[-1]] *= _mixing([set(indices) for indices in factors.values()], modes)
    shares[names[0]] *= 3 * modes.fan_in
    return {name: _uniform(indices, modes, shares[name]) for name, indices in factors.items()}


def _uniform(indices: Indices, modes: Modes, share: Dim) -> Init:
    """Entries of variance 1 / share, with a shared part of that variance along expert indices."""
    own = tuple(i for i in indices if i in modes.experts)
    bound = sympy.sqrt(sympy.Integer(3) / share)
    return SharedUniform(own, bound) if own else Uniform(bound)


def _mixing(factors: list[set[str]], modes: Modes) -> Dim:
    """Σ_{n,n'} Π a_n a_n' Π_f (1 + [f has the same experts under n and n']), the energy of the mixed factors.

    Multiplied out, each set of factors asks for equality along all their expert indices: a level that is asked for
    contributes Σ a², one that is not (Σ a)².
    """
    having = [f & set(modes.experts) for f in factors if f & set(modes.experts)]
    total: Dim = sympy.Integer(0)
    for equal in _unions(having):
        moments = zip(modes.experts, modes.gate_sums, strict=True)
        total += sympy.prod([s2 if n in equal else sympy.sympify(s1) ** 2 for n, (s1, s2) in moments])
    return total


def _unions(sets: list[set[str]]) -> Iterator[set[str]]:
    """The union of every subset."""
    for chosen in range(1 << len(sets)):
        yield set().union(*(s for k, s in enumerate(sets) if chosen >> k & 1))


def assemble(
    factors: Mapping[str, Indices],
    modes: Modes,
    sizes: Sizes,
    *,
    prefix: str,
    bias: bool,
    splits: tuple[AxisSplit, ...] = (),
) -> Factors:
    """Parameters for factors in the order of the reference (experts, input, output), with their initialisation.

    The bias is one more slice of the factor that has the input index; if that index is in parts, or in several
    factors, it is (experts…, output) and is added by itself.

    Args:
        factors: indices by name, without the prefix.
        modes, sizes, prefix, bias: as in `Factorization.factors`.
        splits: of the input and the output.
    """
    part = prefix.rstrip("_")
    parts = {s.index: s.parts for s in splits}
    ends = [i for m in (modes.input, modes.output) for i in parts.get(m, (m,))]
    holders = [name for name, indices in factors.items() if modes.input in indices]
    # The input's factor starts like nn.Linear's, the last of the others takes what is left.
    first = holders[:1] or list(factors)[:1]
    order = [*first, *(name for name in factors if name not in first)]
    inits = start({name: factors[name] for name in order}, modes, sizes, (*modes.experts, *ends))
    made = {name: Parameter(prefix + name, indices, inits[name], part) for name, indices in factors.items()}
    folded = added = None
    if bias and len(holders) == 1:
        indices = tuple(i for i in factors[holders[0]] if i != modes.input)
        stem = "bias" if modes.output in indices else "input_bias"
        folded = Parameter(prefix + stem, indices, inits[holders[0]], part)
    elif bias:
        whole = (*modes.experts, modes.output)
        share = 3 * modes.fan_in * _mixing([set(whole)], modes)
        added = Parameter(f"{prefix}bias", whole, _uniform(whole, modes, share), part)
    input_name = prefix + holders[0] if len(holders) == 1 else ""
    names: dict[frozenset[str], str] = {}
    experts = [made[f] for f, indices in factors.items() if set(indices) & set(modes.experts)]
    if input_name and made[holders[0]] not in experts and len(experts) == len(modes.experts):
        names = stage_names(prefix, experts, made[holders[0]])
    elif modes.experts or splits:
        mixing = frozenset(f"a{e + 1}" for e in range(len(modes.experts)))
        both = frozenset(p.name for p in made.values())
        names = {both: prefix + "whole", both | {"x"}: prefix + "outputs", both | mixing: prefix + "mixture"}
        for factor in made.values():
            alone = frozenset([factor.name])
            names |= {
                alone | mixing | {"x"}: prefix + "gated",
                alone | mixing: prefix + "mixed",
                alone | {"x"}: prefix + "inner",
            }
    return Factors(tuple(made.values()), folded, input_name, names, added, splits)
