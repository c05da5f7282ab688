"""Triton kernels for products that need not be written, and for entmax.

The emitter copies from here what a file needs, word for word. Each function tests whether its kernel can take the
tensors; where it cannot (no Triton, a CPU, float64, no elements, inside `torch.compile` or `vmap`) public operations of
torch compute the same. Products are summed in float32, and in float32's own precision unless the user allows TF32.

Lines are those of an emitted file: at most 100 characters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tnmoe.backends.runtime.activations import _Entmax15Root

try:
    import triton
    import triton.language as tl
except ImportError:  # then public operations of torch compute everything
    triton = None


def _kernels_take(*tensors: Tensor | None) -> bool:
    """Whether kernels can compute with these tensors: floats of one type, in a GPU's memory."""
    if triton is None or torch.compiler.is_compiling():
        return False
    given = [t for t in tensors if t is not None]
    dtype, device = given[0].dtype, given[0].device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    for t in given:
        # Subclasses only stand for a tensor, or spread it over devices.
        if type(t) not in (Tensor, nn.Parameter) or (t.dtype, t.device) != (dtype, device):
            return False
        if not t.numel():
            return False
    if isinstance(tl.cdiv, triton.JITFunction):
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            return False
    elif dtype == torch.bfloat16:  # Triton's interpreter takes any device, but multiplies wrongly
        return False
    try:
        return all(t.data_ptr() for t in given)
    except RuntimeError:  # inside a transform of torch.func
        return False


