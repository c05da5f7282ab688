"""The cache on disk gives back what was kept, stays within its limit, survives damage and other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import platformdirs.macos
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device_by_hand import by_hand

from tnmoe.cli.main import main
from tnmoe.errors import FileError
from tnmoe.io import cache
from tnmoe.timing.device_profile import default_path, kept_profiles, load_cached

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
        assert cache.get(KEY) in (None, {"n": 12345, "text": "abc"})


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be, a folder where the entry should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path / "file"))
    assert not cache.put(KEY, {"a": 1})
    assert cache.get(KEY) is None
    assert cache.clear() == []
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
    assert [e.kind for e in cache.clear()] == ["thing"] * 3
    assert [p.name for p in entries(home)] == ["profile-cpu.json"]


# ---- places --------------------------------------------------------------------------------------------------

# As the version before the limit wrote it, byte for byte.
OLD_KEY = "search-015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
OLD = (
    f'{{"format": "tnmoe-cache-1", "key": "{OLD_KEY}", '
    '"sha256": "253bcc0aa01815a6df0b8fcb659d2cbbc664a033d679f38175433c794eb611a1"}\n'
    '{"steps":[[0,1]],"planner":"search","exact":false}'
)
OLD_VALUE = {"steps": [[0, 1]], "planner": "search", "exact": False}


@pytest.fixture
def apple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home as macOS has it, with what an earlier version left there."""
    monkeypatch.delenv("TNMOE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "platformdirs.user_cache_dir", lambda name, appauthor: platformdirs.macos.MacOS(name, appauthor).user_cache_dir
    )
    earlier = tmp_path / ".cache" / "tnmoe"
    (earlier / "entries").mkdir(parents=True)
    (earlier / "entries" / f"{OLD_KEY}.json").write_text(OLD)
    (earlier / "profile-cpu.json").write_text(by_hand().to_json())
    return tmp_path


def test_the_key_of_an_old_entry() -> None:
    assert cache.key("search", {"a": 1}) == OLD_KEY


def test_old_entries_are_read_on_linux(home: Path) -> None:
    (home / "entries").mkdir(parents=True)
    (home / "entries" / f"{OLD_KEY}.json").write_text(OLD)
    assert cache.get(OLD_KEY) == OLD_VALUE


def test_another_system_has_another_place_and_reads_the_old_one(
    apple: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = apple / "Library" / "Caches" / "tnmoe"
    assert cache.folder() == place
    assert cache.folders() == (place, apple / ".cache" / "tnmoe")
    assert cache.get(OLD_KEY) == OLD_VALUE
    assert load_cached() == by_hand()
    assert kept_profiles() == [apple / ".cache" / "tnmoe" / "profile-cpu.json"]
    assert cache.put(OLD_KEY, {"newer": 1})
    assert cache.get(OLD_KEY) == {"newer": 1}
    assert entries(place) == [place / "entries" / f"{OLD_KEY}.json"]
    default_path().write_text(by_hand().to_json().replace("by hand", "by foot"))
    assert load_cached() not in (None, by_hand())
    shown = "".join(command(capsys)[1].split())
    assert f"readbutnotwritten:{apple / '.cache' / 'tnmoe'}." in shown
    assert sorted(e.path.parts[-4] for e in cache.clear()) == [".cache", "Caches"]
    assert len(kept_profiles()) == 2


@pytest.mark.parametrize(("variable", "place"), [("TNMOE_CACHE", "own"), ("XDG_CACHE_HOME", "own/tnmoe")])
def test_variables_name_the_only_place_on_every_system(
    apple: Path, monkeypatch: pytest.MonkeyPatch, variable: str, place: str
) -> None:
    monkeypatch.setenv(variable, str(apple / "own"))
    assert cache.folders() == (apple / place,)
    assert cache.get(OLD_KEY) is None
    assert load_cached() is None


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TNMOE_CACHE", "~nobody-of-that-name/kept")
    assert not cache.put(KEY, {"a": 1})
    assert cache.get(KEY) is None
    with pytest.raises(FileError, match="name a folder by TNMOE_CACHE"):
        cache.folder()


# ---- the limit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        (" 512M ", 512 * 1024**2),
        ("512 mib", 512 * 1024**2),
        ("2GB", 2 * 1024**3),
        ("3k", 3 * 1024),
        ("1T", 1024**4),
        ("70B", 70),
        *((text, None) for text in ("", "M", "-1", "1.5G", "1e9", "many", "12 XB", "9" * 19, "1 2", "0x10")),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, text: str, size: int | None) -> None:
    assert cache.parse_bytes(text) == size
    monkeypatch.setenv("TNMOE_CACHE_LIMIT", text)
    assert cache.limit() == (256 * 1024**2 if size is None else size)


