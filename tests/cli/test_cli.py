"""The command line: what it prints, what it writes, and how it exits."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from xml.etree import ElementTree

import pytest
import torch

import tnmoe
from tnmoe.backends.torch import pointwise
from tnmoe.cli.main import main
from tnmoe.costing import op_cost

FORMATS = ("text", "markdown", "latex", "html", "csv", "json")
COMMANDS = ("table", "plan", "cost", "emit", "check")

# The keys that readers of the JSON form rely on; a literal, so that the code cannot change them unseen.
KEYS = ["layer", "parameters", "macs", "flops", "matmul_flops", "max_rank", "weight_bytes", "activation_bytes"]

BLOCK = """
[layer]
kind = "mumoe_block"
inputs = 12
hidden = 20
outputs = 8
experts = [3, 5]
factorization = { kind = "tensor_ring", ranks = [2, 3, 4, 5] }
gate = { activation = "entmax15", norm = "batch" }
bias = true
input_norm = true
"""

SYMBOLIC = """
[layer]
kind = "mumoe"
inputs = "d"
outputs = "4*d"
experts = 6
factorization = { kind = "cp", rank = "q" }

[sizes]
d = 5
"""


class Cli:
    """Runs commands inside the process, in a folder of their own."""

    def __init__(self, capsys, folder):
        self.capsys = capsys
        self.folder = folder

    def write(self, name, text):
        (self.folder / name).write_text(text, encoding="utf-8")
        return name

    def run(self, *arguments):
        """Exit code and output; nothing may appear on the error stream."""
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in arguments])
        out, err = self.capsys.readouterr()
        assert err == ""
        return done.value.code, out

    def __call__(self, *arguments):
        """The output of a command that succeeds."""
        code, out = self.run(*arguments)
        assert code == 0, out
        return out

    def json(self, *arguments):
        return json.loads(self(*arguments, "--format", "json"))


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Cli(capsys, tmp_path)


def spawn(*arguments, **options):
    """`python -m tnmoe` as a user's shell runs it: block-buffered output, which hides or shows late write errors."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env, **options}
    return subprocess.Popen([sys.executable, "-m", "tnmoe", *arguments], **options)


