"""The sparse gates of emitted files against the `entmax` package and against the definition of their projection."""

import entmax as package
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tnmoe.backends.runtime import activations

GATES = {
    "entmax15": (activations.entmax15, package.entmax15),
    "sparsemax": (activations.sparsemax, package.sparsemax),
}
both = pytest.mark.parametrize(("ours", "theirs"), GATES.values(), ids=GATES)


@pytest.fixture(scope="module", params=["by size", "search"], autouse=True)
def algorithm(request):
    """Every test twice: as it is, which sorts what is small, and as compiled, which searches always."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "search":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield request.param


def logits(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradients(gate, x: Tensor, cotangent: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(gate(leaf), leaf, cotangent)[0]


# ---- values, support and gradients ---------------------------------------------------------------------------


@pytest.mark.slow
@both
@settings(max_examples=100)
@given(
    rows=st.integers(1, 4),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-8, 0.01, 0.3, 1.0, 3.0, 30.0, 1e6]),
)
def test_equals_the_package(ours, theirs, rows, n, seed, scale):
    """Same values, gradients and support from near-uniform to one-hot."""
    x = logits(rows, n, seed=seed, scale=scale)
    got, want = ours(x), theirs(x, dim=-1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones(rows, dtype=x.dtype), rtol=0, atol=1e-12)
    cotangent = logits(rows, n, seed=seed + 1)
    # An entry within rounding of the threshold may fall on either side, and its derivative jumps there.
    clear = bool(((want == 0) | (want > 1e-12)).all() and ((got > 0) == (want > 0)).all())
    if clear:
        torch.testing.assert_close(gradients(ours, x, cotangent), gradients(theirs, x, cotangent), rtol=0, atol=1e-10)


@both
@settings(max_examples=100)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**16), scale=st.sampled_from([0.3, 1.0, 3.0, 30.0]))
@example(n=3, seed=0, scale=1e6)
def test_support_is_exact(ours, theirs, n, seed, scale):
    """Zeros are zeros, not 1e-32: sparsity is what one counts."""
    x = logits(20, n, seed=seed, scale=scale)
    got, want = ours(x), theirs(x, dim=-1)
    leaked = got[(got > 0) != (want > 0)]
    assert leaked.numel() == 0, f"{leaked.numel()} entries differ in being zero, e.g. {leaked[0]:.1e}"


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_logit_far_above_is_one_hot(ours, theirs, dtype):
    """The other logits lie below the least threshold, -1; rounding must not let one of them in."""
    for gap in (2.0 + 1e-5, 2.5, 5.0, 1e3, 1e30):
        for n in range(1, 40):
            x = torch.full((n,), -gap, dtype=dtype)
            x[n // 2] = 0.0
            assert ours(x).tolist() == [float(k == n // 2) for k in range(n)], f"gap {gap}, {n} logits"


@pytest.mark.slow
@both
@pytest.mark.parametrize("n", [64, 4096])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_float32(ours, theirs, n, scale):
    """To 1e-6, from many shares to few: the long tail of unchosen logits must not blur the threshold."""
    x = logits(100, n, scale=scale, dtype=torch.float32)
    got = ours(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, theirs(x.double(), dim=-1).float(), rtol=0, atol=1e-6)
    cotangent = logits(100, n, seed=1, dtype=torch.float32)
    want = gradients(theirs, x.double(), cotangent.double()).float()
    clear = ((got > 0) == (theirs(x.double(), dim=-1) > 0)).all(-1)  # at the threshold the derivative jumps
    assert clear.sum() > 90
    torch.testing.assert_close(gradients(ours, x, cotangent)[clear], want[clear], rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("offset", [-1e5, 1e5])
def test_float32_far_from_zero(ours, theirs, offset):
    """A common offset changes nothing but the rounding of the input."""
    x = logits(50, 16, dtype=torch.float32) + offset
    torch.testing.assert_close(ours(x), theirs(x.double(), dim=-1).float(), rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(ours, theirs, dtype):
    """Computed in float32, returned in the input's type, and differentiable."""
    x = logits(50, 64, dtype=dtype).requires_grad_()
    got = ours(x)
    assert got.dtype == dtype
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), theirs(x.double(), dim=-1), rtol=2 * precision, atol=precision / 64)
    got.sum().backward()
    assert x.grad.dtype == dtype
    assert bool(x.grad.isfinite().all())


