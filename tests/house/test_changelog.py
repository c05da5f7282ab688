"""Fragments of the changelog are such that a release can gather them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]
TYPES = [kind["directory"] for kind in SETTINGS["type"]]
FRAGMENTS = sorted((ROOT / SETTINGS["directory"]).glob("*"))


def test_types_are_those_of_keep_a_changelog() -> None:
    assert TYPES == ["added", "changed", "deprecated", "removed", "fixed", "security"]


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: p.name)
def test_a_fragment_has_a_type_and_one_bullet(path: Path) -> None:
    """`+name.type.md`, whose text becomes the bullet."""
    assert re.fullmatch(rf"\+[\w-]+\.({'|'.join(TYPES)})\.md", path.name)
    text = path.read_text(encoding="utf-8")
    assert text.strip()
    assert not text.startswith(("-", "*", "#"))


def test_a_release_knows_where_to_write() -> None:
    changelog = (ROOT / SETTINGS["filename"]).read_text(encoding="utf-8")
    assert changelog.count("<!-- towncrier release notes start -->") == 1
