"""The command line's grammar: what all commands take together, and where each is."""

from __future__ import annotations

import argparse

from tnmoe._version import __version__
from tnmoe.cli.commands import cache, calibrate, check, cost, emit, fit, plan, report, table, tune
from tnmoe.cli.grammar import Parser
from tnmoe.presets import registry

COMMANDS = (table, plan, cost, emit, report, fit, check, tune, calibrate, cache)
"""In the order of the help."""

PRESET_NAMES = ", ".join(registry.FAMILIES)

EPILOG = f"""\
what to name:
  a preset       {PRESET_NAMES}: the paper's layers, each as MLP or linear, CP, TR, dense and sparse MoE;
                 moe: every family of mixtures at equal parameters and at equal MACs a token
  one row of it  {", ".join(list(registry.PRESETS)[:3])}, …
  a TOML file    with a [layer] table:

      [layer]
      kind = "mumoe_block"                                    # mumoe, mumoe_block, linear, mlp, dense_moe, …
      inputs = 768
      hidden = 3072                                           # a size is an integer or a symbol: "4*d"
      outputs = 768
      experts = 256                                           # or a hierarchy: [64, 8]
      factorization = {{ kind = "tensor_ring", ranks = [4, 4, 149] }}   # or {{ kind = "cp", rank = 556 }}
      gate = {{ activation = "entmax15", norm = "layer" }}      # softmax, sparsemax, sigmoid; batch, none
      bias = true
      input_norm = true

      [sizes]                                                 # values of symbols, if there are any
      d = 768

  a JSON file    a plan, as written by `tnmoe plan --format json -o FILE.json`

examples:
  tnmoe table gpt2 mixer clip               the paper's layers side by side
  tnmoe table gpt2 --format latex           the same for a paper
  tnmoe table moe --memory                  every family of mixtures, with what it keeps and its peaks
  tnmoe plan gpt2-tr                        the contraction order, step by step
  tnmoe cost gpt2-cp --formulas             every figure as a formula and a number
  tnmoe emit gpt2 -o gpt2_blocks.py         a standalone torch file, one class a layer
  tnmoe calibrate -o here.json              measure this machine, in under a minute
  tnmoe plan gpt2-tr --objective time --profile here.json   the order with the least predicted time
  tnmoe cost gpt2-tr --profile here.json    predicted time of each step on it
  tnmoe cost gpt2-tr --profile here.json --measure   and measured beside it
  tnmoe tune gpt2-tr --tokens 1             time its candidates here, and keep the fastest
  tnmoe check gpt2                          the emitted modules against dense einsum and torch's FLOP counter
  tnmoe cache                               what is kept between runs, and where; --clear removes it

exit codes: 0 fine, 1 a check failed, 2 bad input
"""


def parser() -> Parser:
    """The parser of the whole command line."""
    top = Parser(
        prog="tnmoe",
        description="Compile factorized mixture-of-experts layers: plan, emit torch source, count the cost exactly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tnmoe {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.declare(commands)
    return top
