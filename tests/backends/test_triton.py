"""The flavour `triton`: kernels in the interpreter, kernels compiled for GPUs that are not here, and the plain path."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.emitted_files import ruff
from support.gradients import assert_same, draw, measure, pair
from torch._dynamo.testing import CompileCounterWithBackend

import tnmoe
from tnmoe.backends.runtime import triton_kernels as kernels
from tnmoe.cli.main import main
from tnmoe.presets.registry import PRESETS

ROOT = Path(__file__).parents[2]
GATE = tnmoe.Gate("entmax15", "layer")
SPECS = {
    "cp": tnmoe.MuMoEBlock(9, 20, 7, 5, tnmoe.CP(6), GATE, input_norm=True),
    "tr": tnmoe.MuMoEBlock(33, 40, 21, 5, tnmoe.TensorRing((2, 3, 8)), GATE),
}

every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def fused_plan(spec: object) -> tnmoe.Plan:
    """A plan that keeps nothing, so that everything that can be fused is."""
    plan = tnmoe.plan(spec, tokens=16, memory="save", flavour="triton")
    return replace(plan, function=replace(plan.function, kept=()))


# ---- the interpreter -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interpreted():
    """All of `triton_interpreted.py`, in a process in which Triton interprets from its import on."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / "support" / "triton_interpreted.py"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200
    assert "skipped" not in done.stdout


# ---- compiled for GPUs ---------------------------------------------------------------------------------------

LEAST_SHARED = 99 << 10
"""Bytes of shared memory that a program may have on every GPU from sm_80 on (sm_86 and sm_89 have the least)."""


class Device:
    """A driver for a GPU that is not here: kernels are compiled for it as they would be launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Compiled:
    """A kernel whose launches only compile it, and what they made."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid: object) -> object:
        return lambda *args, **options: self.made.append(self.kernel.warmup(*args, grid=grid, **options))

    @property
    def name(self) -> str:
        return self.kernel.__name__


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request, tmp_path, monkeypatch):
    """Gives the kernels of a namespace, prepared to compile for a GPU; nothing comes from the cache of another run."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not isinstance(kernels._entmax15_kernel, triton.JITFunction):
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_active", Device(request.param))

    def prepared(space: dict[str, object]) -> dict[str, Compiled]:
        found = {name: Compiled(kernel) for name, kernel in space.items() if name.endswith("_kernel")}
        for name, kernel in found.items():
            monkeypatch.setitem(space, name, kernel)
        monkeypatch.setitem(space, "_kernels_take", lambda *tensors: True)
        return found

    prepared.capability = request.param
    return prepared


def spilled(machine_code: bytes, folder: Path) -> int:
    """Bytes of registers that did not fit, as the disassembler that comes with Triton tells."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    assert tool.is_file()
    (folder / "kernel.cubin").write_bytes(machine_code)
    done = subprocess.run(
        [tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])


fusion = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.mark.slow
@fusion
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt2_products_compile(gpu, tmp_path, dtype):
    """At 4096 tokens, to machine code: the largest tiles, tensor cores in half precision, no register spilled."""
    made = gpu(vars(kernels))
    x, a = torch.empty(4096, 768, dtype=dtype), torch.empty(4096, 256, dtype=dtype)
    for rank in (556, 512):  # of which the strides of one alone are multiples of 16
        u, bias = torch.empty(rank, 768, dtype=dtype).mT, torch.empty(rank, dtype=dtype)
        v = torch.empty(256, rank, dtype=dtype)
        assert kernels._contract_multiply(a, v, None, x, u, bias).shape == (4096, rank)
    kernels._contract_multiply(a, v, None, torch.empty(4096, rank, dtype=dtype))
    for ranks in ((4, 149), (3, 50)):
        w, bias = torch.empty(ranks[0] * ranks[1], 768, dtype=dtype).mT, torch.empty(ranks[0] * ranks[1], dtype=dtype)
        mixer = torch.empty(4096, 4, ranks[0], dtype=dtype)
        assert kernels._contract_mix(mixer, x, w, bias).shape == (4096, 4, ranks[1])
    found = [c for kernel in made.values() for c in kernel.made]
    assert len(found) == 5
    for c in found:
        assert f".target sm_{gpu.capability}" in c.asm["ptx"]
        assert c.metadata.num_warps == 8
        assert c.metadata.shared <= LEAST_SHARED
        assert bool(re.search(r"\b(wg)?mma\b", c.asm["ptx"].replace(".", " "))) == (dtype != torch.float32)
        assert spilled(c.asm["cubin"], tmp_path) == 0


