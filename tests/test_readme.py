"""The README is true: its snippets run, its numbers and its table are what is printed."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import tnmoe
from tnmoe.cli import main
from tnmoe.layers import KINDS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one namespace; a bare expression with a comment of numbers or a formula must equal it."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    compared = 0
    for block in blocks("python"):
        if "def forward" in block or "reference_module" in block:
            continue
        capsys.readouterr()
        exec(block, namespace)
        if printed := re.findall(r"^# (.*)$", block, re.M):
            assert capsys.readouterr().out == "\n".join(printed) + "\n"
        for expression, comment in re.findall(r"^(report\.[^#\n]+?) +# (.+)$", block, re.M):
            if "report = tnmoe.cost(plan)\n" in block:
                assert str(eval(expression, namespace)) == comment
                compared += 1
    assert compared == 2
    assert (tmp_path / "cp_layer.py").is_file()


def test_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = blocks("text")
    with pytest.raises(SystemExit) as stop:
        main(["table", "gpt2"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(shown.rstrip("\n"))


def test_forward_is_what_is_emitted() -> None:
    (shown,) = [b for b in blocks("python") if "def forward" in b]
    from tnmoe.presets import PRESETS

    assert shown.rstrip() in tnmoe.emit(tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=256))


def test_toml_and_keys_are_the_schema() -> None:
    (example,) = blocks("toml")
    assert tnmoe.declare(tomllib.loads(example)["layer"]).name == "TensorRingMuMoEBlock"
    for kind, spec in KINDS.items():
        (row,) = re.findall(rf"^\| `{kind}` \| `([^`]*)`", README, re.M)
        assert set(re.sub(r"= \w+|[\[\]]", " ", row).split()) == {f.name for f in fields(spec)}
