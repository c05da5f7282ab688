"""Bad input: one clear error, exit code 2, nothing written. In Python: a `TnmoeError`, never anything else."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnmoe
from tnmoe.cli.main import main
from tnmoe.layers.kinds import KINDS
from tnmoe.symbolic.dims import as_dim, parse_dim

BLOCK = {
    "kind": "mumoe_block",
    "inputs": 12,
    "hidden": 20,
    "outputs": 8,
    "experts": 6,
    "factorization": {"kind": "tensor_ring", "ranks": [2, 3, 4]},
    "gate": {"activation": "entmax15", "norm": "batch"},
    "bias": True,
    "input_norm": False,
}

LEAST = {
    "mumoe": {"inputs": 4, "outputs": 5, "experts": 3, "factorization": {"kind": "cp", "rank": 2}},
    "mumoe_block": {"inputs": 4, "hidden": 6, "outputs": 5, "experts": 3, "factorization": {"kind": "cp", "rank": 2}},
    "factorized_linear": {"inputs": 4, "outputs": 5, "factorization": {"kind": "cp", "rank": 2}},
    "linear": {"inputs": 4, "outputs": 5},
    "mlp": {"inputs": 4, "hidden": 6, "outputs": 5},
    "dense_moe": {"inputs": 4, "hidden": 6, "outputs": 5, "experts": 3},
    "sparse_moe": {"inputs": 4, "outputs": 5, "experts": 3, "active": 2},
    "expert_choice": {"inputs": 4, "outputs": 5, "experts": 3},
    "soft_moe": {"inputs": 4, "outputs": 5, "experts": 3, "slots": 2},
    "mixture_of_tokens": {"inputs": 4, "hidden": 6, "outputs": 5, "experts": 3, "group": 2},
    "mixture_of_depths": {"inputs": 4, "hidden": 6},
    "peer": {"inputs": 4, "outputs": 5, "experts": 9, "heads": 2, "active": 2, "key_width": 3},
    "multi_head_moe": {"inputs": 4, "hidden": 6, "experts": 3, "active": 2, "heads": 2},
    "smile": {"inputs": 4, "hidden": 6, "outputs": 5, "nodes": 2, "experts": 3},
    "cartesian_moe": {"inputs": 4, "hidden": 6, "experts": 3, "active": 2},
    "deep_moe": {"inputs": 4, "hidden": 6, "outputs": 5, "experts": 3},
    "residual_moe": {"inputs": 4, "outputs": 5, "experts": 3},
    "moefied": {"inputs": 4, "hidden": 6, "outputs": 5, "groups": 3, "active": 2},
    "mixture_of_heads": {"inputs": 4, "experts": 3, "active": 2, "head_width": 5},
    "molora": {"inputs": 4, "outputs": 5, "experts": 3, "rank": 2},
    "mov": {"inputs": 4, "experts": 3},
    "moslora": {"inputs": 4, "outputs": 5, "rank": 2},
    "tensor_poly": {"inputs": 4, "outputs": 5, "experts": 3, "rank": 2},
}


def toml(value):
    """A TOML value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def layer_file(declaration, sizes=None):
    """A TOML file's text."""
    lines = ["[layer]", *(f"{k} = {toml(v)}" for k, v in declaration.items())]
    if sizes:
        lines += ["[sizes]", *(f"{k} = {toml(v)}" for k, v in sizes.items())]
    return "\n".join(lines) + "\n"


class Fails:
    """Runs a command that must fail, and holds how it may."""

    def __init__(self, capsys, folder):
        self.capsys = capsys
        self.folder = folder

    def write(self, name, content):
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def files(self):
        """Every path below the folder, and what the files hold."""
        return {p: p.read_bytes() if p.is_file() else None for p in self.folder.rglob("*")}

    def __call__(self, *arguments):
        """The error's text without `error: `."""
        before = self.files()
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in arguments])
        out, err = self.capsys.readouterr()
        assert done.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert len(re.findall(r"^error:", err, re.MULTILINE)) == 1
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 5
        assert len(err) < 2000
        assert self.files() == before
        return err.removeprefix("error: ")

    def layer(self, **changes):
        """The error of a block with some keys changed (None takes one out)."""
        declaration = {k: v for k, v in {**BLOCK, **changes}.items() if v is not None}
        message = self("cost", self.write("layer.toml", layer_file(declaration)))
        assert message.startswith("layer.toml")
        return message


