"""INT8 matmul in Triton whose operands have a scale for each block along K (``numerics.int8_block_mm``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.activation import INTERPRETING
from teint8.kernels.launch import Launch, on
from teint8.kernels.tiles import Tile, cdiv, place


@triton.jit
def _block_mm_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, BLOCKS,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = rows < M
    in_n = columns < N
    # rows past the end read row 0: their results are not stored
    at_m = tl.where(in_m, rows, 0).to(tl.int64)
    at_n = tl.where(in_n, columns, 0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + at_m[:, None] * K + ks[None, :]
    w_ptrs = w_ptr + at_n[None, :] * K + ks[:, None]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(BLOCKS):
        if EVEN_K:
            x = tl.load(x_ptrs + b * BLOCK_K)
            w = tl.load(w_ptrs + b * BLOCK_K)
        else:
            inside = b * BLOCK_K + ks < K
            x = tl.load(x_ptrs + b * BLOCK_K, mask=inside[None, :], other=0)
            w = tl.load(w_ptrs + b * BLOCK_K, mask=inside[:, None], other=0)
        xs = tl.load(xs_ptr + at_m * BLOCKS + b)
        ws = tl.load(ws_ptr + at_n * BLOCKS + b)
        y += (tl.dot(x, w, out_dtype=tl.int32).to(tl.float32) * ws[None, :]) * xs[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + at_n).to(tl.float32)[None, :]
    tl.store(y_ptr + at_m[:, None] * N + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


_launch = Launch(_block_mm_kernel)


def config_of(m: int) -> Tile:
    """The tile for m rows: sums in float32 beside those in int32 take registers."""
    return Tile(16, 64, 4, 4) if m <= 16 else Tile(64, 64, 4, 3) if m <= 128 else Tile(128, 64, 8, 3)


def block_mm(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, block: int, dtype: torch.dtype, config: Tile | None = None
) -> Tensor:
    """(M, N) from codes (M, K) and (N, K), scales (M, B) and (N, B); ``config`` overrides the tile, and no result depends on it."""
    (m, k), n, device = xq.shape, wq.shape[0], xq.device
    xq, xs, wq, ws = (t.contiguous() for t in (xq, xs, wq, ws))
    b = ws if bias is None else bias.contiguous()
    # the interpreter's cast to bfloat16 does not round
    inner = torch.float32 if INTERPRETING or dtype == torch.float64 else dtype
    y = torch.empty((m, n), dtype=inner, device=device)
    t = config or config_of(m)
    operands = (xq, wq, xs, ws, b, y)
    key = (device.index, m, n, k, block, inner, b.dtype, bias is None, t, tuple(o.data_ptr() % 16 == 0 for o in operands))
    with on(device):
        _launch(key, (cdiv(m, t.block_m) * cdiv(n, t.block_n), 1, 1), (*operands, m, n, k, xs.shape[1]),
                (bias is not None, k % block == 0, t.block_m, t.block_n, block, 8),
                num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=False)  # fmt: skip
    return y.to(dtype)
