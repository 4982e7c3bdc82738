"""Rows divided by powers of two, rotated by Hadamard matrices and quantized, in one read (``teint8.ops.rotation``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.quantize import codes_of, scale_and_multiplier, static_scale_and_multiplier
from teint8.kernels.tiles import cdiv, power_of_two


@triton.jit
def _rotate_kernel(
    x_ptr, smoothing_ptr, given_ptr, value_ptr, codes_ptr, scale_ptr, M, K, stride_xm,
    SMOOTHED: tl.constexpr, INVERTED: tl.constexpr, LEVELS: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if SMOOTHED:
        factor = tl.load(smoothing_ptr + columns, mask=columns < K, other=1.0)
        if not INVERTED:
            factor = tl.div_rn(tl.full((BLOCK_K,), 1.0, tl.float32), factor)
        x = x * factor[None, :]
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, (BLOCK_M, BLOCK_K >> (level + 1), 2, 1 << level))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (BLOCK_M, BLOCK_K))
    at = rows[:, None] * K + columns[None, :]
    if CODES:
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # absmax by its bits: a NaN is above infinity
        if STATIC:
            scale, multiplier = static_scale_and_multiplier(top, tl.load(given_ptr + rows, mask=rows < M, other=1.0))
        else:
            scale, multiplier = scale_and_multiplier(top)
        tl.store(scale_ptr + rows, scale, mask=rows < M)
        tl.store(codes_ptr + at, codes_of(x, multiplier[:, None], rows, rows, columns, False, STATIC), mask=inside)
    else:
        tl.store(value_ptr + at, x, mask=inside)


_launch = Launch(_rotate_kernel)
_FEW = 32  # rows up to which a division of each row's channels costs less than a kernel that divides for all


def tile_of(m: int, k: int, device: str) -> tuple[int, int, int]:
    """Rows and channels of a program, and its warps: short rows share one."""
    block_k = power_of_two(k)
    # the interpreter's cost is that of its programs
    block_m = min(max((2048 if device == "cuda" else 65536) // block_k, 1), power_of_two(m))
    return block_m, block_k, min(max(block_m * block_k // 512, 1), 16)


def rotate(x: Tensor, smoothing: Tensor | None, block: int, codes: bool, scale: Tensor | None = None) -> list[Tensor]:
    """Values (M, K) in float32, or codes and scales, of x (M, K), as ``rotate`` in ``teint8.ops.registry``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, k), device = x.shape, x.device
    y = torch.empty((m, k), dtype=torch.int8 if codes else torch.float32, device=device)
    scales = torch.empty((m,), dtype=torch.float32, device=device) if codes else y
    inverted = smoothing is not None and m > _FEW
    if inverted:
        smoothing = smoothing.reciprocal()  # type: ignore[union-attr]
    powers, given = (scales if t is None else t.contiguous() for t in (smoothing, scale))
    block_m, block_k, warps = tile_of(m, k, device.type)
    constants = (smoothing is not None, inverted, max(block, 1).bit_length() - 1, codes, scale is not None, block_m, block_k)
    key = (device.index, x.dtype, m, k, x.stride(0), constants, alignment(x, powers, given, y, scales))
    with on(device):
        _launch(key, (cdiv(m, block_m), 1, 1), (x, powers, given, y, y, scales, m, k, x.stride(0)), constants, num_warps=warps,
                enable_fp_fusion=False)  # fmt: skip
    return [y, scales] if codes else [y]
