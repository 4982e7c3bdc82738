"""Row quantization in Triton: one program a row, codes and scale of the numerics contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 16384  # a longer row is read twice, in blocks


@triton.jit
def _mix32(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _codes(x, multiplier, key, column, STOCHASTIC: tl.constexpr):
    v = x * multiplier
    if STOCHASTIC:
        noise = (_mix32(key + column.to(tl.uint32) * 0x9E3779B9) >> 8).to(tl.float32) * 5.9604644775390625e-08
        v = tl.floor(v + noise)
    v = tl.minimum(tl.maximum(v, -127.0), 127.0)
    # the low byte of v + 1.5 * 2^23 is rint(v), ties to even; launched without FMA contraction, which would round once
    return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, seed_ptr, given_ptr, K, stride_xm, rows_per_seed,
    STOCHASTIC: tl.constexpr, STATIC: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * K
    column = tl.arange(0, BLOCK_K)
    if ONE_BLOCK:
        x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
        # absmax by its bits: a NaN is above infinity, which is above every number
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    else:
        tops = tl.zeros((BLOCK_K,), tl.int32)
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + k + column, mask=k + column < K, other=0.0).to(tl.float32)
            tops = tl.maximum(tops, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        top = tl.max(tops, 0)
    absmax = top.to(tl.float32, bitcast=True)
    finite = top < 0x7F800000
    if STATIC:
        given = tl.load(given_ptr + row)
        usable = finite & (given > 0)
        scale = tl.where(usable | (given == 0), given, float("nan"))
        multiplier = tl.where(usable, tl.div_rn(1.0, tl.where(usable, given, 1.0)), 0.0)
    else:
        usable = finite & (absmax >= 7.888609052210118e-31)  # 2^-100
        safe = tl.where(usable, absmax, 127.0)
        scale = tl.where(usable, tl.div_rn(safe, 127.0), tl.where(finite, 0.0, float("nan")))
        multiplier = tl.where(usable, tl.div_rn(127.0, safe), 0.0)
    tl.store(scale_ptr + row, scale)
    key = tl.zeros((), tl.uint32)
    if STOCHASTIC:
        seed = tl.load(seed_ptr + row // rows_per_seed)
        low = (seed & 0xFFFFFFFF).to(tl.uint32)
        high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
        key = _mix32(_mix32(_mix32(low) ^ high) ^ (row % rows_per_seed).to(tl.uint32))
    if ONE_BLOCK:
        x = tl.where(usable, x, 0.0)
        q = tl.where(multiplier != 0, _codes(x, multiplier, key, column, STOCHASTIC), 0)
        tl.store(codes_ptr + column, q.to(tl.int8), mask=column < K)
    else:
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + k + column, mask=k + column < K, other=0.0).to(tl.float32)
            x = tl.where(usable, x, 0.0)
            q = tl.where(multiplier != 0, _codes(x, multiplier, key, k + column, STOCHASTIC), 0)
            tl.store(codes_ptr + k + column, q.to(tl.int8), mask=k + column < K)


def quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales (M,) of x (M, K); seed (S,) and scale (M,) as in ``teint8.ops.registry``."""
    m, k = x.shape
    if x.dtype == torch.float64:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((m,), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(k), _MAX_BLOCK)
    with torch.cuda.device_of(x):
        _quantize_kernel[(m,)](
            x, codes, scales, codes if seed is None else seed.contiguous(), scales if scale is None else scale.contiguous(),
            k, x.stride(0), 1 if seed is None else m // seed.numel(),
            STOCHASTIC=seed is not None, STATIC=scale is not None, BLOCK_K=block, ONE_BLOCK=k <= block,
            num_warps=min(max(block // 1024, 1), 8), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales
