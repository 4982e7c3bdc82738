"""INT8 matmul in Triton for every chip and shape: exact int32 sums, scales, bias and cast in the epilogue, batched."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.launch import Launch, on
from teint8.kernels.tiles import cdiv, place
from teint8.numerics import MAX_INT32_K


class Config(NamedTuple):
    """A tile and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# (rows up to, tile): on Hopper the fastest of benchmarks/gemm.py --sweep on an H200, Triton 3.6; elsewhere tiles that compile without
# spilling registers (tests/test_compile_targets.py), not measured
_FEW = ((16, Config(16, 64, 256, 4, 4)), (32, Config(32, 64, 256, 4, 4)))
_HOPPER = (*_FEW, (128, Config(64, 128, 128, 4, 4)), (None, Config(128, 128, 128, 4, 3)))
_OTHERS = (*_FEW, (128, Config(64, 128, 128, 8, 3)), (None, Config(128, 128, 64, 8, 3)))


NARROW = Config(128, 64, 64, 4, 3)
"""On Hopper, for few channels and products: bound by writing the result."""
_LONG = (*_FEW, (None, Config(64, 64, 128, 4, 4)))  # sums of more than MAX_INT32_K products take three times the registers


def table(major: int) -> tuple[tuple[int | None, Config], ...]:
    """The tiles for a compute capability, by rows up to; None stands for any number."""
    return _HOPPER if major == 9 else _OTHERS


def config_of(m: int, major: int = 9, k: int = 0) -> Config:
    """The tile for a matmul of m rows over k products; the bits of the result do not depend on it."""
    tiles = table(major) if k <= MAX_INT32_K else _LONG
    return next(config for rows, config in tiles if rows is None or m <= rows)


@functools.lru_cache(maxsize=4096)
def chosen(device: int | None, batch: int, m: int, n: int, k: int, plain: bool) -> Config:
    """The tile that was tuned on this machine, else that of the table."""
    from teint8.kernels import tuned  # imports this file

    known = tuned.found("triton", device, m, n, k, plain) if batch == 1 and k <= MAX_INT32_K else None
    if known is None and m > 128 and n <= 64 and k <= 256 and major_of(device) == 9:
        return NARROW
    return Config(*known) if known else config_of(m, major_of(device), k)


@functools.cache
def major_of(device: int | None) -> int:
    """The compute capability's first number; for the interpreter Hopper's tiles do."""
    return 9 if device is None else torch.cuda.get_device_capability(device)[0]


@triton.jit
def _int8_mm_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K,
    stride_xb, stride_xm, stride_wb, stride_wn, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, WIDE_EVERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # one dimension of the grid for both: the second one ends at 65535
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # rows past the end read row 0 instead of being masked: their results are not stored
    xr = tl.where(rows < M, rows, 0).to(tl.int64)
    wr = tl.where(columns < N, columns, 0).to(tl.int64)
    x_ptrs = x_ptr + batch * stride_xb + xr[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + batch * stride_wb + wr[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if WIDE:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    for i in range(tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=ks[None, :] < K - i * BLOCK_K, other=0)
            w = tl.load(w_ptrs, mask=ks[:, None] < K - i * BLOCK_K, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        if WIDE:  # sums of more than MAX_INT32_K products: emptied into int64 before they overflow
            if i % WIDE_EVERY == WIDE_EVERY - 1:
                total += acc.to(tl.int64)
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if WIDE:
        sums = (total + acc.to(tl.int64)).to(tl.float32)
    else:
        sums = acc.to(tl.float32)
    in_m = rows < M
    in_n = columns < N
    ws = tl.load(ws_ptr + batch * stride_wsb + wr * stride_wsn)
    xs = tl.load(xs_ptr + batch * stride_xsb + xr * stride_xsm)
    y = (sums * ws[None, :]) * xs[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + batch * stride_bb + wr * stride_bn).to(tl.float32)[None, :]
    y_ptrs = y_ptr + batch * M * N + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


_launch = Launch(_int8_mm_kernel)


def int8_mm(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    """(B, M, N) from codes (B, M, K) and (B, N, K), scales (B, M) and (B, N), bias (B, N); a config overrides the table."""
    batch, m, k = xq.shape
    n = wq.shape[1]
    # the tensor cores read both operands along K
    xq = xq if xq.stride(2) == 1 else xq.contiguous()
    wq = wq if wq.stride(2) == 1 else wq.contiguous()
    c = config or chosen(xq.device.index, batch, m, n, k, bias is None)
    # the interpreter's cast to bfloat16 does not round: it stores float32 and torch casts, with the bits of the GPU
    inner = torch.float32 if dtype == torch.float64 or not xq.is_cuda else dtype
    y = torch.empty((batch, m, n), dtype=inner, device=xq.device)
    b = y if bias is None else bias
    strides = (
        xq.stride(0), xq.stride(1), wq.stride(0), wq.stride(1), xs.stride(0), xs.stride(1), ws.stride(0), ws.stride(1),
        b.stride(0), b.stride(1),
    )  # fmt: skip
    operands = (xq, wq, xs, ws, b)
    alignment = tuple(t.data_ptr() % 16 == 0 for t in operands)
    key = (xq.device.index, batch, m, n, k, strides, inner, b.dtype, bias is None, c, alignment)
    constants = (bias is not None, k % c.block_k == 0, k > MAX_INT32_K, MAX_INT32_K // c.block_k, c.block_m, c.block_n, c.block_k, 8)
    with on(xq.device):
        _launch(key, (cdiv(m, c.block_m) * cdiv(n, c.block_n) * batch, 1, 1), (*operands, y, m, n, k, *strides),
                constants, num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=False)  # fmt: skip
    return y.to(dtype)