# ---- edges ---------------------------------------------------------------------------------------------------


@both
def test_ties(ours, theirs):
    """Equal logits get equal shares, all of them, or those at the top."""
    for n in (2, 3, 7, 10):
        equal = torch.full((n,), 0.3, dtype=torch.float64)
        torch.testing.assert_close(ours(equal), torch.full((n,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-15)
    x = torch.tensor([[0.0, 5.0, 5.0, -1.0], [1.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, dim=-1), rtol=0, atol=1e-14)
    cotangent = logits(2, 4, seed=1)
    torch.testing.assert_close(gradients(ours, x, cotangent), gradients(theirs, x, cotangent), rtol=0, atol=1e-12)


@both
def test_one_column(ours, theirs):
    x = torch.tensor([[-3.0], [0.0], [1e8]], requires_grad=True)
    got = ours(x)
    assert torch.equal(got, torch.ones(3, 1))
    got.square().sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 1))


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 4, 5)])
def test_any_leading_axes(ours, theirs, shape):
    x = logits(*shape).requires_grad_()
    got = ours(x)
    assert got.shape == shape
    if got.numel():
        torch.testing.assert_close(got, theirs(x, dim=-1), rtol=0, atol=1e-12)
    got.sum().backward()
    assert x.grad.shape == shape


@both
def test_minus_infinity_masks_an_expert(ours, theirs):
    """The usual way to switch an expert off: share zero, no gradient, the others as if it were not there."""
    x = logits(6, 5)
    masked = x.clone()
    masked[:, 2] = -torch.inf
    others = [0, 1, 3, 4]
    got = ours(masked)
    assert torch.equal(got[:, 2], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(got[:, others], theirs(x[:, others], dim=-1), rtol=0, atol=1e-14)
    grad = gradients(ours, masked, logits(6, 5, seed=1))
    assert bool(grad.isfinite().all())
    assert torch.equal(grad[:, 2], torch.zeros(6, dtype=torch.float64))


@both
def test_nan_stays_in_its_row(ours, theirs):
    """NaN comes out where it went in, without an exception that would hide where it came from."""
    x = logits(3, 5)
    x[1, 2] = torch.nan
    x.requires_grad_()
    got = ours(x)
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 2]].isfinite().all())
    got.square().sum().backward()
    assert bool(x.grad[[0, 2]].isfinite().all())


@both
@pytest.mark.parametrize("row", [[-torch.inf] * 3, [torch.inf, 0.0, 0.0], [torch.nan] * 3])
def test_rows_without_an_answer_are_nan(ours, theirs, row):
    assert bool(ours(torch.tensor(row)).isnan().all())


@both
def test_inputs_are_left_alone(ours, theirs):
    """Strided inputs work, and nothing is written in place."""
    x = logits(5, 6)
    before = x.clone()
    torch.testing.assert_close(ours(x.mT), theirs(x.mT.contiguous(), dim=-1), rtol=0, atol=1e-12)
    assert torch.equal(x, before)


# ---- derivatives and transforms ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_numerical_derivatives(ours, theirs, scale):
    x = logits(3, 4, seed=2, scale=scale).requires_grad_()
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


