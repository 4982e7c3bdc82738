"""INT8 matmul of rows sorted into groups, each by a weight of its own: one launch, and nobody asks the GPU how long they are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.int8_mm import Config, config_of, major_of
from teint8.kernels.launch import Launch, on
from teint8.kernels.tiles import cdiv, power_of_two
from teint8.numerics import MAX_INT32_K


@triton.jit
def _grouped_mm_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, ends_ptr, y_ptr, M, N, K, GROUPS,
    stride_xm, stride_wb, stride_wn, stride_xsm, stride_wsb, stride_wsn,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, WIDE_EVERY: tl.constexpr, MOST_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program finds its group among the tiles of all; rows behind the last group are one more, whose result is 0."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.arange(0, MOST_GROUPS)
    # what a group would have beyond the last row it does not have: nobody asked the GPU whether the ends are right
    ends = tl.minimum(tl.maximum(tl.load(ends_ptr + groups, mask=groups < GROUPS, other=M), 0), M).to(tl.int32)
    starts = tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups <= GROUPS), other=0)
    starts = tl.minimum(tl.maximum(starts, 0), M).to(tl.int32)
    starts = tl.where(groups > GROUPS, M, starts)
    tiles = (tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M
    up_to = tl.cumsum(tiles, 0)
    group = tl.sum((up_to <= tile).to(tl.int32), 0)
    mine = groups == group
    start = tl.sum(tl.where(mine, starts, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    before = tl.sum(tl.where(mine, up_to - tiles, 0), 0)
    rows = start + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < end  # none where there are more programs than tiles: end is 0 then
    weighted = group < GROUPS
    ks = tl.arange(0, BLOCK_K)
    xr = tl.where(inside, rows, 0).to(tl.int64)
    wr = tl.where(columns < N, columns, 0).to(tl.int64)
    matrix = tl.where(weighted, group, 0).to(tl.int64)
    x_ptrs = x_ptr + xr[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + matrix * stride_wb + wr[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if WIDE:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    steps = tl.where(weighted & (start < end), tl.cdiv(K, BLOCK_K), 0)
    for i in range(steps):
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
    ws = tl.load(ws_ptr + matrix * stride_wsb + wr * stride_wsn)
    xs = tl.load(xs_ptr + xr * stride_xsm)
    y = tl.where(weighted, (sums * ws[None, :]) * xs[:, None], 0.0)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (columns < N)[None, :])


_launch = Launch(_grouped_mm_kernel)


def grouped_mm(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, ends: Tensor, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    """(M, N) from codes (M, K) and (G, N, K), scales (M,) and (G, N), and where each group ends, integers (G,); 0 behind the last."""
    (m, k), (groups, n) = xq.shape, wq.shape[:2]
    xq = xq if xq.stride(1) == 1 else xq.contiguous()
    wq = wq if wq.stride(2) == 1 else wq.contiguous()
    ends = ends.contiguous()
    # groups are as long as rows are many, in the mean
    c = config or config_of(-(-m // groups), major_of(xq.device.index), k)
    inner = torch.float32 if dtype == torch.float64 or not xq.is_cuda else dtype
    y = torch.empty((m, n), dtype=inner, device=xq.device)
    strides = (xq.stride(0), wq.stride(0), wq.stride(1), xs.stride(0), ws.stride(0), ws.stride(1))
    operands = (xq, wq, xs, ws, ends)
    key = (xq.device.index, m, n, k, groups, strides, inner, ends.dtype, c, tuple(t.data_ptr() % 16 == 0 for t in operands))
    constants = (k % c.block_k == 0, k > MAX_INT32_K, MAX_INT32_K // c.block_k, power_of_two(groups + 1), *c[:3])
    tiles = (m // c.block_m + groups + 1) * cdiv(n, c.block_n)  # no fewer than there can be
    with on(xq.device):
        _launch(key, (tiles, 1, 1), (*operands, y, m, n, k, groups, *strides), constants,
                num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=False)  # fmt: skip
    return y.to(dtype)
