"""Whatever a file holds, its reader gives the thing or its own error: the place, what is wanted, what is there."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device_by_hand import by_hand

import tnmoe
from tnmoe.errors import DeclarationError, FileError, PlanError, TnmoeError
from tnmoe.io.json_fields import Field, read_json
from tnmoe.ir.network import Network
from tnmoe.ir.path import ContractionPath
from tnmoe.planners.atlas.atlas import Atlas
from tnmoe.timing.datasheet import Datasheet
from tnmoe.timing.device_profile import DeviceProfile


def field(value: Any, path: str = "a.b") -> Field:
    return Field(value, "a list of things", FileError, path)


WRONG: dict[str, tuple[Callable[[Field], object], Any, str]] = {
    "no object": (lambda f: f.keys("x"), [], "a.b of a list of things must be an object with x, got []"),
    "a key lacks": (lambda f: f.keys("x", "y"), {"x": 1}, "a.b of a list of things lacks 'y'; its keys are x, y"),
    "a key more": (
        lambda f: f.keys("x", optional=("size",)),
        {"x": 1, "sise": 2},
        "a.b of a list of things: unknown key 'sise'; did you mean 'size'? allowed: x, size",
    ),
    "no keys": (
        lambda f: f.some_keys(["x", "y"]),
        {},
        "a.b of a list of things must be an object with some of x, y, got {}",
    ),
    "other keys": (
        lambda f: f.some_keys(["x", "y"]),
        {"x": 1, "z": 1},
        "a.b of a list of things must be an object with some of x, y, got {'x': 1, 'z': 1}",
    ),
    "no list": (lambda f: f.items(of="rows"), "ab", "a.b of a list of things must be a list of rows, got 'ab'"),
    "a list of another length": (
        lambda f: f.items(1000, "rows"),
        [1],
        "a.b of a list of things must be a list of 1,000 rows, got [1]",
    ),
    "no text": (Field.text, 3, "a.b of a list of things must be text, got 3"),
    "blank": (Field.words, " ", "a.b of a list of things must be text that says something, got ' '"),
    "no choice": (lambda f: f.choice(("x", "y")), ["x"], "a.b of a list of things must be one of x, y, got ['x']"),
    "not all texts": (Field.texts, ["x", 1], "a.b[1] of a list of things must be text, got 1"),
    "other texts": (
        lambda f: f.texts("xy"),
        ["x", "z"],
        "a.b of a list of things must be some of x, y, got ['x', 'z']",
    ),
    "twice": (lambda f: f.texts("xy"), ["x", "x"], "a.b of a list of things must be some of x, y, got ['x', 'x']"),
    "no flag": (Field.flag, 1, "a.b of a list of things must be true or false, got 1"),
    "a float": (Field.integer, 1.0, "a.b of a list of things must be an integer, got 1.0"),
    "a flag": (Field.integer, True, "a.b of a list of things must be an integer, got True"),
    "too small": (lambda f: f.integer(1), 0, "a.b of a list of things must be an integer from 1, got 0"),
    "too large": (lambda f: f.integer(1, 9999), 10**4, "must be an integer from 1 to 9,999, got 10000"),
    "zero": (Field.number, 0, "a.b of a list of things must be a positive number, got 0"),
    "infinite": (lambda f: f.number(zero=True), math.inf, "must be a number from 0, got inf"),
    "no number": (Field.number, math.nan, "must be a positive number, got nan"),
    "a flag for a number": (Field.number, True, "must be a positive number, got True"),
    "null": (Field.integer, None, "must be an integer, got None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    read, value, message = WRONG[case]
    with pytest.raises(FileError) as caught:
        read(field(value))
    assert str(caught.value).endswith(message)


def test_what_is_right_is_given() -> None:
    keys = field({"x": 1, "y": [2, "z"]}, "").keys("x", "y", optional=("w",))
    assert [keys["x"].integer(1, 1), keys["w"].maybe(Field.integer), keys["x"].maybe(Field.integer)] == [1, None, 1]
    first, second = keys["y"].items(2)
    assert (first.number(), second.text(), second.words(), second.choice(("y", "z"))) == (2.0, "z", "z", "z")
    assert (first.where, keys["w"].where) == ("y[0] of a list of things", "w of a list of things")
    assert field(["a", "b"]).texts() == field(["a", "b"]).texts("cba") == ("a", "b")
    assert (field(False).flag(), field(0).number(zero=True), field(-3).integer()) == (False, 0.0, -3)
    assert list(field({"q": 1}).entries()) == list(field({"q": 1}).some_keys("pq")) == ["q"]


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(10**6)), 10**4000, {"k" * 10**6: 1}, {"k": "v" * 10**6}])
def test_messages_stay_short(value: Any) -> None:
    with pytest.raises(FileError) as caught:
        field(value).flag()
    assert len(str(caught.value)) < 400
    if isinstance(value, dict):
        with pytest.raises(FileError) as caught:
            next(iter(field(value).entries().values())).flag()
        assert len(str(caught.value)) < 400


NO_DOCUMENTS = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "open": '{"format": "x-1"',
    "another format": '{"format": "x-2"}',
    "no format": "{}",
    "a format that is none": '{"format": ["x-1"]}',
    "a number without end": '{"format": "x-1", "a": ' + "1" * 5000 + "}",
    "nesting without end": '{"format": "x-1", "a": ' + "[" * 100_000,
    "a key twice": '{"format": "x-1", "a": 1, "a": 2}',
    "a key twice, deep down": '{"format": "x-1", "a": [{"b": {"c": 1, "c": 1}}]}',
    "the format twice": '{"format": "x-1", "format": "x-1"}',
}


@pytest.mark.parametrize("case", NO_DOCUMENTS)
def test_what_is_no_document(case: str) -> None:
    with pytest.raises(FileError, match="a list of things must be"):
        read_json(NO_DOCUMENTS[case], "a list of things", "x-1", FileError)


def test_a_document() -> None:
    data = read_json('{"a": [1], "format": "x-1"}', "a list of things", "x-1", FileError)
    assert data.where == "a list of things"
    assert data.keys("a")["a"].items()[0].where == "a[0] of a list of things"


# ---- every reader --------------------------------------------------------------------------------------------


@cache
def documents() -> dict[str, tuple[Callable[[str], Any], Any]]:
    """Readers of files, and a good file for each."""
    layer = tnmoe.MuMoE(6, 5, 4, tnmoe.CP(3), tnmoe.Gate("softmax", "layer"))
    network = Network.parse("bn,nr,bi,ir,ro->bo", weights="nr ir ro")
    atlas = tnmoe.atlas(network, bounds={"b": (1, 64), "n": 4, "r": (2, 16), "i": 8, "o": 8})
    sheet = Path(tnmoe.__file__).parent / "profiles" / "h100.json"
    texts: dict[str, tuple[Callable[[str], Any], str]] = {
        "plan": (tnmoe.Plan.from_json, tnmoe.plan(layer, tokens=7, memory="recompute", flavour="fast").to_json()),
        "shortlist": (
            tnmoe.Plan.from_json,
            tnmoe.plan(layer, tokens=7, objective="time", profile=by_hand()).to_json(),
        ),
        "network": (tnmoe.Plan.from_json, tnmoe.plan(network, sizes=dict.fromkeys("bnrio", 3)).to_json()),
        "profile": (DeviceProfile.from_json, by_hand().to_json()),
        "data sheet": (Datasheet.from_json, sheet.read_text(encoding="utf-8")),
        "atlas": (Atlas.from_json, atlas.to_json()),
    }
    return {name: (read, json.loads(text)) for name, (read, text) in texts.items()}


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys: Any = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(node[key], (*at, key))


def deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


JUNK = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        10**30,
        1.5,
        math.nan,
        math.inf,
        1e-40,
        "",
        "x",
        "a->",
        "9**9**9",
        "\ud800",
        "import",
    ),
    *([], [[1]], [1, 2], ["x", "x"], [[0, 1], [0, 1]], {}, {"a": []}, {"format": "x"}, deep(300)),
)
NAMES = ("plan", "shortlist", "network", "profile", "data sheet", "atlas")


@pytest.mark.parametrize("name", NAMES)
def test_good_documents_are_read(name: str) -> None:
    read, data = documents()[name]
    thing = read(json.dumps(data))
    if hasattr(thing, "to_json"):
        assert json.loads(thing.to_json()) == data


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=250)
@given(st.data())
def test_no_corruption_escapes_the_family_of_errors(name: str, data: st.DataObject) -> None:
    """A value replaced, dropped, doubled or renamed: a short error of the family, or a valid thing."""
    read, good = documents()[name]
    # First how deep, then where: the many items of long lists must not drown the keys.
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for place in places(good):
        by_depth.setdefault(len(place), []).append(place)
    *path, last = data.draw(st.sampled_from(by_depth[data.draw(st.sampled_from(sorted(by_depth)))]))
    changed = copy.deepcopy(good)
    node = changed
    for key in path:
        node = node[key]
    match data.draw(st.sampled_from(["replace", "replace", "drop", "another"])):
        case "replace":
            node[last] = data.draw(st.sampled_from(JUNK))
        case "drop":
            del node[last]
        case _ if isinstance(node, dict):
            node["another"] = node[last]
        case _:
            node.append(copy.deepcopy(node[last]))
    message = None
    try:
        read(json.dumps(changed))
    except (PlanError, DeclarationError) as error:
        message = str(error)
    assert message is None or 10 < len(message) < 1000


@pytest.mark.parametrize("name", ["plan", "profile", "data sheet", "atlas"])
def test_every_key_of_a_document_is_required_and_none_is_unknown(name: str) -> None:
    read, good = documents()[name]
    optional = {"function", "closed"}
    for key in good.keys() - optional:
        with pytest.raises(TnmoeError):
            read(json.dumps({k: v for k, v in good.items() if k != key}))
    with pytest.raises(TnmoeError, match="unknown key 'another'"):
        read(json.dumps({**good, "another": 1}))
    with pytest.raises(TnmoeError, match="stands twice"):
        read(json.dumps(good)[:-1] + ', "format": "x"}')


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5), st.text(), st.booleans())
def test_paths_are_read_back(steps: list[tuple[int, int]], planner: str, exact: bool) -> None:
    path = ContractionPath(tuple(steps), planner, exact)
    data = json.loads(json.dumps(path.to_mapping()))
    assert ContractionPath.read(Field(data, "a plan", PlanError)) == path
