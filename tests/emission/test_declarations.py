"""The declaration in an emitted docstring is TOML that says what the layer's declaration says, whatever it holds."""

from __future__ import annotations

import ast
import math
import random
import textwrap
import tomllib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers_strategy import layers
from support.networks import random_folded_network, random_network

import tnmoe
from tnmoe.backends.torch.lines import docstring
from tnmoe.layers import toml
from tnmoe.presets.registry import FAMILIES

WIDTH = 100


def docstring_of(source: str) -> str:
    """Of the class that has a declaration; its gate's function is one without."""
    texts = [ast.get_docstring(node) or "" for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (text,) = (text for text in texts if "\nDeclaration:\n" in text)
    return text


def declared(source: str) -> Any:
    """What the block below "Declaration:" says to a reader of TOML."""
    block = docstring_of(source).partition("Declaration:\n")[2].partition("\n\n")[0]
    return tomllib.loads(textwrap.dedent(block))


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types, NaN being itself."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# What TOML can hold: text of Unicode scalar values.
TEXT = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="\"'\\\n\r\t #=[]{},.-abc\x00\x7f\x85\u2028é", max_size=12),
    st.sampled_from(
        ['"""', "'''", '"""\nimport os\n"""', "\\", "\\n", "\\\\", 'a"', "Declaration:\n", "\n\n", "x" * 120]
    ),
)
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), TEXT)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=20,
)
MAPPINGS = st.dictionaries(TEXT, VALUES, max_size=6)


@given(MAPPINGS, st.integers(10, 120))
def test_any_mapping_is_read_back(mapping: dict[str, Any], width: int) -> None:
    lines = toml.written(mapping, width)
    assert not any("\n" in line or "\r" in line for line in lines)
    assert same(tomllib.loads("\n".join(lines)), mapping)


@given(MAPPINGS)
def test_any_mapping_stays_within_its_docstring(mapping: dict[str, Any]) -> None:
    """No quote ends it, no backslash means another letter, no line is wrapped at the wrong place."""
    block = "\n    ".join(["Declaration:", *toml.written({"kind": "any", **mapping}, WIDTH - 8)])
    source = "\n".join(["class A:", *docstring(["First.", "", block, "", "Last."], 4), "    after = 1"])
    assert [type(node) for node in ast.parse(source).body[0].body] == [ast.Expr, ast.Assign]  # type: ignore[attr-defined]
    assert docstring_of(source).endswith("\n\nLast.")
    assert same(declared(source), {"kind": "any", **mapping})


@pytest.mark.parametrize(
    "text", ['"""', 'a"""\nimport os\n"""', "back\\slash", "\\", 'ends with "', "two\nlines", "tab\tand  blanks", "é μ"]
)
def test_a_layer_with_a_hostile_text(text: str) -> None:
    planned = tnmoe.plan(tnmoe.Linear(4, 3), tokens=2)
    hostile = {**planned.layer.declaration, "note": text, "table": {text: [text, {"a": text}]}}
    source = tnmoe.emit(replace(planned, layer=replace(planned.layer, declaration=hostile)))
    assert same(declared(source), hostile)


@pytest.mark.slow
@settings(max_examples=60)
@given(layers())
def test_layers_are_read_back_as_they_were_declared(spec: tnmoe.Spec) -> None:
    planned = tnmoe.plan(spec, tokens=3)
    read = declared(tnmoe.emit(planned))
    assert same(read, dict(planned.layer.declaration))
    assert tnmoe.declare(read).declaration == planned.layer.declaration


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_are_read_back(family: str) -> None:
    for row in FAMILIES[family][1]:
        declaration = row.spec.layer().declaration
        assert same(tomllib.loads("\n".join(toml.written(declaration, WIDTH - 8))), dict(declaration)), row.name


@pytest.mark.parametrize("seed", range(30))
def test_networks_are_read_back(seed: int) -> None:
    """Of tensors one by one where no expression says them; their lists and sizes take many lines."""
    rng = random.Random(seed)
    make = random_folded_network if seed % 2 else random_network
    network, sizes = make(rng, rng.randint(2, 7))
    planned = tnmoe.plan(network, sizes=sizes)
    source = tnmoe.emit(planned)
    assert same(declared(source), dict(planned.layer.declaration))
    assert tnmoe.declare(declared(source)).declaration == planned.layer.declaration


def test_long_values_are_broken_where_toml_allows_it() -> None:
    table = {f"size_{k}": 10**k for k in range(9)}
    lines = toml.written({"short": [1, 2], "names": ["name"] * 30, "sizes": table}, 40)
    assert lines[0] == "short = [1, 2]"
    assert lines[1] == "names = ["
    assert lines[2:32] == ['    "name",'] * 30
    assert lines[33] == "sizes.size_0 = 1"
    assert max(map(len, lines)) <= 40


def test_what_toml_has_no_form_for_is_refused() -> None:
    for value in (None, {1, 2}, object()):
        with pytest.raises(TypeError):
            toml.written({"a": value}, 80)
    assert toml.written({"a": math.nan, "b": -math.inf, "c": 1e300}, 80) == ["a = nan", "b = -inf", "c = 1e+300"]