@both
def test_vmap(ours, theirs):
    x = logits(4, 3, 5)
    torch.testing.assert_close(torch.func.vmap(ours)(x), ours(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(ours, in_dims=1, out_dims=1)(x), ours(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(ours))(x), ours(x), rtol=0, atol=0)


@both
def test_functional_gradients(ours, theirs):
    """grad, vmap of grad (gradients per example), reverse Jacobian and grad of grad."""
    x, weight = logits(4, 5), logits(5, seed=1)

    def loss(row: Tensor) -> Tensor:
        return (ours(row) * weight).sum()

    want = gradients(ours, x, weight.expand(4, 5))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), want, rtol=0, atol=1e-14)
    jacobian = torch.func.jacrev(ours)(x[0])
    torch.testing.assert_close(weight @ jacobian, want[0], rtol=0, atol=1e-14)
    hessian = torch.func.jacrev(torch.func.grad(loss))(x[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x[0]), rtol=0, atol=1e-14)


@both
def test_jacobian_is_symmetric_and_preserves_the_sum(ours, theirs):
    """Both gates are gradients of a convex function, and their shares always sum to one."""
    jacobian = torch.func.jacrev(ours)(logits(7, seed=3))
    torch.testing.assert_close(jacobian, jacobian.mT, rtol=0, atol=1e-14)
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-14)


# ---- the search without a sort --------------------------------------------------------------------------------


def bisected(x: Tensor, power: int) -> Tensor:
    """z - τ with Σ max(z - τ, 0)^power = 1, bisected in float64: an oracle that neither sorts nor differentiates."""
    z = x.double() / power
    z = z - z.amax(-1, keepdim=True)
    low, high = torch.full_like(z[..., :1], -1.0), torch.zeros_like(z[..., :1])
    for _ in range(60):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return z - low


SEARCHED = pytest.mark.parametrize(
    ("ours", "power"), [(activations.entmax15, 2), (activations.sparsemax, 1)], ids=list(GATES)
)


def slow_rows(n: int, seed: int) -> Tensor:
    """Rows with logits at many scales, near the largest one or near the least threshold, which need most steps."""
    generator = torch.Generator().manual_seed(seed)
    levels = 12

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    depth = n ** (-1.2 * draw(40, levels))
    depth = torch.where(draw(40, 1) > 0.5, 1 - depth, depth)
    share = n ** -draw(40, levels)
    ends = (share / share.sum(-1, keepdim=True) * n).cumsum(-1)
    level = (torch.arange(n)[:, None] + 0.5 > ends[:, None, :]).sum(-1).clamp(max=levels - 1)
    rows = -depth.gather(1, level)
    rows[:, 0] = 0
    return rows


@pytest.mark.slow
@SEARCHED
@pytest.mark.parametrize("n", [1, 3, 16, 64, 256, 2000])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_search_converges(ours, power, n, dtype, precision):
    """Random, uniform, two-level and multi-scale rows: the steps suffice for each."""
    counts = 2 ** torch.arange(n.bit_length())
    two = (torch.arange(n) >= counts[:, None]) * torch.linspace(-1, -0.01, 12, dtype=torch.float64)[:, None, None]
    rows = torch.cat(
        [
            torch.zeros(1, n, dtype=torch.float64),
            logits(20, n, seed=1),
            logits(20, n, seed=2, scale=0.03),
            logits(20, n, seed=3, scale=10),
            power * two.flatten(0, 1),
            power * slow_rows(n, seed=4),
        ]
    ).to(dtype)
    excess = bisected(rows, power)
    torch.testing.assert_close(ours(rows).double(), excess.clamp(min=0) ** power, rtol=0, atol=precision)
    clear = (excess.abs() > 10 * precision).all(-1)  # elsewhere rounding decides
    assert clear.sum() > 20
    assert torch.equal((ours(rows) > 0)[clear], (excess > 0)[clear]), "the support differs"


@both
def test_many_rows_are_searched_and_few_sorted(ours, theirs, algorithm):
    """By the number of logits that come in; a compiled module always searches, so that one graph fits all sizes."""

    class Sorts(TorchDispatchMode):
        found = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found |= func._overloadpacket.__name__ == "sort"
            return func(*args, **(kwargs or {}))

    for rows, sorts in ((15, True), (16, False), (4096, False)):
        with Sorts() as seen:
            ours(torch.zeros(rows, 256))
        assert seen.found == (sorts and algorithm == "by size"), rows