def load(path):
    """Import an emitted file."""
    namespace = {"__name__": "emitted"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return {k: v for k, v in namespace.items() if isinstance(v, type) and issubclass(v, torch.nn.Module)}


# ---- help ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_tells_the_commands_and_the_files():
    """Somebody without the README can go on from here."""
    process = spawn("--help")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", out, re.MULTILINE), command
        assert f"tnmoe {command} " in out, command
    for key in ("[layer]", "kind", "inputs", "hidden", "outputs", "experts", "factorization", "gate", "[sizes]"):
        assert key in out
    for preset in ("gpt2", "mixer", "clip"):
        assert preset in out
    assert "exit codes: 0 fine, 1 a check failed, 2 bad input" in out


def test_the_toml_in_the_help_is_a_declaration(cli):
    """The example is complete: copied into a file, it is a layer."""
    out = cli("--help")
    example = out[out.index("      [layer]") : out.index("  a JSON file")]
    text = re.sub(r"^      ", "", example, flags=re.MULTILINE)
    assert tomllib.loads(text)["layer"]["kind"] == "mumoe_block"
    cli.write("help.toml", text.replace("[sizes]", "#").replace("d = 768", "#"))
    assert cli.json("table", "help.toml", "--tokens", 1024)[0]["parameters"] == 4_784_808


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    out = cli(command, "--help")
    assert out.startswith(f"usage: tnmoe {command}")
    assert "PRESET|FILE" in out


def test_version(cli):
    assert cli("--version") == f"tnmoe {tnmoe.__version__}\n"


# ---- table ---------------------------------------------------------------------------------------------------


def test_table_of_a_family_as_json(cli):
    rows = cli.json("table", "gpt2")
    assert [list(row) for row in rows] == [KEYS] * 5
    by_label = {row["layer"]: row for row in rows}
    assert list(by_label) == [
        "GPT-2 block, MLP",
        "GPT-2 block, CP μMoE (R = 556)",
        "GPT-2 block, TR μMoE (r = 4, 4, 149)",
        "GPT-2 block, dense MoE (256 MLPs)",
        "GPT-2 block, sparse MoE (top-2 of 256)",
    ]
    cp = by_label["GPT-2 block, CP μMoE (R = 556)"]
    assert (cp["parameters"], cp["matmul_flops"], cp["max_rank"]) == (4_754_008, 9_730_785_280, 556)
    assert cp["weight_bytes"] == 4 * cp["parameters"]
    assert all(isinstance(row[k], int) for row in rows for k in KEYS[1:])
    # Dense and sparse: 256 MLPs of 4,722,432, a gate of 768·256 and the LayerNorm.
    assert [row["parameters"] for row in rows[3:]] == [256 * 4_722_432 + 768 * 256 + 1536] * 2


def test_several_families_are_one_document(cli):
    rows = cli.json("table", "gpt2-cp", "mixer", "clip-512-tr")
    assert len(rows) == 1 + 10 + 1
    assert {tuple(row) for row in rows} == {tuple(KEYS)}
    assert rows[0]["parameters"] == 4_754_008
    assert rows[-1]["parameters"] == 769_360
    table = list(csv.DictReader(io.StringIO(cli("table", "gpt2-cp", "mixer", "clip-512-tr", "--format", "csv"))))
    assert [{k: row[k] if k == "layer" else int(row[k]) for k in KEYS} for row in table] == rows


def test_families_with_work_in_vain_join_those_without(cli):
    """A routed layer fills up its blocks; prose shows the ideal beside, data has the columns that are asked for."""
    routed = 'kind = "sparse_moe"\ninputs = 8\noutputs = 8\nexperts = 4\nactive = 2\nhidden = 16\n'
    files = "gpt2-cp", cli.write("routed.toml", f"[layer]\n{routed}")
    assert "ideal FLOPs" in cli("table", *files, "--tokens", 64)
    for order in (files, files[::-1]):
        rows = cli.json("table", *order, "--tokens", 64)
        assert [list(row) for row in rows] == [KEYS] * 2
        table = list(csv.reader(io.StringIO(cli("table", *order, "--tokens", 64, "--format", "csv"))))
        assert [len(row) for row in table] == [len(KEYS)] * 3
    chosen = ("--columns", "flops,ideal_flops")
    plain, padded = cli.json("table", *files, "--tokens", 64, *chosen)
    assert plain["flops"] == plain["ideal_flops"]
    assert padded["flops"] > padded["ideal_flops"]
    assert list(plain) == list(padded) == ["layer", "flops", "ideal_flops"]


@pytest.mark.parametrize("form", FORMATS)
def test_table_in_every_format(cli, form):
    out = cli("table", "clip-128-cp", cli.write("block.toml", BLOCK), "--format", form)
    assert "\x1b" not in out  # no colours in a pipe
    assert out.endswith("\n")
    figures = {
        "text": "769,842",
        "markdown": "769,842",
        "latex": "769{,}842",
        "html": "769,842",
        "csv": "769842",
        "json": "769842",
    }
    assert figures[form] in out
    match form:
        case "text":
            assert "MACs: products in contraction steps" in out  # the convention stands with the figures
        case "markdown":
            assert "| ---" in out
        case "latex":
            assert out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == 2
            assert "μ" not in out
        case "html":
            assert len(ElementTree.fromstring(f"<body>{out}</body>")) == 2  # an element for each table
        case "csv":
            rows = list(csv.reader(io.StringIO(out)))
            assert rows[0] == KEYS
            assert [len(row) for row in rows] == [len(KEYS)] * 3
        case "json":
            assert [list(row) for row in json.loads(out)] == [KEYS] * 2


def test_table_chooses_columns_and_sorts(cli):
    rows = cli.json("table", "gpt2", "--columns", "max_rank, active_parameters", "--sort=-active_parameters")
    assert [list(row) for row in rows] == [["layer", "max_rank", "active_parameters"]] * 5
    assert [row["active_parameters"] for row in rows] == [1_209_140_736, 9_643_008, 4_784_808, 4_754_008, 4_723_968]


def test_si_numbers_align_and_leave_data_exact(cli):
    lines = cli("table", "gpt2", "--si", "--columns", "parameters,max_rank").splitlines()
    assert "parameters (M)" in lines[2]
    assert [line.split()[-2:] for line in lines[4:9]] == [
        ["4.72", "768"],
        ["4.75", "556"],
        ["4.78", "596"],
        ["1,209.14", "768"],
        ["1,209.14", "768"],
    ]
    assert cli.json("table", "gpt2", "--si") == cli.json("table", "gpt2")


@pytest.mark.parametrize("what", ["mixer-token-tr", "block.toml"])
def test_tokens_scale_the_work_alone(cli, what):
    cli.write("block.toml", BLOCK)
    one, ten = (cli.json("table", what, "--tokens", t)[0] for t in (1, 10))
    for key in ("macs", "flops", "matmul_flops", "activation_bytes"):
        assert ten[key] == 10 * one[key]
    assert ten["parameters"] == one["parameters"]


@pytest.mark.parametrize(("dtype", "width"), [("float64", 8), ("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_dtype_sets_the_bytes(cli, dtype, width):
    row = cli.json("table", "clip-linear", "--dtype", dtype)[0]
    assert row["weight_bytes"] == width * 769_000
    assert row["activation_bytes"] == width * 256 * 1000
    assert dtype in cli("cost", "clip-linear", "--dtype", dtype)


# ---- files ---------------------------------------------------------------------------------------------------


def test_a_toml_file_is_the_same_layer_as_the_declaration(cli):
    spec = tnmoe.MuMoEBlock(12, 20, 8, (3, 5), tnmoe.TensorRing((2, 3, 4, 5)), bias=True, input_norm=True)
    record = tnmoe.cost(tnmoe.plan(spec, tokens=1024)).record("block")
    assert cli.json("table", cli.write("block.toml", BLOCK)) == [record]


def test_sizes_of_symbols_come_from_the_file_or_the_command(cli):
    """`--size` gives what the file leaves open and overrides what it sets."""
    cli.write("symbolic.toml", SYMBOLIC)
    small = cli.json("table", "symbolic.toml", "--size", "q=2")[0]
    large = cli.json("table", "symbolic.toml", "--size", "q=2", "--size", "d=50")[0]
    # R(N + I + 1 + O) and the gate's I·N
    assert small["parameters"] == 2 * (6 + 5 + 1 + 20) + 5 * 6
    assert large["parameters"] == 2 * (6 + 50 + 1 + 200) + 50 * 6
    out = cli("cost", "symbolic.toml", "--size", "q=2", "--formulas")
    assert re.search(r"^parameters +.*\bd\b.*\bq\b", out, re.MULTILINE)


def test_a_bare_network_in_a_file(cli):
    text = '[layer]\nkind = "network"\nexpression = "bn,nr,bi,ir,ro->bo"\nweights = ["nr", "ir", "ro"]\n'
    cli.write("net.toml", text + "[sizes]\nb = 4\nn = 6\nr = 3\ni = 5\no = 7\n")
    row = cli.json("table", "net.toml")[0]
    assert row["parameters"] == 6 * 3 + 5 * 3 + 3 * 7
    assert row["matmul_flops"] == 2 * 4 * row["parameters"]
    assert cli.run("check", "net.toml")[0] == 0


# ---- plan and cost -------------------------------------------------------------------------------------------


def test_plan_prints_the_steps_and_the_proof(cli):
    out = cli("plan", "gpt2-tr")
    assert "proven optimal (subset_dp)" in out
    assert "T = 1,024" in out
    assert "Objective flops" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective", "macs"], "Objective macs, proven optimal"),
        (["--planner", "greedy"], "not proven optimal (greedy)"),
        (["--planner", "subset_dp"], "proven optimal (subset_dp)"),
        (["--tokens", "7"], "T = 7"),
    ],
)
def test_plan_options(cli, options, words):
    cli.write("block.toml", BLOCK)
    assert words in cli("plan", "block.toml", *options)


@pytest.mark.parametrize("planner", ["cotengra", "opt_einsum"])
def test_planners_of_other_libraries(cli, planner):
    pytest.importorskip(planner)
    cli.write("block.toml", BLOCK)
    assert f"({planner})" in cli("plan", "block.toml", "--planner", planner)


@pytest.mark.parametrize("what", ["clip-128-tr", "gpt2-sparse", "block.toml", "symbolic.toml"])
def test_a_saved_plan_costs_the_same(cli, what):
    """plan → JSON → cost gives the figures of the layer itself; that is what the file is for."""
    cli.write("block.toml", BLOCK)
    cli.write("symbolic.toml", SYMBOLIC + "q = 4\n")
    wrote = cli("plan", what, "--format", "json", "-o", "saved.json")
    assert wrote.startswith("wrote saved.json (")
    expected, got = cli.json("table", what)[0], cli.json("table", "saved.json")[0]
    assert {**got, "layer": None} == {**expected, "layer": None}
    assert cli.json("cost", "saved.json") == cli.json("cost", what)
    assert json.loads(cli("plan", "saved.json", "--format", "json")) == json.loads(
        (cli.folder / "saved.json").read_text()
    )


def test_a_saved_plan_of_expressions_can_be_read_back(cli):
    """A declaration is written as it can be read: `//` and a leading minus included."""
    text = SYMBOLIC.replace('"4*d"', '"d//2 + 1"').replace('"q"', '"d - q"')
    cli.write("symbolic.toml", text + "q = 2\n")
    cli("plan", "symbolic.toml", "--format", "json", "-o", "saved.json")
    assert cli.json("cost", "saved.json") == cli.json("cost", "symbolic.toml")


def test_a_saved_plan_takes_other_tokens(cli):
    cli("plan", "clip-linear", "--format", "json", "-o", "saved.json")
    assert cli.json("table", "saved.json", "--tokens", 8)[0]["matmul_flops"] == 2 * 8 * 768 * 1000
    assert "T = 8" in cli("plan", "saved.json", "--tokens", 8)


def test_plans_of_a_family_are_one_json_document(cli):
    plans = cli.json("plan", "clip")
    assert len(plans) == 9
    assert {p["format"] for p in plans} == {"tnmoe-plan-1"}


@pytest.mark.parametrize("view", [[], ["--steps"], ["--backward"], ["--training"], ["--formulas"]])
@pytest.mark.parametrize("form", FORMATS)
def test_cost_in_every_format(cli, form, view):
    out = cli("cost", "clip-128-cp", *view, "--format", form)
    assert out.strip()
    if form == "json":
        rows = json.loads(out)
        assert all(isinstance(row, dict) for row in rows)
        if not view:
            assert rows[-1]["part"] == "total"
            assert rows[-1]["parameters"] == sum(row["parameters"] for row in rows[:-1]) == 769_842
        if view == ["--formulas"]:
            by_figure = {row["figure"]: row for row in rows}
            assert by_figure["parameters"]["value"] == 769_842
            assert by_figure["max rank"]["formula"] == "Min(I, O, R)"
    if form == "csv":
        rows = list(csv.reader(io.StringIO(out)))
        assert len({len(row) for row in rows}) == 1


def test_costs_of_several_layers_say_whose_they_are(cli):
    rows = cli.json("cost", "clip-linear", "clip-128-cp")
    assert len({row["layer"] for row in rows}) == 2


# ---- emit ----------------------------------------------------------------------------------------------------


def test_an_emitted_file_imports_and_trains(cli):
    cli.write("block.toml", BLOCK)
    out = cli("emit", "block.toml", "-o", "blocks.py", "--name", "MyBlock")
    assert out.startswith("wrote blocks.py (")
    assert [p.name for p in sorted(cli.folder.iterdir())] == ["block.toml", "blocks.py"]
    classes = load(cli.folder / "blocks.py")
    torch.manual_seed(0)
    module = classes["MyBlock"]()
    assert sum(p.numel() for p in module.parameters()) == cli.json("table", "block.toml")[0]["parameters"]
    x, target = torch.randn(16, 12), torch.randn(16, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_family_is_one_file_with_a_class_for_each_layer(cli):
    out = cli("emit", "clip", "-o", "clip.py")
    assert [line for line in out.splitlines() if line.startswith("left out: ")] == [
        "left out: head 768→1000, N = 128, dense MoE (cost only)",
        "left out: head 768→1000, N = 128, sparse MoE (top-2) (cost only)",
        "left out: head 768→1000, N = 512, dense MoE (cost only)",
        "left out: head 768→1000, N = 512, sparse MoE (top-2) (cost only)",
    ]
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in c().parameters()) for n, c in load(cli.folder / "clip.py").items()}
    names = ["Linear", "CPMuMoE1", "TensorRingMuMoE1", "CPMuMoE2", "TensorRingMuMoE2"]
    assert counts == dict(zip(names, [769_000, 769_842, 772_572, 769_581, 769_360]))


def test_emit_prints_without_a_file(cli):
    """The source alone, so that it can be piped into a file."""
    out = cli("emit", "clip-linear")
    assert out == tnmoe.emit(tnmoe.plan(tnmoe.Linear(768, 1000), tokens=256))
    compile(out, "emitted", "exec")


def test_a_saved_plan_is_emitted_as_planned(cli):
    cli.write("block.toml", BLOCK)
    cli("plan", "block.toml", "--planner", "greedy", "--format", "json", "-o", "saved.json")
    assert cli("emit", "saved.json") == cli("emit", "block.toml", "--planner", "greedy")


def test_a_second_run_replaces_the_file(cli):
    cli("emit", "clip-linear", "-o", "out.py")
    cli("emit", "clip-linear", "-o", "out.py", "--name", "Other")
    assert list(load(cli.folder / "out.py")) == ["Other"]


def test_output_through_a_link_keeps_the_link(cli):
    """What is no regular file stays what it is: as root, `-o /dev/stdout` or `-o /dev/null` would replace a device."""
    cli.write("real.py", "")
    (cli.folder / "link.py").symlink_to("real.py")
    cli("emit", "clip-linear", "-o", "link.py")
    assert (cli.folder / "link.py").is_symlink()
    assert list(load(cli.folder / "real.py")) == ["Linear"]


# ---- check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_check_passes(cli, form):
    cli.write("block.toml", BLOCK)
    code, out = cli.run("check", "block.toml", "clip-linear", "--format", form)
    assert code == 0
    assert "FAILED" not in out
    if form == "json":
        rows = json.loads(out)
        assert {row["verdict"] for row in rows} == {"ok"}
        items = [row["item"] for row in rows if row["layer"] == "block"]
        assert items == [
            "values, evaluation (dense weights)",
            "values, training (dense weights)",
            "parameters",
            "matmul FLOPs",
        ]


def test_check_names_what_it_leaves_out(cli):
    assert "Not checked (cost only): head 768→1000, N = 128, dense MoE." in cli("check", "clip")


def failed(cli, *arguments):
    """Names of the failed comparisons of a check that exits with 1."""
    code, out = cli.run("check", *arguments, "--format", "json")
    assert code == 1
    return [row["item"].split(" (")[0] for row in json.loads(out) if row["verdict"] == "FAILED"]


def test_check_fails_on_a_wrong_flop_formula(cli, monkeypatch):
    """The FLOPs are compared with torch's own counter, so a wrong formula shows."""
    cli.write("block.toml", BLOCK)
    right = op_cost.op_cost

    def wrong(op, sizes):
        found = right(op, sizes)
        return op_cost.Cost(found.macs, found.matmul_flops + 1, found.elementwise_flops, 0, found.activations)

    monkeypatch.setattr(op_cost, "op_cost", wrong)
    assert failed(cli, "block.toml") == ["matmul FLOPs"]


def test_check_fails_on_a_wrong_parameter_count(cli, monkeypatch):
    cli.write("block.toml", BLOCK)
    monkeypatch.setattr(tnmoe.CostReport, "parameters", property(lambda self: self.number("parameters") - 1))
    assert failed(cli, "block.toml", "clip-linear") == ["parameters", "parameters"]


def test_check_fails_on_wrong_values(cli, monkeypatch):
    """A module that computes something else does not pass, however well it is costed."""
    cli.write("block.toml", BLOCK)
    right = pointwise.expression
    monkeypatch.setattr(pointwise, "expression", lambda op, writer: right(op, writer).replace("F.gelu(", "F.relu("))
    assert failed(cli, "block.toml") == ["values, evaluation", "values, training"]


# ---- the process ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exit_codes_of_the_process(tmp_path):
    process = spawn("check", "clip-linear", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "ok" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["table", "gpt2", "mixer", "clip"], ["--help"]], ids=lambda a: a[0])