@pytest.fixture
def fails(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Fails(capsys, tmp_path)


# ---- sizes ---------------------------------------------------------------------------------------------------

# A size and what the message says about it.
NO_SIZES = {
    "negative": (-3, "-3"),
    "zero": (0, "0"),
    "float": (1.5, "1.5"),
    "whole float": (4.0, "4.0"),
    "infinite": (math.inf, "inf"),
    "bool": (True, "True"),
    "empty": ("", "''"),
    "negative text": ("-3", "-3"),
    "zero text": ("2 - 2", "0"),
    "list": ([[4]], "[4]"),
    "table": ({"size": 4}, "{'size': 4}"),
    "call": ("__import__('os').mkdir('pwned')", "__import__"),
    "attribute": ("a.b", "'a.b'"),
    "power": ("x**99", "exponent"),
    "tower": ("(((10**16)**16)**16)**16", ""),
    "unclosed": ("(" * 90, "unexpected end"),
    "deep": ("(" * 199, ""),
    "long": ("a+" * 5000 + "a", "10001 characters"),
    "keyword": ("lambda", "'lambda'"),
    "dunder": ("__class__", "'__class__'"),
    "not an identifier": ("2nd", "'2nd'"),
    "foreign letters": ("größe", "'größe'"),
    "division by zero": ("4 // 0", "division by zero"),
    "NUL": ("a\0b", "x00"),
}


@pytest.mark.parametrize(("value", "words"), NO_SIZES.values(), ids=NO_SIZES)
@pytest.mark.parametrize("key", ["inputs", "experts", "rank"])
def test_what_is_no_size(fails, key, value, words):
    if key == "rank":
        message = fails.layer(factorization={"kind": "cp", "rank": value})
    else:
        message = fails.layer(**{key: value})
    assert words in message


@pytest.mark.parametrize(("value", "words"), NO_SIZES.values(), ids=NO_SIZES)
def test_what_is_no_rank_of_a_ring(fails, value, words):
    message = fails.layer(factorization={"kind": "tensor_ring", "ranks": [2, value, 4]})
    assert words in message


@pytest.mark.parametrize("value", [-3, "2 - 2", 1.5, "a.b", "lambda", "__class__"])
def test_the_message_says_which_size(fails, value):
    assert "inputs" in fails.layer(inputs=value)
    assert "experts[1]" in fails.layer(experts=[3, value])
    assert "factorization.rank" in fails.layer(factorization={"kind": "cp", "rank": value})
    assert "factorization.ranks[1]" in fails.layer(factorization={"kind": "tensor_ring", "ranks": [2, value, 4]})


@pytest.mark.parametrize("value", [-1, 0, 1.5, True, "", "1 +", None, [], {}, 4j], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_in_python(kind, value):
    """Every size of every kind is checked, also where no file is read."""
    for key, right in LEAST[kind].items():
        if not isinstance(right, int):
            continue
        with pytest.raises(tnmoe.DeclarationError, match=key):
            tnmoe.declare({"kind": kind, **LEAST[kind], key: value})


def test_carets_stand_under_the_fault():
    with pytest.raises(tnmoe.DeclarationError) as error:
        parse_dim("2*(d + $)", "inputs")
    assert str(error.value).splitlines()[1:3] == ["  2*(d + $)", "         ^"]


@pytest.mark.parametrize("size", [0, -1, 1.5, "x", None, True, [1]], ids=repr)
def test_tokens_in_python(size):
    with pytest.raises(tnmoe.DeclarationError, match="tokens"):
        tnmoe.plan(tnmoe.Linear(2, 3), tokens=size)


def test_a_symbolic_size_that_comes_out_as_zero(fails):
    """`d - 4` is a size only while d > 4."""
    fails.write("layer.toml", layer_file({**BLOCK, "inputs": "d - 4"}))
    for d in (3, 4):
        assert "d - 4" in fails("cost", "layer.toml", "--size", f"d={d}")
        assert "d - 4" in fails("emit", "layer.toml", "--size", f"d={d}")


# ---- keys, kinds and names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "given", "hint"),
    [
        ({"kind": "mumoe_blok"}, "mumoe_blok", "mumoe_block"),
        ({"factorization": {"kind": "tensor-ring", "ranks": [2, 3, 4]}}, "tensor-ring", "tensor_ring"),
        ({"factorization": {"kind": "cp", "ranks": 4}}, "ranks", "rank"),
        ({"input": 4}, "input", "inputs"),
        ({"inputnorm": True}, "inputnorm", "input_norm"),
        ({"gate": {"activaton": "softmax"}}, "activaton", "activation"),
        ({"gate": {"activation": "softmx"}}, "softmx", "softmax"),
        ({"gate": {"norm": "bach"}}, "bach", "batch"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_misspelt_word_gets_a_hint(fails, changes, given, hint):
    message = fails.layer(**changes)
    assert repr(given) in message
    assert f"did you mean {hint!r}" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": 3}, "unknown kind 3"),
        ({"kind": None}, "kind"),
        ({"zebra": 1}, "unknown key 'zebra'; allowed: inputs"),
        (
            {"factorization": {"kind": "qr"}},
            "unknown factorization.kind 'qr'; allowed: cp, tensor_ring, dense, tensor_train, ",
        ),
        ({"factorization": {"rank": 3}}, "factorization.kind is missing"),
        ({"factorization": "cp"}, "factorization must be a table"),
        ({"factorization": {"kind": "cp"}}, "factorization.rank is missing"),
        ({"factorization": {"kind": "tensor_ring"}}, "factorization.ranks is missing"),
        ({"factorization": {"kind": "tensor_ring", "ranks": 4}}, "ranks must be a list"),
        ({"factorization": {"kind": "tensor_ring", "ranks": [4, 4]}}, "ranks has 2 entries, expected 3"),
        ({"factorization": {"kind": "tensor_ring", "ranks": [4] * 4}}, "ranks has 4 entries, expected 3"),
        ({"factorization": {"kind": "tensor_ring", "ranks": []}}, "ranks has 0 entries, expected 3"),
        ({"experts": [3, 5]}, "ranks has 3 entries, expected 4"),
        ({"experts": []}, "experts must name at least one level"),
        ({"gate": "softmax"}, "gate must be a table"),
        ({"gate": {"activation": 3}}, "gate.activation"),
        ({"gate": {"norm": True}}, "gate.norm"),
        ({"bias": 1}, "bias must be true or false, got 1"),
        ({"input_norm": "yes"}, "input_norm must be true or false, got 'yes'"),
        *(({k: None}, f"{k} is missing") for k in ("inputs", "hidden", "outputs", "experts", "factorization")),
    ],
    ids=str,
)
def test_faulty_declarations(fails, changes, words):
    assert words in fails.layer(**changes)


@pytest.mark.parametrize("name", ["class", "None", "__init__", "1st", "my block", "a.b", "", "x;y", "größe", "torch"])
def test_names_of_classes(fails, name):
    """A name reaches the source, so it is an identifier that means nothing else there."""
    assert repr(name) in fails("emit", "clip-linear", "--name", name)
    assert repr(name) in fails("emit", "clip-linear", "--name", name, "-o", "out.py")


@pytest.mark.parametrize("name", ["super", "tuple", "ValueError", "_Entmax15Root", "entmax15", "Tensor", "nn", "F"])
def test_a_class_name_shadows_nothing_that_the_file_uses(name):
    """`class super(nn.Module)` is valid Python, and its own `super().__init__()` never ends."""
    plan = tnmoe.plan(tnmoe.MuMoEBlock(4, 6, 5, 3, tnmoe.CP(2)))
    with pytest.raises(tnmoe.TnmoeError, match=repr(name)):
        tnmoe.emit(plan, name=name)


def test_two_classes_need_two_names():
    plan = tnmoe.plan(tnmoe.Linear(2, 3))
    with pytest.raises(tnmoe.TnmoeError, match="'A'"):
        tnmoe.emit([plan, plan], name=["A", "A"])
    with pytest.raises(tnmoe.DeclarationError, match="2 plans need 2 class names"):
        tnmoe.emit([plan, plan], name=["A"])


def test_one_name_for_several_layers(fails):
    assert "--name goes with one layer" in fails("emit", "gpt2", "--name", "Block")


@pytest.mark.parametrize("what", ["gpt2-dense", "clip-128-sparse"])
@pytest.mark.parametrize("command", ["emit", "check"])
def test_layers_that_are_only_costed(fails, command, what):
    assert "is only costed; declare the layer in a file to build it" in fails(command, what)


def test_an_unknown_preset_lists_those_there_are(fails):
    message = fails("table", "gtp2")
    assert "'gtp2' is neither a preset nor a file" in message
    assert "gpt2, mixer, clip" in message


# ---- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", ["d", "d=", "d=x", "d=1.5", "d=-1", "d=0", "d=1e3", "d=²", "=5", "d 5", "d=" + "9" * 5000]
)
def test_malformed_sizes(fails, size):
    fails.write("layer.toml", layer_file({**BLOCK, "inputs": "d"}))
    fails("cost", "layer.toml", "--size", size)


def test_sizes_of_nothing(fails):
    """A symbol that the layer has not, one that it sets itself, one that nobody sets."""
    fails.write("layer.toml", layer_file({**BLOCK, "inputs": "d"}))
    assert "'zz'" in fails("cost", "layer.toml", "--size", "d=4", "--size", "zz=5")
    assert "H is declared as 20, but sizes says 5" in fails("cost", "layer.toml", "--size", "d=4", "--size", "H=5")
    message = fails("cost", "layer.toml")
    assert message.startswith("d has no value")
    fails.write("other.toml", layer_file(BLOCK, {"zz": 5}))
    assert "'zz'" in fails("cost", "other.toml")


def test_the_remedy_for_a_symbol_is_one_of_the_command_line(fails):
    fails.write("layer.toml", layer_file({**BLOCK, "inputs": "d"}))
    message = fails("cost", "layer.toml")
    assert "--size d=" in message or "[sizes]" in message


@pytest.mark.parametrize("tokens", ["0", "-1", "many", "1.5", ""])
@pytest.mark.parametrize("what", ["clip-linear", "layer.toml", "saved.json"])
def test_tokens(fails, what, tokens):
    fails.write("layer.toml", layer_file(BLOCK))
    fails.write("saved.json", tnmoe.plan(tnmoe.Linear(2, 3)).to_json())
    assert "tokens" in fails("table", what, f"--tokens={tokens}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tabel", "gpt2"],
        ["table"],
        ["table", "gpt2", "--format", "xml"],
        ["table", "gpt2", "--dtype", "float31"],
        ["plan", "gpt2", "--objective", "speed"],
        ["plan", "gpt2", "--planner", "magic"],
        ["plan", "gpt2", "--format", "csv"],
        ["cost", "gpt2", "--steps", "--formulas"],
        ["emit", "gpt2", "-o"],
        ["emit", "gpt2", "--nmae", "x"],
        ["table", ""],
    ],
    ids=" ".join,
)
def test_the_grammar(fails, arguments):
    fails(*arguments)


def test_sizes_that_a_saved_plan_cannot_take(fails):
    """An option is followed or refused, never ignored."""
    fails.write("saved.json", tnmoe.plan(tnmoe.Linear(2, 3)).to_json())
    for option in (("--size", "zz=7"), ("--objective", "macs"), ("--planner", "greedy")):
        assert option[0] in fails("cost", "saved.json", *option)


# ---- files that are read -------------------------------------------------------------------------------------

NO_LAYERS = {
    "not TOML": ("[layer\nkind = linear", "is not TOML"),
    "JSON": ('{"layer": 3}', "is not TOML"),
    "binary": (bytes(range(256)), "is not UTF-8"),
    "UTF-16": ("[layer]".encode("utf-16"), "is not UTF-8"),
    "NUL bytes": (b"\0" * 64, "is not TOML"),
    "empty": ("", "layer is missing"),
    "comment": ("# nothing\n", "layer is missing"),
    "no layer": ("[sizes]\nd = 4\n", "layer is missing"),
    "layer is a number": ("layer = 3\n", "a layer must be a table"),
    "layer is a list": ("[[layer]]\nkind = 'linear'\n", "a layer must be a table"),
    "layer is empty": ("[layer]\n", "kind"),
    "twice": ("[layer]\nkind = 'linear'\n[layer]\nkind = 'mlp'\n", "is not TOML"),
    "unknown table": ("[layer]\nkind = 'linear'\n[layers]\n", "'layers'; did you mean 'layer'"),
    "sizes is a number": ("sizes = 3\n[layer]\nkind = 'linear'\n", "sizes must be a table"),
    "negative in sizes": ("[sizes]\nd = -4\n[layer]\nkind = 'linear'\n", "sizes.d"),
    "text in sizes": ("[sizes]\nd = '4'\n[layer]\nkind = 'linear'\n", "sizes.d"),
    "deep": ("a = " + "[" * 5000, ""),
    "a number without end": ("[layer]\nkind = 'linear'\noutputs = 3\ninputs = " + "9" * 5000, ""),
}


@pytest.mark.parametrize(("content", "words"), NO_LAYERS.values(), ids=NO_LAYERS)
def test_files_that_declare_no_layer(fails, content, words):
    fails.write("layer.toml", content)
    message = fails("emit", "layer.toml", "-o", "out.py")
    assert message.startswith("layer.toml")
    assert words in message


@pytest.mark.parametrize("name", ["nowhere.toml", "nowhere.json", "no/where.toml", "x" * 300 + ".toml"])
def test_files_that_are_not_there(fails, name):
    assert name[:40] in fails("cost", name)


@pytest.mark.parametrize("name", ["folder.toml", "folder.json", "folder"])
def test_a_directory_is_no_file(fails, name):
    (fails.folder / name).mkdir()
    assert "directory" in fails("cost", name).lower()


def test_a_file_that_cannot_be_opened(fails):
    """A link that leads to itself cannot be read even by root."""
    (fails.folder / "loop.toml").symlink_to("loop.toml")
    fails("cost", "./loop.toml")


def setting(*keys):
    """A change to a saved plan: the entry at these keys becomes the last of them."""
    *path, last, value = keys

    def change(data):
        for key in path:
            data = data[key]
        data[last] = value

    return change


def lacking(*keys):
    """A change to a saved plan: the entry at these keys is gone."""
    *path, last = keys

    def change(data):
        for key in path:
            data = data[key]
        del data[last]

    return change


def saved_plan(content):
    """`content` itself, or a good plan with that change."""
    if not callable(content):
        return content
    data = json.loads(tnmoe.plan(tnmoe.MuMoE(4, 5, 3, tnmoe.CP(2))).to_json())
    content(data)
    return json.dumps(data)


