"""W8A16 matmul of a few rows: codes become floats on their way to the tensor cores, so that a weight costs one byte to read."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.activation import INTERPRETING
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.tiles import power_of_two

MAX_ROWS = 64


class Blocks(NamedTuple):
    """Tile of a program, which has all rows, and its pipeline stages."""

    block_n: int
    block_k: int
    stages: int


# 4 warps each; the fastest of a sweep at 16 and at 64 rows on one H100
SAFE = Blocks(32, 128, 5)
FEW_CHANNELS, FEW_ROWS, MORE_ROWS = Blocks(32, 256, 4), Blocks(64, 128, 5), Blocks(64, 64, 6)


def blocks_of(m: int, n: int, capability: int) -> Blocks:
    """The tile for (M, N): wider ones read x less often, as long as they fill the card; SAFE where shared memory is short."""
    if capability < 9:
        return SAFE
    if n < 64 * 132:
        return FEW_CHANNELS
    return FEW_ROWS if m <= 32 else MORE_ROWS


@triton.jit
def _weight_only_kernel(
    x_ptr, w_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, stride_xm, stride_wn, stride_wsn,
    BIAS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < M, columns < N
    ks = tl.arange(0, BLOCK_K)
    wn = tl.where(in_n, columns, 0)  # channels past the end are channel 0, and are not stored
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + wn.to(tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs + k)
            x = tl.load(x_ptrs + k, mask=in_m[:, None], other=0.0)
        else:
            inside = k + ks < K
            w = tl.load(w_ptrs + k, mask=inside[:, None], other=0)
            x = tl.load(x_ptrs + k, mask=in_m[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc)
    y = acc * tl.load(ws_ptr + wn * stride_wsn)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + wn).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


_launch = Launch(_weight_only_kernel)


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def weight_only(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(M, N) from bfloat16 or float16 x (M, K), M up to 64, codes (N, K), scales (N,), bias (N,) or None."""
    m, k = x.shape
    n = wq.shape[0]
    x, wq = (t if t.stride(1) == 1 else t.contiguous() for t in (x, wq))
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    b = ws if bias is None else bias.contiguous()
    strides = (x.stride(0), wq.stride(0), ws.stride(0))
    block_m = max(16, power_of_two(m))
    block_n, block_k, stages = SAFE if INTERPRETING else blocks_of(m, n, _capability(x.device.index))
    key = (x.device.index, m, n, k, strides, x.dtype, dtype, None if bias is None else b.dtype,
           alignment(x, wq, ws, b))  # fmt: skip
    with on(x.device):
        _launch(key, (-(-n // block_n), 1, 1), (x, wq, ws, b, y, m, n, k, *strides),
                (bias is not None, k % block_k == 0, block_m, block_n, block_k), num_warps=4, num_stages=stages)  # fmt: skip
    return y