@pytest.mark.slow
@fusion
def test_other_products_compile(gpu, monkeypatch):
    """One token, TF32, K = 1, widths of 1, and sums over 1 and 16 entries."""
    made = gpu(vars(kernels))
    monkeypatch.setattr(kernels, "_matmul_precision", lambda: "tf32")
    x = torch.empty(1, 768)
    kernels._contract_multiply(torch.empty(1, 256), torch.empty(256, 556), None, x, torch.empty(556, 768).mT)
    kernels._contract_multiply(x[:, :1], torch.empty(1, 1), torch.empty(1), x[:, 1:2], torch.empty(1, 1))
    for mixed, summed, cols in ((1, 1, 1), (4, 16, 5), (2, 4, 149)):
        kernels._contract_mix(torch.empty(1, mixed, summed), x, torch.empty(768, summed * cols))
    assert "tf32" in made["_contract_multiply_kernel"].made[0].asm["ptx"]
    assert [len(made[f"_contract_{name}_kernel"].made) for name in ("multiply", "mix")] == [2, 3]


@pytest.mark.slow
@fusion
def test_entmax_compiles(gpu):
    """From one entry to the longest row, forward and backward."""
    made = gpu(vars(kernels))
    for cols, dtype in ((1, torch.float32), (256, torch.bfloat16), (16384, torch.float16)):
        x = torch.zeros(3, cols, dtype=dtype, requires_grad=True)
        y = kernels.entmax15(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert [len(k.made) for name, k in made.items() if "entmax15" in name] == [3, 3]


@pytest.mark.slow
@every
@fusion
def test_modules_compile(gpu, spec):
    """An emitted module's own kernels, with the arguments that its forward and backward pass give them."""
    plan = fused_plan(spec)
    module = tnmoe.build(plan)
    made = gpu(sys.modules[type(module).__module__].__dict__)
    y = module(torch.randn(70, spec.inputs))
    y.sum().backward()
    expected = {"_contract_multiply_kernel": 2} if spec is SPECS["cp"] else {"_contract_mix_kernel": 2}
    expected |= {"_entmax15_kernel": 1, "_entmax15_backward_kernel": 1}
    assert {name: len(k.made) for name, k in made.items()} == expected


# ---- without a GPU, without Triton ---------------------------------------------------------------------------


@every
def test_a_cpu_takes_the_plain_path(spec, monkeypatch):
    """No kernel is launched, and nothing is rounded in another way than in the portable flavour."""
    plan = fused_plan(spec)
    portable, module = (tnmoe.build(replace(plan, function=f)) for f in (replace_flavour(plan), plan.function))
    module.load_state_dict(portable.state_dict())
    space = sys.modules[type(module).__module__].__dict__
    for name in [name for name in space if name.endswith("_kernel")]:
        monkeypatch.setitem(space, name, None)  # a launch would fail
    x = draw(11, spec.inputs, dtype=torch.float32)
    assert_same(portable, module, x, 0.0)


def replace_flavour(plan: tnmoe.Plan) -> object:
    """The function of the flavour `portable` that keeps the same."""
    return replace(plan.function, flavour="portable", fused=())


WITHOUT = """
import builtins, importlib.util, sys
import torch
plain = builtins.__import__
def blocked(name, *args, **kwargs):
    if name.partition(".")[0] in {"triton", "tnmoe"}:
        raise ImportError(f"{name} is blocked", name=name)
    return plain(name, *args, **kwargs)
builtins.__import__ = blocked
spec = importlib.util.spec_from_file_location("emitted", sys.argv[1])
emitted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emitted)
assert emitted.triton is None and not hasattr(emitted, "_product")
layer = next(v for v in vars(emitted).values() if isinstance(v, type) and issubclass(v, torch.nn.Module))()
torch.manual_seed(0)
x = torch.randn(7, 9)
layer(x).sum().backward()
assert all(p.grad.isfinite().all() for p in layer.parameters())
print(layer.freeze()(x).shape)
"""


@pytest.mark.slow
def test_runs_without_triton(tmp_path):
    path = tmp_path / "layer.py"
    path.write_text(tnmoe.emit(fused_plan(SPECS["cp"]), freeze=True), encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "-c", WITHOUT, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([7, 7])"


@pytest.mark.slow
@every
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_whole(spec):
    """One graph for every batch size, forward and backward, with the values of eager."""
    torch._dynamo.reset()
    plain, module = pair(fused_plan(spec), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled_module = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for rows in (9, 4, 17):
        x = draw(rows, spec.inputs, dtype=torch.float32)
        torch.testing.assert_close(compiled_module(x), plain(x), rtol=1e-3, atol=1e-3)
        compiled_module(x).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.slow
@every
def test_exported(spec):
    plain, module = pair(fused_plan(spec), torch.float32)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    x = draw(5, spec.inputs, dtype=torch.float32, grad=False)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: tokens}}).module()
        for rows in (3, 20):
            x = draw(rows, spec.inputs, dtype=torch.float32, grad=False)
            torch.testing.assert_close(exported(x), plain(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-cp", "gpt2-tr", "clip-128-cp"])
@pytest.mark.parametrize("memory", ["recompute", "least"])
def test_trains_as_predicted(name, memory):
    """FLOPs by torch's counter and bytes by its hooks, where factors are computed again."""
    plan = tnmoe.plan(PRESETS[name].spec, tokens=12, memory="recompute", flavour="triton")
    if memory == "least":
        plan = replace(plan, function=replace(plan.function, kept=()))
    report = tnmoe.cost(plan)
    x = torch.randn(12, int(plan.bound.sizes["i"]), requires_grad=True)
    assert measure(tnmoe.build(plan), x) == (report.training_matmul_flops, report.saved_bytes)


# ---- the file ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_file_is_clean(tmp_path):
    """Linted and formatted; it imports torch alone, but for a guarded Triton; kernels stand as in the package."""
    source = inspect.getsource(kernels)
    for k, (spec, freeze) in enumerate((s, f) for s in SPECS.values() for f in (False, True)):
        text = tnmoe.emit(fused_plan(spec), freeze=freeze)
        (tmp_path / f"layer_{k}.py").write_text(text, encoding="utf-8")
        tree = ast.parse(text)
        imported = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [a.name if isinstance(n, ast.Import) else n.module for n in imported for a in n.names]
        assert {name.partition(".")[0] for name in names} == {"torch"}
        (guarded,) = (n for n in tree.body if isinstance(n, ast.If))
        kernel_names = [n.name for n in guarded.body]
        assert len(kernel_names) == 4  # a tile, the product's kernel, entmax forward and backward
        for node in (*guarded.body, *tree.body):
            if getattr(node, "name", "") in {*kernel_names, *vars(kernels)} - {"_Entmax15Root"}:
                assert ast.get_source_segment(text, node) in source.replace("ctx: Any", "ctx"), node.name
    ruff("check", str(tmp_path), "--select", "E,F,W,I,B,UP,PIE", "--line-length", "100")
    ruff("format", "--check", "--diff", str(tmp_path), "--line-length", "100")


def test_no_kernel_without_need():
    """Of a layer that nothing can be fused in, a file has none; and other flavours never have one."""
    dense = tnmoe.MuMoE(9, 7, 20, tnmoe.Dense(), tnmoe.Gate("softmax", "none"))
    assert "triton" not in tnmoe.emit(tnmoe.plan(dense, tokens=16, flavour="triton")).replace("'triton'", "")
    assert "triton" not in tnmoe.emit(tnmoe.plan(SPECS["cp"], tokens=16, flavour="fast"))


def test_names_of_the_user():
    """A class may not be called as Triton is in the file; a tensor that is gets an underscore."""
    with pytest.raises(tnmoe.EmitError, match="taken"):
        tnmoe.emit(fused_plan(SPECS["cp"]), name="triton")
    network = tnmoe.Network.parse("tl,lr->tr", weights="lr")
    source = tnmoe.emit(tnmoe.plan(network, sizes={"t": 3, "l": 4, "r": 5}))
    assert "def forward(self, tl_: Tensor) -> Tensor:" in source


def test_command_line(capsys):
    way = ["clip-128-cp", "--tokens", "64", "--keep", "recompute", "--flavour", "triton"]
    with pytest.raises(SystemExit, match="0"):
        main(["emit", *way])
    plan = tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=64, memory="recompute", flavour="triton")
    assert capsys.readouterr().out == tnmoe.emit(plan)
    with pytest.raises(SystemExit, match="0"):
        main(["plan", *way])
    assert "DualContract" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_benchmark_needs_a_gpu():
    """No figure is better than one that means nothing."""
    script = ROOT / "benchmarks" / "kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), "--profile", "h100"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert "on a GPU alone" in done.stderr
    assert not done.stdout