NO_PLANS = {
    "empty": "",
    "text": "hello",
    "cut off": '{"format": "tnmoe-plan-1", "declaration": {"kind": "mumoe", "inpu',
    "a list": "[1, 2]",
    "a number": "3",
    "null": "null",
    "binary": bytes(range(256)),
    "deep": "[" * 100_000,
    "a number without end": '{"format": ' + "9" * 5000 + "}",
    "another format": setting("format", "tnmoe-plan-99"),
    "no declaration": lacking("declaration"),
    "no values": lacking("values"),
    "no objective": lacking("objective"),
    "no paths": lacking("paths"),
    "declaration is text": setting("declaration", "mumoe"),
    "unknown kind": setting("declaration", "kind", "mumo"),
    "negative rank": setting("declaration", "factorization", "rank", -2),
    "values is a list": setting("values", [1]),
    "value is text": setting("values", "T", "many"),
    "value is negative": setting("values", "T", -1),
    "value is zero": setting("values", "T", 0),
    "value is a bool": setting("values", "T", True),
    "value of a keyword": setting("values", "lambda", 1),
    "value against the declaration": setting("values", "I", 7),
    "width of zero": setting("values", "I", 0),
    "no tokens": lacking("values", "T"),
    "no width": lacking("values", "I"),
    "unknown objective": setting("objective", "speed"),
    "objective that breaks text": setting("objective", "\ud800"),
    "objective is null": setting("objective", None),
    "paths is a list": setting("paths", []),
    "path is missing": lacking("paths", "y"),
    "path is null": setting("paths", "y", None),
    "steps are text": setting("paths", "y", "steps", "ab"),
    "steps are missing": lacking("paths", "y", "steps"),
    "steps are too few": setting("paths", "y", "steps", [[0, 1]]),
    "steps repeat": setting("paths", "y", "steps", [[0, 1]] * 4),
    "steps out of range": setting("paths", "y", "steps", [[0, 99]] * 4),
    "steps are negative": setting("paths", "y", "steps", [[-1, 0]] * 4),
    "steps of three": setting("paths", "y", "steps", [[0, 1, 2]]),
    "steps are infinite": setting("paths", "y", "steps", [[math.inf, 0]]),
    "steps are fractions": setting("paths", "y", "steps", [[0.5, 2.5], [1, 3], [5, 6], [4, 7]]),
}


@pytest.mark.parametrize("content", NO_PLANS.values(), ids=NO_PLANS)
def test_damaged_plans(fails, content):
    """None is emitted, not even where only a figure or a note would be wrong."""
    fails.write("saved.json", saved_plan(content))
    fails("emit", "saved.json", "-o", "out.py")


@pytest.mark.parametrize("content", ["", "{}", lacking("values"), setting("declaration", "kind", "mumo")], ids=range(4))
def test_the_message_names_the_damaged_plan(fails, content):
    """As it does for a TOML file; a command line may name several."""
    fails.write("saved.json", saved_plan(content))
    assert "saved.json" in fails("cost", "saved.json")


# ---- files that are written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["emit", "clip-linear"], ["plan", "clip-linear"]], ids=lambda c: c[0])
class TestUnwritable:
    """Whatever stands in the way, nothing is left behind."""

    def test_a_directory(self, fails, command):
        (fails.folder / "folder").mkdir()
        assert "folder is a directory" in fails(*command, "-o", "folder")

    def test_no_name(self, fails, command):
        fails(*command, "-o", "")

    def test_no_parent(self, fails, command):
        assert "no/where" in fails(*command, "-o", "no/where/out.py")

    def test_below_a_file(self, fails, command):
        fails.write("file", "text")
        assert "file" in fails(*command, "-o", "file/out.py")

    def test_a_name_too_long(self, fails, command):
        assert "cannot be written" in fails(*command, "-o", "x" * 300)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_folder(self, fails, command):
        (fails.folder / "locked").mkdir(mode=0o500)
        assert "cannot be written" in fails(*command, "-o", "locked/out.py")

    @pytest.mark.parametrize("broken", ["replace", "chmod"])
    def test_a_disk_that_fails_midway(self, fails, command, monkeypatch, broken):
        """The old file is untouched and the temporary one is gone."""
        fails.write("out.py", "old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(f"tnmoe.io.files.os.{broken}", full)
        assert "No space left on device" in fails(*command, "-o", "out.py")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, UnicodeEncodeError], ids=lambda f: f.__name__)
