"""The reference semantics of the routing primitives, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tnmoe.backends.numpy.arrays import Array
from tnmoe.errors import ProgramError, no_rule
from tnmoe.ir.routing_ops import (
    CapacitySlots,
    Dropped,
    Gather,
    GroupedContract,
    LoadBalance,
    Missed,
    Noise,
    Normalise,
    PairPositions,
    ProductTopK,
    RoutingOp,
    ScatterAdd,
    Select,
    SortSlots,
    Spread,
    TopK,
    Unsort,
    ZLoss,
)
from tnmoe.ir.value import Value
from tnmoe.symbolic.dims import Dim, evaluate


def run_routing(op: RoutingOp, env: dict[str, Array], sizes: Mapping[str, Dim], training: bool) -> None:
    """Add what `op` computes to `env`; `sizes` gives every index's size.

    Raises:
        ProgramError: noise in training, which no reference can repeat; an axis that does not split.
    """
    out = op.out

    def get(value: Value) -> Array:
        return env[value.name]

    def size(index: str) -> int:
        return evaluate(sizes[index], {})

    match op:
        case TopK(_, positions, x):
            order = _best(get(x), size(out.indices[-1]))
            env[positions.name], env[out.name] = order, np.take_along_axis(get(x), order, -1)
        case ProductTopK(_, positions, lhs, rhs):
            sums = get(lhs)[..., :, None] + get(rhs)[..., None, :]  # the definition: all pairs
            flat = sums.reshape(*sums.shape[:-2], -1)
            order = _best(flat, size(out.indices[-1]))
            env[positions.name], env[out.name] = order, np.take_along_axis(flat, order, -1)
        case PairPositions(_, lhs, rhs, index):
            env[out.name] = get(lhs)[..., :, None] * size(index) + get(rhs)[..., None, :]
        case Noise(_, x):
            if training:
                raise ProgramError(f"{out.name!r} is drawn at random in training; execute it for evaluation")
            env[out.name] = get(x)
        case Normalise(_, x, positions, index):
            counted = get(x) if positions is None else np.where(get(positions) < size(index), get(x), 0)
            total = counted.sum(-1, keepdims=True)
            env[out.name] = np.divide(counted, total, out=np.zeros_like(counted), where=total != 0)
        case SortSlots(_, rows, counts, positions, block):
            flat, experts = get(positions).ravel(), size(counts.indices[0])
            alone = block == 1 or len(flat) <= 2 * experts
            total = len(flat) if alone else block * (experts + (len(flat) - experts) // block)
            place = np.zeros(len(flat), dtype=np.int64)
            tokens: list[int] = []
            per_expert: list[int] = []
            for n in range(experts):
                mine = np.flatnonzero(flat == n)
                place[mine] = len(tokens) + np.arange(len(mine))
                empty = 0 if alone else -len(mine) % block
                if len(mine) and not (flat > n).any():
                    empty = total - len(tokens) - len(mine)
                tokens += [*(mine // get(positions).shape[1]), *[0] * empty]
                per_expert.append(len(mine) + empty)
            env[out.name], env[rows.name] = place, np.array(tokens, dtype=np.int64)
            env[counts.name] = np.array(per_expert)
        case Unsort(_, x, slots):
            env[out.name] = get(x)[get(slots)].reshape(-1, size(out.indices[1]), get(x).shape[1])
        case CapacitySlots(_, rows, shares, positions):
            table = np.zeros([size(i) for i in out.indices], dtype=np.int64)
            held = np.zeros(table.shape, dtype=get(shares).dtype)
            used = [0] * len(table)
            for choice in range(get(positions).shape[1]):
                for token, expert in enumerate(get(positions)[:, choice]):
                    if used[expert] < table.shape[1]:
                        table[expert, used[expert]] = token
                        held[expert, used[expert]] = get(shares)[token, choice]
                        used[expert] += 1
            env[rows.name], env[out.name] = table, held
        case Gather(_, x, positions):
            env[out.name] = get(x)[get(positions)]
        case ScatterAdd(_, x, positions):
            total = np.zeros([size(i) for i in out.indices], dtype=get(x).dtype)
            np.add.at(total, get(positions), get(x))
            env[out.name] = total
        case Spread(_, x, positions):
            entries = np.ones(get(positions).shape) if x is None else get(x)
            spread = np.zeros((*entries.shape[:-1], size(out.indices[-1])), dtype=entries.dtype)
            np.put_along_axis(spread, get(positions), entries, -1)
            env[out.name] = spread
        case GroupedContract(_, lhs, rhs, bias, counts):
            product = np.zeros((len(get(lhs)), get(rhs).shape[2]), dtype=get(lhs).dtype)
            ends = np.cumsum(get(counts))
            for n, matrix in enumerate(get(rhs)):
                rows_of = slice(ends[n] - get(counts)[n], ends[n])
                product[rows_of] = get(lhs)[rows_of] @ matrix + (get(bias)[n] if bias else 0)
            env[out.name] = product
        case Select(_, x, index, position):
            env[out.name] = get(x).take(position, x.indices.index(index))
        case LoadBalance(_, x, positions):
            experts = get(x).shape[1]
            share = np.bincount(get(positions).ravel(), minlength=experts) / max(1, get(positions).size)
            env[out.name] = np.asarray(experts * (share * get(x).sum(0) / max(1, len(get(x)))).sum())
        case ZLoss(_, x):
            top = get(x).max(-1, keepdims=True)
            squares = (top[..., 0] + np.log(np.exp(get(x) - top).sum(-1))) ** 2
            env[out.name] = squares.sum() / max(1, squares.size)
        case Dropped(_, positions, rows):
            experts, places = (size(i) for i in rows.indices)
            counts_of = np.bincount(get(positions).ravel(), minlength=experts)
            env[out.name] = np.maximum(counts_of - places, 0).sum()
        case Missed(_, positions, index):
            env[out.name] = np.asarray(size(index) - len(np.unique(get(positions))))
        case _:
            no_rule(op, "what it computes")


def _best(x: Array, count: int) -> Array:
    """Positions of the largest entries of each row, largest first, NaN before all, earlier ones before later ones."""
    order = np.argsort(np.where(np.isnan(x), -np.inf, -x), axis=-1, kind="stable")
    return np.asarray(order[..., :count])