LONG_AGO = 1_000_000_000


def used(key: str, when: float) -> None:
    path = cache.folder() / "entries" / f"{key}.json"
    os.utime(path, (when, when))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 9), st.integers(1, 4)), max_size=40),
    st.integers(2, 16),
)
def test_the_least_recently_used_go_first(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, int, int]], blocks: int
) -> None:
    """Against a list in order of use, by a clock that ticks once a turn."""
    model: OrderedDict[str, int] = OrderedDict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TNMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TNMOE_CACHE_LIMIT", str(4096 * blocks))
        for turn, (action, number, size) in enumerate(turns):
            key = cache.key("thing", {"number": number})
            if action == "get":
                assert (cache.get(key) is None) == (key not in model)
            else:
                kept = cache.put(key, {"filling": "x" * (4096 * size - 300)})
                assert kept == (size <= 0.75 * blocks)
                if kept:
                    model[key] = size
            if key in model:
                model.move_to_end(key)
                used(key, LONG_AGO + turn)
            while action == "put" and sum(model.values()) > 0.75 * blocks:
                model.popitem(last=False)
            assert {e.path.stem: e.bytes for e in cache.entries()} == {k: 4096 * n for k, n in model.items()}


def test_reading_counts_as_use(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, {"a": 1})
    used(KEY, LONG_AGO)
    assert cache.get(KEY) == {"a": 1}
    assert abs(cache.entries()[0].used - time.time()) < 60

    def refused(*_: object) -> None:
        raise PermissionError("a folder that can only be read")

    monkeypatch.setattr("tnmoe.io.cache.os.utime", refused)
    assert cache.get(KEY) == {"a": 1}


def test_what_a_wrong_clock_wrote_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would fill the folder for ever, and whatever is new would be removed at once."""
    monkeypatch.setenv("TNMOE_CACHE_LIMIT", str(4 * 4096))
    keys = [cache.key("thing", {"k": k}) for k in range(4)]
    for key, when in zip(keys, (LONG_AGO, time.time() + 10 * 365 * 86400, LONG_AGO + 1), strict=False):
        cache.put(key, {})
        used(key, when)
    cache.put(keys[3], {})
    assert {e.path.stem for e in cache.entries()} == {keys[0], keys[2], keys[3]}


def test_what_is_not_ours_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations, files of other names, links and folders; of temporary files, those that may still be written."""
    monkeypatch.setenv("TNMOE_CACHE_LIMIT", str(2 * 4096))
    foreign = ["profile-cpu.json", "entries/README", f"entries/{KEY}", f"entries/{KEY.upper()}.json", "entries/a.json"]
    (home / "entries").mkdir(parents=True)
    for name in (*foreign, "entries/.tnmoe-fresh", "entries/.tnmoe-stale"):
        (home / name).write_text("x" * 100_000)
        if "fresh" not in name:
            os.utime(home / name, (LONG_AGO, LONG_AGO))
    (home / "entries" / f"thing-{'0' * 64}.json").symlink_to(home / "profile-cpu.json")
    (home / "entries" / f"thing-{'1' * 64}.json").mkdir()
    for k in range(5):
        assert cache.put(cache.key("thing", {"k": k}), {})
    assert len(cache.entries()) == 1
    assert not (home / "entries" / ".tnmoe-stale").exists()
    assert (home / "entries" / ".tnmoe-fresh").exists()
    cache.clear()
    assert all((home / name).read_text() == "x" * 100_000 for name in foreign)
    assert (home / "entries" / f"thing-{'0' * 64}.json").is_symlink()


def test_a_limit_of_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TNMOE_CACHE_LIMIT", "0")
    assert not cache.put(KEY, {"a": 1})
    assert cache.get(KEY) is None
    assert not home.exists()


