"""Recurrent layers as one kernel. Where torch runs them step by step, their products are seen one by one."""

from __future__ import annotations

import math

from tnmoe.counting.torch_formulas.call import Call, Formula
from tnmoe.counting.work import Flops

SPECIAL = {4: 3 * 4 + 2, 3: 2 * 4 + 1}
"""For each hidden unit, by its gates: sigmoids in four each, and tanh; an LSTM has four gates, a GRU three."""


def _cell(gates: int) -> Formula:
    """A cell of which both products are done: sums of gates and biases, sigmoids and tanh."""

    def formula(call: Call) -> Flops:
        size = call.size
        sums = gates * (1 + (call["input_bias"] is not None) + (call["hidden_bias"] is not None))
        return Flops(elementwise=size * (sums + 3 + (gates == 3)), special=size * SPECIAL[gates])

    return formula


def _layers(call: Call) -> Flops:
    """Every matrix meets every step of every sequence; the cells as above, a plain one being one tanh."""
    x = call["input"]
    hidden = call["hidden_size"]
    weights = call["weight"] if call["weight"] is not None else [call[f"weight{k}"] for k in range(2)]
    rows = math.prod(x.shape[:-1])
    if call["batch_sizes"]:
        rows = sum(call["batch_sizes"])
    matrices = sum(w.numel() for w in weights if w.dim() == 2)
    gates = max(1, weights[0].shape[0] // hidden) if hidden else 1
    cells = rows * hidden * call["num_layers"] * (2 if call["bidirectional"] else 1)
    return Flops(2 * rows * matrices, cells * (3 * gates + 3), SPECIAL.get(gates, 1) * cells)


FORMULAS: dict[str, Formula] = {
    "aten::_thnn_fused_lstm_cell": _cell(4),
    "aten::_thnn_fused_gru_cell": _cell(3),
    "aten::mkldnn_rnn_layer": _layers,
    "aten::_cudnn_rnn": _layers,
    "aten::miopen_rnn": _layers,
}