def _block(size: int, least: int, most: int) -> int:
    """The next power of two, within bounds that are powers of two."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def _matmul_precision() -> str:
    """What torch's own float32 products may be rounded to: nothing, or TF32 if the user said so."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _tile(rows: int, cols: int, tensor_cores: bool, depth: int = 1) -> dict[str, int]:
    """Rows, columns and inner entries of a tile; each column stands for `depth` of the product.

    As large as registers allow (none is spilled on sm_80 and sm_90), but smaller where there would
    be fewer tiles than processors.
    """
    narrowest = max(1, 16 // depth)
    M = _block(rows, 16, 128 if tensor_cores else 64)
    N = _block(cols, narrowest, max(1, 64 // depth))
    least = max(512 // depth, 16 * narrowest)
    while least < M * N and triton.cdiv(rows, M) * triton.cdiv(cols, N) < 128:
        if N * depth >= M and narrowest < N:
            N //= 2
        else:
            M //= 2
    return {"M": M, "N": N, "K": 32, "num_warps": 4 if M * N * depth < 4096 else 8}


def _autocast_keeps(t: Tensor) -> bool:
    """Whether autocast, if it is on, leaves the operands of a matrix product as they are."""
    kind = t.device.type
    return not torch.is_autocast_enabled(kind) or t.dtype == torch.get_autocast_dtype(kind)


def _affine(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """a @ w, plus a bias if there is one."""
    return a @ w if bias is None else torch.addmm(bias, a, w)


def _counted(flops):
    """A launch that, where a dispatch mode looks on, is an op whose FLOPs torch's counter knows."""
    from torch.utils.flop_counter import register_flop_formula

    def decorate(launch):
        name = launch.__name__.removeprefix("_launch_")
        if not hasattr(torch.ops.tnmoe_emitted, name):  # as it has if another such file came first
            torch.library.custom_op(f"tnmoe_emitted::{name}", launch, mutates_args=())
            register_flop_formula(getattr(torch.ops.tnmoe_emitted, name))(flops)
        op = getattr(torch.ops.tnmoe_emitted, name)

        def call(*args):
            return op(*args) if torch._C._len_torch_dispatch_stack() else launch(*args)

        return call

    return decorate


def _contract_multiply_flops(a, u, p, b, v, q, out_shape):
    """FLOPs of the products of `_contract_multiply`, from shapes."""
    return 2 * a.numel() * u[1] + (0 if v is None else 2 * b.numel() * v[1])


def _contract_mix_flops(mixer, a, w, p, out_shape):
    """FLOPs of both products of `_contract_mix`, from shapes."""
    return 2 * a.numel() * w[1] + 2 * mixer[1] * a[0] * w[1]


if triton is not None:

    @triton.jit
    def _product(
        a,
        b,
        row,
        col,
        row_ok,
        col_ok,
        inner,
        ak,
        bk,
        TYPE: tl.constexpr,
        K: tl.constexpr,
    ):
        """A tile of a product in float32, its rows `row` behind a, its columns `col` behind b."""
        k = tl.arange(0, K)
        left = row[:, None] + k[None, :] * ak
        right = col[None, :] + k[:, None] * bk
        total = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
        for start in range(0, inner, K):
            k_ok = k < inner - start
            x = tl.load(a + left, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            y = tl.load(b + right, mask=k_ok[:, None] & col_ok[None, :], other=0.0)
            total = tl.dot(x, y, total, input_precision=TYPE)
            a += K * ak
            b += K * bk
        return total

    @triton.jit
    def _contract_multiply_kernel(
        out,
        a,
        u,
        p,
        b,
        v,
        q,
        rows,
        cols,
        a_inner,
        b_inner,
        am,
        ak,
        uk,
        un,
        bm,
        bk,
        vk,
        vn,
        TYPE: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
        K: tl.constexpr,
    ):
        """A tile of (a @ u + p) * (b @ v + q), or of (a @ u + p) * b where v is None."""
        across = tl.cdiv(cols, N)
        tile = tl.program_id(0)
        top, left = (tile // across).to(tl.int64) * M, (tile % across) * N
        row, col = tl.arange(0, M), tl.arange(0, N)
        row_ok, col_ok = row < rows - top, col < cols - left
        ok = row_ok[:, None] & col_ok[None, :]
        a += top * am
        b += top * bm
        u += left * un
        first = _product(a, u, row * am, col * un, row_ok, col_ok, a_inner, ak, uk, TYPE, K)
        if p is not None:
            first += tl.load(p + left + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if v is None:
            b += left * bk
            factor = b + row[:, None] * bm + col[None, :] * bk
            second = tl.load(factor, mask=ok, other=0.0).to(tl.float32)
        else:
            v += left * vn
            second = _product(b, v, row * bm, col * vn, row_ok, col_ok, b_inner, bk, vk, TYPE, K)
            if q is not None:
                second += tl.load(q + left + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        out += top * cols + left
        target = out + row[:, None] * cols + col[None, :]
        tl.store(target, (first * second).to(out.dtype.element_ty), mask=ok)

    @triton.jit
    def _contract_mix_kernel(
        out,
        mixer,
        a,
        w,
        p,
        rows,
        cols,
        mixed,
        summed,
        inner,
        mt,
        mm,
        ms,
        at,
        ak,
        wk,
        wn,
        TYPE: tl.constexpr,
        M: tl.constexpr,
        S: tl.constexpr,
        N: tl.constexpr,
        K: tl.constexpr,
    ):
        """N columns, for M tokens t, of mixer[t] @ (a @ w + p)[t], which has up to S rows."""
        across = tl.cdiv(cols, N)
        tile = tl.program_id(0)
        top, left = (tile // across).to(tl.int64) * M, (tile % across) * N
        row, col, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, S)
        row_ok, col_ok, s_ok = row < rows - top, col < cols - left, s < summed
        wide = tl.arange(0, S * N)
        wide_ok = (wide // N < summed) & (wide % N < cols - left)
        place = wide // N * cols + left + wide % N  # of a column in w and p
        a += top * at
        total = _product(a, w, row * at, place * wn, row_ok, wide_ok, inner, ak, wk, TYPE, K)
        if p is not None:
            total += tl.load(p + place, mask=wide_ok, other=0.0).to(tl.float32)[None, :]
        total = tl.reshape(total, (M, S, N))
        mixer += top * mt
        out += top * mixed * cols + left
        for m in range(mixed):
            entry = mixer + m * mm + row[:, None] * mt + s[None, :] * ms
            share = tl.load(entry, mask=row_ok[:, None] & s_ok[None, :], other=0.0).to(tl.float32)
            mix = tl.sum(share[:, :, None] * total, 1).to(out.dtype.element_ty)
            target = out + m * cols + row[:, None] * (mixed * cols) + col[None, :]
            tl.store(target, mix, mask=row_ok[:, None] & col_ok[None, :])

    @triton.jit
    def _entmax15_kernel(
        out,
        root,
        x,
        rows,
        cols,
        STEPS: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
    ):
        """M rows of entmax and of its root."""
        row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        row = tl.minimum(row, rows - 1)  # the last one again, for want of another
        col = tl.arange(0, N)
        ok = (col < cols)[None, :]
        place = row[:, None] * cols + col[None, :]
        z = tl.load(x + place, mask=ok, other=float("-inf")).to(tl.float32)
        z = (z - tl.max(z, 1)[:, None]) / 2
        z = tl.where(z < -2.0, -2.0, z)
        tau = tl.full((M,), -1.0, tl.float32)
        for _ in tl.static_range(STEPS):  # Newton's method, which never passes the root
            excess = tl.where(z <= tau[:, None], 0.0, z - tau[:, None])
            tau += (tl.sum(excess * excess, 1) - 1) / (2 * tl.sum(excess, 1))
        r = tl.where(z <= tau[:, None], 0.0, z - tau[:, None])
        tl.store(root + place, r.to(root.dtype.element_ty), mask=ok)
        tl.store(out + place, (r * r).to(out.dtype.element_ty), mask=ok)

    @triton.jit
    def _entmax15_backward_kernel(out, grad, root, rows, cols, M: tl.constexpr, N: tl.constexpr):
        """M rows of the gradient r (g - <r, g> / <r, 1>), with the root r."""
        row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        row = tl.minimum(row, rows - 1)  # the last one again, for want of another
        col = tl.arange(0, N)
        ok = (col < cols)[None, :]
        place = row[:, None] * cols + col[None, :]
        r = tl.load(root + place, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
        g = tl.where(r == 0, 0.0, g)  # an infinite gradient of what is not chosen is none
        mean = tl.sum(r * g, 1) / tl.sum(r, 1)
        tl.store(out + place, (r * (g - mean[:, None])).to(out.dtype.element_ty), mask=ok)


@_counted(_contract_multiply_flops)
def _launch_contract_multiply(
    a: Tensor,
    u: Tensor,
    p: Tensor | None,
    b: Tensor,
    v: Tensor | None,
    q: Tensor | None,
) -> Tensor:
    """By the kernel, which takes these tensors."""
    rows, cols = a.shape[0], u.shape[1]
    out = a.new_empty(rows, cols)
    precision = _matmul_precision()
    tile = _tile(rows, cols, a.dtype != torch.float32 or precision == "tf32")
    grid = (triton.cdiv(rows, tile["M"]) * triton.cdiv(cols, tile["N"]),)
    sizes = (rows, cols, a.shape[1], b.shape[1])
    strides = (*a.stride(), *u.stride(), *b.stride(), *(u if v is None else v).stride())
    with torch.cuda.device_of(a):
        _contract_multiply_kernel[grid](out, a, u, p, b, v, q, *sizes, *strides, precision, **tile)
    return out


def _contract_multiply(
    a: Tensor,
    u: Tensor,
    p: Tensor | None,
    b: Tensor,
    v: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """(a @ u + p) * (b @ v + q), or (a @ u + p) * b without v; no product is written."""
    if not _kernels_take(a, u, p, b, v, q) or not _autocast_keeps(a):
        return _affine(a, u, p) * (b if v is None else _affine(b, v, q))
    return _launch_contract_multiply(a, u, p, b, v, q)


@_counted(_contract_mix_flops)
def _launch_contract_mix(mixer: Tensor, a: Tensor, w: Tensor, p: Tensor | None) -> Tensor:
    """By the kernel, which takes these tensors."""
    mixed, summed = mixer.shape[1:]
    rows, cols = a.shape[0], w.shape[1] // summed
    out = a.new_empty(rows, mixed, cols)
    precision, S = _matmul_precision(), _block(summed, 1, 1 << 20)
    tile = _tile(rows, cols, a.dtype != torch.float32 or precision == "tf32", S)
    grid = (triton.cdiv(rows, tile["M"]) * triton.cdiv(cols, tile["N"]),)
    sizes = (rows, cols, mixed, summed, a.shape[1])
    strides = (*mixer.stride(), *a.stride(), *w.stride())
    with torch.cuda.device_of(a):
        _contract_mix_kernel[grid](out, mixer, a, w, p, *sizes, *strides, precision, S=S, **tile)
    return out


def _contract_mix(mixer: Tensor, a: Tensor, w: Tensor, p: Tensor | None = None) -> Tensor:
    """mixer (t m s) @ (a @ w + p) seen as (t s c), not written; w has the columns (s c)."""
    if not _kernels_take(mixer, a, w, p) or not _autocast_keeps(a) or w.numel() >= 1 << 31:
        return mixer @ _affine(a, w, p).unflatten(-1, (mixer.shape[-1], -1))
    return _launch_contract_mix(mixer, a, w, p)


def _by_rows(x: Tensor) -> tuple[tuple[int], int, int, dict[str, int]]:
    """Programs, rows, columns and blocks of a kernel that computes along the last axis."""
    cols = x.shape[-1]
    rows, N = x.numel() // cols, _block(cols, 1, 1 << 20)
    blocks = {"M": max(1, 1024 // N), "N": N, "num_warps": _block(N // 512, 4, 16)}
    return (triton.cdiv(rows, blocks["M"]),), rows, cols, blocks


class _Entmax15Rows(torch.autograd.Function):
    """Entmax over the last axis, each row in the registers of one program; saves its root alone."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        out, root = torch.empty_like(x), torch.empty_like(x)
        grid, rows, cols, blocks = _by_rows(x)
        digits = (cols - 1).bit_length()
        steps = 3 + digits - digits // 4
        with torch.cuda.device_of(x):
            _entmax15_kernel[grid](out, root, x, rows, cols, steps, **blocks)
        return out, root

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        _, root = output
        ctx.mark_non_differentiable(root)
        ctx.set_materialize_grads(False)  # no zeros for the root
        ctx.save_for_backward(root)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
        if grad is None:
            return None
        root: Tensor = ctx.saved_tensors[0]
        if not _kernels_take(grad, root):
            grad = root * grad.masked_fill(root == 0, 0)
            return grad - root * (grad.sum(-1, keepdim=True) / root.sum(-1, keepdim=True))
        grad, out = grad.contiguous(), torch.empty_like(root)
        grid, rows, cols, blocks = _by_rows(root)
        with torch.cuda.device_of(root):
            _entmax15_backward_kernel[grid](out, grad, root, rows, cols, **blocks)
        return out


def entmax15(x: Tensor) -> Tensor:
    """Entmax with α = 1.5 over the last axis (arXiv 1905.05702); of long rows not by a kernel."""
    if _kernels_take(x) and x.shape[-1] <= 16384:
        return _Entmax15Rows.apply(x)[0]
    return _Entmax15Root.apply(x).square()