def test_the_folder_is_seldom_looked_through(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in so many entries as fill a 32nd of the limit, and yet the limit holds."""
    most, looks = 300, 0
    monkeypatch.setenv("TNMOE_CACHE_LIMIT", str(most * 4096))
    look = os.scandir

    def counted(path: str) -> Any:
        nonlocal looks
        looks += 1
        return look(path)

    monkeypatch.setattr("tnmoe.io.cache.os.scandir", counted)
    written = 4 * most
    for k in range(written):
        cache.put(cache.key("thing", {"k": k}), {"k": k})
        assert k % 50 or len(os.listdir(home / "entries")) <= most
    assert 0.5 < looks / (32 * written / most) < 1.5


# ---- many processes ------------------------------------------------------------------------------------------

WRITER = """
import random, sys
from tnmoe.io import cache
me, rng = int(sys.argv[1]), random.Random(sys.argv[1])
keys = [cache.key("thing", {"k": k}) for k in range(3)]
seen = 0
for turn in range(60):
    k = rng.randrange(3)
    value = cache.get(keys[k])
    if value is not None:
        seen += 1
        assert value["k"] == k and len(value["filling"]) == value["length"], value
        assert set(value["filling"]) == {value["by"]}, "two writers are mixed"
    length = rng.randrange(1, 20_000)
    assert cache.put(keys[k], {"k": k, "by": me, "length": length, "filling": [me] * length})
    if me == 0 and sys.argv[2:] == ["clear"] and turn % 10 == 0:
        cache.clear()
print(seen)
"""


def run_writers(count: int, *arguments: str) -> int:
    """So many of them at once. Returns how many reads were hits."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(k), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(count)
    ]
    ended = [(p.communicate(timeout=300), p.returncode) for p in running]
    for (_, errors), status in ended:
        assert status == 0, errors
    return sum(int(out) for (out, _), _ in ended)


@pytest.mark.slow
def test_many_processes_at_once(home: Path) -> None:
    """Every read is a whole entry of one writer, and no temporary file is left."""
    assert run_writers(12) > 100
    assert len(entries(home)) == 3
    assert all(p.suffix == ".json" and not p.name.startswith(".") for p in entries(home))
    assert {os.stat(p).st_mode & 0o600 for p in entries(home)} == {0o600}


def test_many_processes_that_evict_and_clear(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entries of the three fit, so that each write evicts, while one process clears: never an error."""
    monkeypatch.setenv("TNMOE_CACHE_LIMIT", str(160_000))
    (home / "entries").mkdir(parents=True)
    (home / "profile-cpu.json").write_text("mine")
    assert run_writers(6, "clear") > 10
    assert (home / "profile-cpu.json").read_text() == "mine"
    left = cache.entries()
    assert all(cache.get(e.path.stem) is not None for e in left)
    assert len(entries(home)) == len(left) + 1


# ---- the command ---------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["cache", *arguments])
    shown = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, shown.out, shown.err


def test_the_command_shows_and_clears(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(3):
        cache.put(cache.key("atlas", {"k": k}), {"filling": "x" * 5000})
    cache.put(cache.key("subset_dp", {}), {})
    calibration = home / "profile-cuda.json"
    calibration.write_text("{}")
    expected = [
        {"kind": "atlas", "entries": 3, "bytes": 3 * 8192},
        {"kind": "subset_dp", "entries": 1, "bytes": 4096},
        {"kind": "all", "entries": 4, "bytes": 3 * 8192 + 4096},
    ]
    code, out, _ = command(capsys, "--format", "json")
    assert (code, json.loads(out)) == (0, expected)
    code, out, _ = command(capsys)
    assert code == 0
    assert out.startswith(f"Kept in {home}\n")
    assert "268,435,456 bytes (TNMOE_CACHE_LIMIT)" in out
    assert "never removed: profile-cuda.json." in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    code, out, _ = command(capsys, "--clear", "--format", "json")
    assert (code, json.loads(out)) == (0, expected)
    assert entries(home) == [calibration]
    code, out, _ = command(capsys, "--clear", "--format", "csv")
    assert (code, out) == (0, "kind,entries,bytes\nall,0,0\n")


def test_the_command_names_what_is_wrong(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, {})
    with monkeypatch.context() as patch:
        patch.setenv("TNMOE_CACHE_LIMIT", "lots")
        assert command(capsys)[0] == 2
    with monkeypatch.context() as patch:
        patch.setenv("TNMOE_CACHE", "off")
        for arguments in ((), ("--clear",)):
            code, out, errors = command(capsys, *arguments)
            assert (code, out) == (2, "")
            assert "TNMOE_CACHE=off" in errors

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        code, _, errors = command(capsys, "--clear")
    assert code == 2
    assert f"1 of 1 entries cannot be removed, e.g. {home}" in errors
    assert len(cache.entries()) == 1
