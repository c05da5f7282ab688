"""Python snippets of Markdown pages: run in order, with what they print and what their comments say compared."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

SKIPPED = ("def forward", "reference_module")  # shown, or in need of somebody else's module


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def run(text: str, module: ModuleType, capsys: pytest.CaptureFixture[str]) -> int:
    """Run all Python blocks in one namespace.

    Lines that start with a comment are what the block prints; an attribute or a call with a comment behind it,
    `report.parameters  # 4754008`, is that value.

    Returns the number of values and prints compared.
    """
    compared = 0
    for block in blocks(text, "python"):
        if any(word in block for word in SKIPPED):
            continue
        capsys.readouterr()
        exec(compile(block, module.__name__, "exec"), module.__dict__)
        if printed := re.findall(r"^# (.*)$", block, re.M):
            assert capsys.readouterr().out == "\n".join(printed) + "\n"
            compared += 1
        shown = re.findall(r"^(report\.[^#\n]+?) +# (.+)$", block, re.M)
        if "report = tnmoe.cost(plan)\n" not in block:
            continue
        for expression, comment in shown:
            assert str(eval(expression, module.__dict__)) == comment
            compared += 1
    return compared