def test_a_reader_that_leaves_early_sees_no_traceback(arguments):
    """`tnmoe … | head -1`: the pipe is closed before all is written. Closed at once here, so that no race decides."""
    process = spawn(*arguments)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.slow
def test_head_in_a_shell():
    command = f"{sys.executable} -m tnmoe emit gpt2 clip 2>&1 | head -1"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert done.stdout.startswith('"""Generated by tnmoe')


@pytest.mark.slow
def test_output_for_a_terminal_without_unicode():
    """An ASCII-only stream gets replacements, not a traceback."""
    process = spawn("table", "clip-512-cp", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "769,581" in out


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_terminal_shows_whole_numbers_and_brackets(width):
    """On a terminal of any width no number is broken, and "[t i]" is not taken for markup."""
    from rich.console import Console

    from tnmoe.cli.printing import fitted
    from tnmoe.presets.registry import FAMILIES
    from tnmoe.reports.cost_report import comparison

    title, rows = FAMILIES["gpt2"]
    plans = {p.label: tnmoe.plan(p.spec, tokens=p.tokens) for p in rows}
    table = comparison({label: tnmoe.cost(p) for label, p in plans.items()}, title)

    def shown(table):
        console = Console(width=width, record=True, file=io.StringIO())
        for part in fitted(table, width):
            console.print(part)
        return console.export_text()

    text = shown(table)
    for row in table.rows:
        for cell in row[1:]:
            assert f"{cell:,}" in text
    steps = shown(plans["GPT-2 block, MLP"].table())
    assert "[t" in steps
    if width >= 80:  # narrower, names are folded; numbers never are
        for op in plans["GPT-2 block, MLP"].bound.ops:
            assert op.out.name in steps


def refused(capsys, *arguments):
    """The one error of a command that is refused."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert done.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


@pytest.mark.slow
def test_calibrate_and_predict(cli, capsys):
    """A short calibration gives a profile that prices each step, of routed layers too."""
    assert "wrote here.json" in cli("calibrate", "--budget", "1", "-o", "here.json")
    rows = cli.json("cost", "clip-128-cp", "--profile", "here.json")
    assert len(rows) >= 7
    assert len(cli.json("cost", "clip-128-sparse", "--profile", "here.json")) >= 7
    (row,) = cli.json("table", "clip-128-sparse", "--profile", "here.json")
    assert row["predicted_microseconds"] > 0
    assert "bfloat16" in refused(capsys, "cost", "clip-128-cp", "--profile", "here.json", "--dtype", "bfloat16")


def test_profiles_that_are_none(cli, capsys):
    cli.write("bad.json", "{}")
    assert "bad.json" in refused(capsys, "cost", "clip-128-cp", "--profile", "bad.json")
    assert "missing.json" in refused(capsys, "cost", "clip-128-cp", "--profile", "missing.json")