def test_no_temporary_file_survives_an_interruption(tmp_path, monkeypatch, fault):
    """Ctrl-C, or text that UTF-8 has no form for, in the middle of writing."""
    if fault is KeyboardInterrupt:

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("tnmoe.io.files.os.replace", stop)
    with pytest.raises((fault, tnmoe.FileError)):
        tnmoe.save("\ud800" if fault is UnicodeEncodeError else "text", tmp_path / "out.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["table", "clip-linear"], ["--help"]], ids=lambda a: a[0])
def test_a_full_disk_behind_a_redirection(arguments):
    """`tnmoe table clip > FILE` on a full disk is an error, in one line."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tnmoe", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.returncode == 2


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(tmp_path):
    """What the tests above see inside this process is what a shell sees."""
    (tmp_path / "layer.toml").write_text(layer_file({**BLOCK, "inputs": "__import__('os').mkdir('pwned')"}))
    command = [sys.executable, "-m", "tnmoe", "emit", "layer.toml", "-o", "out.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: layer.toml: [layer] inputs")
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["layer.toml"]


# ---- network expressions -------------------------------------------------------------------------------------

FAULTS = [
    ("bi,io", 5, "'->'"),
    ("", 0, "'->'"),
    ("b1,io->bo", 1, "'1'"),
    ("bi,io->bo!", 9, "'!'"),
    ("bi,ïo->bo", 3, "'ï'"),
    ("bi.io->bo", 2, "'.'"),
    ("bi,io->b->o", 8, "'-'"),
    ("bi,ioi->bo", 5, "'i' stands twice"),
    ("bi,io->bob", 9, "'b' stands twice"),
    ("bi, io -> bx", 11, "'x' is in no tensor"),
]


def caret(message):
    """The column that the caret stands under."""
    (line,) = [text for text in message.splitlines() if set(text) <= set(" ^") and "^" in text]
    return line.index("^") - 2


@pytest.mark.parametrize(("expression", "column", "words"), FAULTS)
def test_faults_of_an_expression_are_pointed_at(expression, column, words):
    with pytest.raises(tnmoe.DeclarationError) as error:
        tnmoe.Network.parse(expression)
    assert words in str(error.value)
    assert f"\n  {expression}\n" in str(error.value)
    assert caret(str(error.value)) == column


@pytest.mark.parametrize(("expression", "column", "words"), FAULTS)
def test_faults_of_an_expression_in_a_file(fails, expression, column, words):
    fails.write("net.toml", layer_file({"kind": "network", "expression": expression}))
    message = fails("cost", "net.toml")
    assert words in message
    assert caret(message) == column


def test_unknown_terms():
    with pytest.raises(tnmoe.DeclarationError, match=r"no term 'xy' in 'bi,io->bo'; the terms are bi, io"):
        tnmoe.Network.parse("bi,io->bo", weights="io xy")
    with pytest.raises(tnmoe.DeclarationError, match="'xy'"):
        tnmoe.Network.parse("bi,io->bo", frozen=["xy"])
    with pytest.raises(tnmoe.DeclarationError, match="'io' is listed both"):
        tnmoe.Network.parse("bi,io->bo", weights="io", frozen="io")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expression": 3}, "expression"),
        ({"expression": None}, "expression is missing"),
        ({"weights": "xy"}, "'xy'"),
        ({"weights": 3}, "weights must be terms"),
        ({"frozen": [3]}, "frozen must be terms"),
        ({"sizes": 3}, "sizes must be a table"),
        ({"sizes": {"x": 3}}, "'x'"),
        ({"sizes": {"b": 0}}, "sizes.b"),
        ({"sizes": {"b": 2.5}}, "sizes.b"),
        ({"order": 1}, "'order'"),
    ],
    ids=str,
)
def test_faulty_networks_in_a_file(fails, changes, words):
    declaration = {"kind": "network", "expression": "bi,io->bo", "weights": ["io"], **changes}
    fails.write("net.toml", layer_file({k: v for k, v in declaration.items() if v is not None}))
    assert words in fails("cost", "net.toml")


# ---- Python --------------------------------------------------------------------------------------------------


def test_the_errors_are_one_family():
    names = ["CostError", "DeclarationError", "EmitError", "FileError", "PlanError", "ProgramError"]
    assert all(issubclass(getattr(tnmoe, name), tnmoe.TnmoeError) for name in names)
    assert issubclass(tnmoe.TnmoeError, Exception)


LINEAR, TENSOR = tnmoe.Linear(2, 3), tnmoe.Tensor("a", ("i",))

WRONG_TYPES = {
    "MuMoE(inputs=[])": lambda: tnmoe.MuMoE([], 2, 3, tnmoe.CP(2)),
    "MuMoE(experts=None)": lambda: tnmoe.MuMoE(1, 2, None, tnmoe.CP(2)),
    "MuMoE(experts={3})": lambda: tnmoe.MuMoE(1, 2, {3}, tnmoe.CP(2)),
    "MuMoE(experts=b'ab')": lambda: tnmoe.MuMoE(1, 2, b"ab", tnmoe.CP(2)),
    "MuMoE(factorization='cp')": lambda: tnmoe.MuMoE(1, 2, 3, "cp"),
    "MuMoE(factorization=CP)": lambda: tnmoe.MuMoE(1, 2, 3, tnmoe.CP),
    "MuMoE(gate='softmax')": lambda: tnmoe.MuMoE(1, 2, 3, tnmoe.CP(2), gate="softmax"),
    "MuMoE(bias=1)": lambda: tnmoe.MuMoE(1, 2, 3, tnmoe.CP(2), bias=1),
    "MuMoEBlock(input_norm=None)": lambda: tnmoe.MuMoEBlock(1, 2, 3, 4, tnmoe.CP(2), input_norm=None),
    "CP([])": lambda: tnmoe.CP([]),
    "TensorRing(4)": lambda: tnmoe.TensorRing(4),
    "TensorRing('444')": lambda: tnmoe.TensorRing("444"),
    "TensorRing({})": lambda: tnmoe.TensorRing({}),
    "Gate([])": lambda: tnmoe.Gate([]),
    "Gate(norm={})": lambda: tnmoe.Gate(norm={}),
    "SparseMoE(active=9)": lambda: tnmoe.SparseMoE(2, 3, 4, 9),
    "SparseMoE(hidden=0)": lambda: tnmoe.SparseMoE(2, 3, 4, 1, hidden=0),
    "declare(3)": lambda: tnmoe.declare(3),
    "declare(sizes={1: 2})": lambda: tnmoe.declare({"kind": "network", "expression": "ab->a", "sizes": {1: 2, "z": 3}}),
    "symbol('lambda')": lambda: tnmoe.symbol("lambda"),
    "symbol('__x')": lambda: tnmoe.symbol("__x"),
    "symbol(3)": lambda: tnmoe.symbol(3),
    "Tensor(3)": lambda: tnmoe.Tensor(3, ("i",)),
    "Tensor('class')": lambda: tnmoe.Tensor("class", ("i",)),
    "Tensor(indices=3)": lambda: tnmoe.Tensor("a", 3),
    "Tensor(indices=None)": lambda: tnmoe.Tensor("a", None),
    "Tensor(indices=[3])": lambda: tnmoe.Tensor("a", [3]),
    "Tensor(indices twice)": lambda: tnmoe.Tensor("a", ("i", "i")),
    "Tensor(role='weight')": lambda: tnmoe.Tensor("a", ("i",), "weight"),
    "Network()": lambda: tnmoe.Network((), ()),
    "Network(3)": lambda: tnmoe.Network(3, ()),
    "Network(text)": lambda: tnmoe.Network("ab->a", ("a",)),
    "Network((3,))": lambda: tnmoe.Network((3,), ()),
    "Network(output=3)": lambda: tnmoe.Network((TENSOR,), 3),
    "Network(output=[[]])": lambda: tnmoe.Network((TENSOR,), ([],)),
    "Network(output twice)": lambda: tnmoe.Network((TENSOR,), ("i", "i")),
    "Network(bias=3)": lambda: tnmoe.Network((TENSOR,), ("i",), 3),
    "Network(twice)": lambda: tnmoe.Network((TENSOR, TENSOR), ("i",)),
    "parse(3)": lambda: tnmoe.Network.parse(3),
    "parse(None)": lambda: tnmoe.Network.parse(None),
    "parse(weights=3)": lambda: tnmoe.Network.parse("ab,b->a", weights=3),
    "parse(weights=[3])": lambda: tnmoe.Network.parse("ab,b->a", weights=[3]),
    "parse(weights=[[]])": lambda: tnmoe.Network.parse("ab,b->a", weights=[[]]),
    "plan(3)": lambda: tnmoe.plan(3),
    "plan(MuMoE)": lambda: tnmoe.plan(tnmoe.MuMoE),
    "plan(sizes=3)": lambda: tnmoe.plan(LINEAR, sizes=3),
    "plan(sizes={3: 3})": lambda: tnmoe.plan(LINEAR, sizes={3: 3}),
    "plan(sizes of a network={3: 3})": lambda: tnmoe.plan(tnmoe.Network.parse("ab,b->a"), sizes={3: 3, "a": 1}),
    "plan(sizes={'d': 1.5})": lambda: tnmoe.plan(tnmoe.Linear("d", 3), sizes={"d": 1.5}),
    "plan(network without sizes)": lambda: tnmoe.plan(tnmoe.Network.parse("ab,b->a")),
    "emit(spec)": lambda: tnmoe.emit(LINEAR),
    "build(spec)": lambda: tnmoe.build(LINEAR),
    "check(spec)": lambda: tnmoe.check(LINEAR),
    "cost(3)": lambda: tnmoe.cost(3),
}


@pytest.mark.parametrize("call", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types_are_declaration_errors(call):
    """Never a TypeError from somewhere inside, with a message about `int` and `tuple`."""
    with pytest.raises(tnmoe.DeclarationError) as error:
        call()
    assert len(str(error.value)) > 20


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: tnmoe.plan(LINEAR, objective="speed"), tnmoe.PlanError),
        (lambda: tnmoe.plan(LINEAR, objective=[]), tnmoe.PlanError),
        (lambda: tnmoe.plan(LINEAR, planner="magic"), tnmoe.PlanError),
        (lambda: tnmoe.cost(LINEAR, dtype="float31"), tnmoe.CostError),
        (lambda: tnmoe.cost(LINEAR).formula("speed"), tnmoe.CostError),
        (lambda: tnmoe.load("nowhere.toml"), tnmoe.FileError),
        (lambda: tnmoe.load("no\0where"), tnmoe.FileError),
        (lambda: tnmoe.save("text", "no/where"), tnmoe.FileError),
        (lambda: tnmoe.Plan.from_json("{"), tnmoe.PlanError),
        (lambda: tnmoe.cost(LINEAR).parts().render("xml"), tnmoe.TnmoeError),
    ],
    ids=range(10),
)
def test_other_faults_have_their_error(call, kind):
    with pytest.raises(kind):
        call()


@pytest.mark.parametrize("size", [10**5000, -(10**5000)], ids=["5000 digits", "negative"])
def test_sizes_beyond_all_machines(size):
    """Python prints no integer of more than 4,300 digits: a message or a figure with one would be a ValueError."""
    with pytest.raises(tnmoe.DeclarationError):
        tnmoe.Linear(size, 3)
    with pytest.raises(tnmoe.DeclarationError):
        tnmoe.plan(LINEAR, tokens=size)


def test_nothing_of_a_text_size_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("__import__('os').mkdir('pwned')", "open('pwned', 'w')", "exec('x')", "d.__class__", "[1][0]", "a=1"):
        with pytest.raises(tnmoe.DeclarationError):
            tnmoe.Linear(text, 3)
    assert not list(tmp_path.iterdir())


# ---- random input --------------------------------------------------------------------------------------------


def only_tnmoe_errors(call, *arguments):
    """The result, or None after a `TnmoeError` with a text that can be shown; any other exception fails the test."""
    try:
        return call(*arguments)
    except tnmoe.TnmoeError as error:
        text = str(error)
    assert text
    return None


numbers = st.integers(0, 99).map(str)
names = st.sampled_from(["a", "d", "N", "rank_2", "lambda", "__x", "_"])


def arithmetic(atoms):
    """Expressions over `atoms`. Powers do not nest: three levels are numbers of a thousand digits, four never end."""
    return st.recursive(
        atoms | st.tuples(atoms, st.integers(0, 17)).map("{0[0]}**{0[1]}".format),
        lambda inner: (
            st.tuples(inner, st.sampled_from(["+", "-", "*", "//", " + ", " * "]), inner).map("".join)
            | inner.map("({})".format)
        ),
        max_leaves=8,
    )


expressions = arithmetic(numbers | names)


@pytest.mark.slow
@settings(max_examples=100)
@given(expressions | st.text(st.sampled_from("0123456789abN_()+-*/. '\"\0\n\t²٣é"), max_size=30) | st.text(max_size=20))
def test_any_text_is_a_size_or_a_tnmoe_error(text):
    only_tnmoe_errors(parse_dim, text)
    only_tnmoe_errors(as_dim, text, "inputs")


@settings(max_examples=100)
@given(arithmetic(numbers))
def test_arithmetic_means_what_it_means_in_python(text):
    size = only_tnmoe_errors(parse_dim, text)
    if size is not None and max(map(int, re.findall(r"\*\*(\d+)", text)), default=0) <= 16:
        assert size == eval(text)


@pytest.mark.slow
@settings(max_examples=100)
@given(expressions)
@example("33**12*a*6")
@example("9000000000000000000 + a + 9000000000000000000")
def test_a_size_is_written_as_it_is_read(text):
    """A declaration goes into plans and docstrings as text, and comes back from there."""
    size = only_tnmoe_errors(as_dim, text, "inputs")
    if size is not None:
        declared = tnmoe.Linear(size, 3).declaration()["inputs"]
        assert as_dim(declared, "inputs") == size


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=3)
    | expressions
    | st.sampled_from(["cp", "tensor_ring", "dense", "mumoe", "linear", "softmax", "layer", "ab,bc->ac", "ab bc"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=6,
)
sizes = st.integers(1, 9) | st.sampled_from(["d", "2*d", "4"])
factorizations = st.fixed_dictionaries({"kind": st.sampled_from(["cp", "tensor_ring", "dense", "tucker"])}) | (
    st.sampled_from([{"kind": "cp", "rank": 2}, {"kind": "tensor_ring", "ranks": [2, 3, 4]}, {"kind": "dense"}])
)
plausible = {
    **dict.fromkeys(["inputs", "hidden", "outputs", "active"], sizes),
    "experts": sizes | st.lists(sizes, max_size=3),
    "factorization": factorizations,
    "gate": st.sampled_from([{}, {"activation": "softmax"}, {"norm": "none"}]),
    **dict.fromkeys(["bias", "input_norm"], st.booleans()),
    "expression": st.sampled_from(["ab,bc->ac", "a,a->", "ab->a"]),
    **dict.fromkeys(["weights", "frozen"], st.sampled_from(["ab", ["bc"], []])),
    "sizes": st.dictionaries(st.sampled_from("abc"), sizes, max_size=3),
}


OPTIONS = {kind: [f.name for f in dataclasses.fields(spec)] for kind, spec in KINDS.items()}
OPTIONS["network"] = ["expression", "weights", "frozen", "sizes"]


def rarely():
    """True about one time in ten."""
    return st.integers(0, 9).map(lambda k: k == 9)


@st.composite
def mappings(draw):
    """A declaration of some kind; now and then a value is wrong, a key missing or one too many."""
    kind = draw(st.sampled_from(list(OPTIONS)))
    needed = LEAST.get(kind, {"expression": ""})
    mapping = {"kind": draw(junk) if draw(rarely()) else kind}
    for key in OPTIONS[kind]:
        if draw(rarely()) if key in needed else draw(st.booleans()):
            continue
        mapping[key] = draw(junk if key not in plausible or draw(rarely()) else plausible[key])
    if draw(rarely()):
        mapping |= draw(st.dictionaries(st.text(max_size=5) | st.integers(0, 3), junk, max_size=1))
    return mapping


@pytest.mark.slow
@settings(max_examples=300)
@given(mappings() | junk)
def test_any_mapping_is_a_layer_or_a_tnmoe_error(mapping):
    layer = only_tnmoe_errors(tnmoe.declare, mapping)
    if layer is not None:
        assert only_tnmoe_errors(tnmoe.declare, layer.declaration) is not None
