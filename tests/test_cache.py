"""The cache on disk gives back what was kept, survives damage and other processes, and never fails loudly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tnmoe.io import cache

KEY = cache.key("thing", {"a": 1})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def entries(home: Path) -> list[Path]:
    return sorted(p for p in home.rglob("*") if p.is_file())


@pytest.mark.parametrize("value", [{}, {"x": [1, 2.5, None, "é\ud800", {"y": 10**400}]}, {"big": "x" * 10**6}])
def test_what_is_put_is_got(home: Path, value: dict[str, object]) -> None:
    assert cache.get(KEY) is None
    assert cache.put(KEY, value)
    assert cache.get(KEY) == value
    assert cache.get(cache.key("thing", {"a": 2})) is None
    assert cache.put(KEY, {"later": 1})
    assert cache.get(KEY) == {"later": 1}
    assert len(entries(home)) == 1


def test_a_key_is_of_the_question_and_not_of_its_spelling() -> None:
    assert cache.key("plan", {"a": 1, "b": [1, 2]}) == cache.key("plan", {"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": 1, "b": None}, {"a": True}, {"a": 1.0}]
    assert len({cache.key("plan", q) for q in different}) == len(different)
    assert cache.key("plan", {"a": 1}) != cache.key("atlas", {"a": 1})


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TNMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "tnmoe"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # an empty variable counts as unset, by the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "tnmoe"
    assert cache.put(KEY, {"a": 1})
    assert cache.get(KEY) == {"a": 1}
    assert entries(tmp_path / ".cache" / "tnmoe")
    monkeypatch.setenv("TNMOE_CACHE", "~/own")
    assert cache.folder() == tmp_path / "own"
    assert cache.get(KEY) is None


@pytest.mark.parametrize("word", ["off", "OFF", " Off "])
def test_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("TNMOE_CACHE", word)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cache.put(KEY, {"a": 1})
    assert cache.get(KEY) is None
    assert not list(tmp_path.iterdir())


def damage(data: bytes) -> dict[str, bytes]:
    head, _, body = data.partition(b"\n")
    other = json.loads(head) | {"key": cache.key("thing", {"a": 2})}
    older = json.loads(head) | {"format": "tnmoe-cache-0"}
    return {
        "empty": b"",
        "cut short": data[:-1],
        "cut in half": data[: len(data) // 2],
        "head alone": head,
        "a digit changed": data.replace(b"12345", b"12346"),
        "more behind": data + b" ",
        "binary": bytes(range(256)) * 8,
        "deep": b"[" * 100_000,
        "of another key": json.dumps(other).encode() + b"\n" + body,
        "of another version": json.dumps(older).encode() + b"\n" + body,
    }


@pytest.mark.parametrize("case", damage(b'{"key": 1}\n{}'))
def test_damaged_entries_are_misses_and_written_again(home: Path, case: str) -> None:
    cache.put(KEY, {"n": 12345})
    (path,) = entries(home)
    whole = path.read_bytes()
    path.write_bytes(damage(whole)[case])
    assert cache.get(KEY) is None
    assert cache.put(KEY, {"n": 12345})
    assert path.read_bytes() == whole
    assert cache.get(KEY) == {"n": 12345}


def test_every_flipped_bit_is_noticed(home: Path) -> None:
    cache.put(KEY, {"n": 12345, "text": "abc"})
    (path,) = entries(home)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = cache.get(KEY)
        assert found is None or found == {"n": 12345, "text": "abc"}


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be, a folder where the entry should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path / "file"))
    assert not cache.put(KEY, {"a": 1})
    assert cache.get(KEY) is None
    assert cache.clear() == 0
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path))
    (tmp_path / "entries" / f"{KEY}.json").mkdir(parents=True)
    assert not cache.put(KEY, {"a": 1})
    assert cache.get(KEY) is None
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tnmoe")], "a temporary file is left"


def test_a_disk_that_fails_midway(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tnmoe.io.files.os.replace", full)
        assert not cache.put(KEY, {"a": 2})
    assert cache.get(KEY) == {"a": 1}
    assert len(entries(home)) == 1


def test_clear_removes_entries_alone(home: Path) -> None:
    for k in range(3):
        cache.put(cache.key("thing", {"k": k}), {"k": k})
    (home / "profile-cpu.json").write_text("mine")
    assert cache.clear() == 3
    assert [p.name for p in entries(home)] == ["profile-cpu.json"]


WRITER = """
import random, sys
from tnmoe import cache
me, rng = int(sys.argv[1]), random.Random(sys.argv[1])
keys = [cache.key("thing", {"k": k}) for k in range(3)]
seen = 0
for turn in range(60):
    k = rng.randrange(3)
    found = cache.get(keys[k])
    if found is not None:
        seen += 1
        assert found["k"] == k and len(found["filling"]) == found["length"], found
        assert set(found["filling"]) == {found["by"]}, "two writers are mixed"
    length = rng.randrange(1, 20_000)
    assert cache.put(keys[k], {"k": k, "by": me, "length": length, "filling": [me] * length})
print(seen)
"""


def test_many_processes_at_once(home: Path) -> None:
    """Every read is a whole entry of one writer, and no temporary file is left."""
    command = [sys.executable, "-c", WRITER]
    running = [
        subprocess.Popen([*command, str(k)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for k in range(12)
    ]
    ended = [(p.communicate(timeout=300), p.returncode) for p in running]
    for (_, errors), status in ended:
        assert status == 0, errors
    assert sum(int(out) for (out, _), _ in ended) > 100
    assert len(entries(home)) == 3
    assert all(p.suffix == ".json" and not p.name.startswith(".") for p in entries(home))
    assert {os.stat(p).st_mode & 0o600 for p in entries(home)} == {0o600}
