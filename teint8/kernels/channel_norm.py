"""GroupNorm, InstanceNorm and BatchNorm in inference, with codes for the convolution that follows: no pass over the result is needed.

The first kernel has what a norm is of a sample's channels: what is subtracted, what that is multiplied by, and the absmax of the
result: since every operation from x to it is monotone, the largest and the smallest x of a channel give it. The second one writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.activation import INTERPRETING, rounded
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.norm import _DTYPES, _fixed, _mean, _power
from teint8.kernels.quantize import code_bits, scale_and_multiplier
from teint8.kernels.quantize_both_kernels import _bits, _larger
from teint8.kernels.tiles import power_of_two


@triton.jit
def _load_or(ptr, at, inside, GIVEN: tl.constexpr, OTHER: tl.constexpr):
    if GIVEN:
        return tl.load(ptr + at, mask=inside, other=OTHER).to(tl.float32)
    return tl.full(at.shape, OTHER, tl.float32)


@triton.jit
def _affine(c, factor, weight, bias, WEIGHT: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """The result, given what was subtracted from."""
    y = c * factor
    if WEIGHT:
        y = y * weight
    if BIAS:
        y = y + bias
    return rounded(y, DTYPE)


@triton.jit
def _tile(x_ptr, p, channels, P, inside, stride_xc, stride_xp):
    """(BLOCK_P, BLOCK_C) of a sample, and which of it there is."""
    mask = (p < P)[:, None] & inside[None, :]
    at = p.to(tl.int64)[:, None] * stride_xp + channels.to(tl.int64)[None, :] * stride_xc
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _shared(v, EACH: tl.constexpr):
    """The largest of the channels for all of them, unless each has its own."""
    return v if EACH else tl.zeros_like(v) + tl.max(v, 0)


@triton.jit
def _statistics_kernel(
    x_ptr, weight_ptr, bias_ptr, given_mean_ptr, given_variance_ptr, mean_ptr, factor_ptr, tops_ptr, P, C, WIDTH, PARTS, count, eps,
    stride_xb, stride_xc, stride_xp,
    EACH: tl.constexpr, GIVEN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``EACH``: a channel has statistics of its own, else the program's channels have them in common."""
    part = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_C)
    channels = part * WIDTH + i
    inside = (i < WIDTH) & (channels < C)
    x_ptr += sample * stride_xb
    one = tl.full((BLOCK_C,), 1.0, tl.float32)
    # places are put together at the end: across threads that takes as long as many loads
    high = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    low = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)  # of -x
    for start in range(0, P, BLOCK_P):
        x, mask = _tile(x_ptr, start + tl.arange(0, BLOCK_P), channels, P, inside, stride_xc, stride_xp)
        high = _larger(high, tl.where(mask, x, float("-inf")))
        low = _larger(low, tl.where(mask, -x, float("-inf")))
    high = tl.reduce(high, 0, _larger)
    low = -tl.reduce(low, 0, _larger)
    top = tl.where(inside, _larger(tl.abs(high), tl.abs(low)), 0.0)
    if GIVEN:
        mean = tl.load(given_mean_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        variance = tl.load(given_variance_ptr + channels, mask=inside, other=1.0).to(tl.float32)
        factor = tl.div_rn(one, tl.sqrt_rn(variance + eps))
    else:
        bits = _shared(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF, EACH)
        finite = bits < 0x7F800000  # what is not has garbage sums, and the factor NaN
        power = _power(tl.where(finite, bits, 0))
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.int64)
        half = tl.div_rn(one * 0.5, power)
        for start in range(0, P, BLOCK_P):
            x, mask = _tile(x_ptr, start + tl.arange(0, BLOCK_P), channels, P, inside, stride_xc, stride_xp)
            sums += _fixed(x * half[None, :]).to(tl.int64)
        total = tl.sum(sums, 0)
        total = total if EACH else tl.zeros_like(total) + tl.sum(total, 0)
        mean = (_mean(total, count) * 2.0) * power
        apart = tl.where(inside, _larger(tl.abs(high - mean), tl.abs(low - mean)), 0.0)
        apart_bits = _shared(apart.to(tl.int32, bitcast=True) & 0x7FFFFFFF, EACH)
        power = _power(tl.where(finite, apart_bits, 0))
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.int64)
        scale = tl.div_rn(one * 16384.0, power)  # 2^15 twice makes the square one of 2^30
        for start in range(0, P, BLOCK_P):
            x, mask = _tile(x_ptr, start + tl.arange(0, BLOCK_P), channels, P, inside, stride_xc, stride_xp)
            t = tl.where(mask, (x - mean[None, :]) * scale[None, :], 0.0)
            sums += (t * t).to(tl.int32).to(tl.int64)
        total = tl.sum(sums, 0)
        total = total if EACH else tl.zeros_like(total) + tl.sum(total, 0)
        variance = ((_mean(total, count) * 4.0) * power) * power
        factor = tl.where(finite, tl.div_rn(one, tl.sqrt_rn(variance + eps)), float("nan"))
    weight = _load_or(weight_ptr, channels, inside, WEIGHT, 1.0)
    bias = _load_or(bias_ptr, channels, inside, BIAS, 0.0)
    highest = _affine(high - mean, factor, weight, bias, WEIGHT, BIAS, DTYPE)
    lowest = _affine(low - mean, factor, weight, bias, WEIGHT, BIAS, DTYPE)
    largest = _larger(tl.abs(highest), tl.abs(lowest))
    largest = tl.where(top == top, largest, float("nan"))
    tl.store(mean_ptr + sample * C + channels, mean, mask=inside)
    tl.store(factor_ptr + sample * C + channels, factor, mask=inside)
    tl.store(tops_ptr + sample * PARTS + part, tl.max(tl.where(inside, _bits(largest, DTYPE), 0), 0))


@triton.jit
def _write_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, factor_ptr, tops_ptr, value_ptr, codes_ptr, scale_ptr, P, C, PARTS,
    stride_xb, stride_xc, stride_xp, stride_vb, stride_vc, stride_vp,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(2).to(tl.int64)
    inside = channels < C
    x, mask = _tile(x_ptr + sample * stride_xb, p, channels, P, inside, stride_xc, stride_xp)
    mean = tl.load(mean_ptr + sample * C + channels, mask=inside, other=0.0)[None, :]
    factor = tl.load(factor_ptr + sample * C + channels, mask=inside, other=0.0)[None, :]
    weight = _load_or(weight_ptr, channels, inside, WEIGHT, 1.0)[None, :]
    bias = _load_or(bias_ptr, channels, inside, BIAS, 0.0)[None, :]
    y = _affine(x - mean, factor, weight, bias, WEIGHT, BIAS, DTYPE)
    if VALUES:
        at = sample * stride_vb + p.to(tl.int64)[:, None] * stride_vp + channels.to(tl.int64)[None, :] * stride_vc
        tl.store(value_ptr + at, y.to(value_ptr.dtype.element_ty), mask=mask)
    if CODES:
        parts = tl.arange(0, BLOCK_PARTS)
        tops = tl.load(tops_ptr + sample * PARTS + parts, mask=parts < PARTS, other=0)
        scale, multiplier = scale_and_multiplier(tl.zeros((1,), tl.int32) + tl.max(tops, 0))
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(scale_ptr + sample + tl.arange(0, 1), scale)
        q = tl.where(multiplier[:, None] != 0, code_bits(y, multiplier[:, None], y, False), 0)
        tl.store(codes_ptr + (sample * P + p)[:, None] * C + channels[None, :], q.to(tl.int8), mask=mask)


_statistics, _write = Launch(_statistics_kernel), Launch(_write_kernel)


def shape_of_tile(width: int, elements: int) -> tuple[int, int]:
    """Places and channels of a tile."""
    channels = max(power_of_two(width), 4)
    return max(elements // channels, 4), channels


def channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    groups: int,
    eps: float,
    codes: bool,
    values: bool,
) -> list[Tensor]:
    """The norm of x (B, C, P), of any strides: values with those of x if they are dense, codes (B, P, C), scales (B,), as asked for."""
    dtype, device = x.dtype, x.device
    x = x.float() if dtype == torch.float64 else x
    b, c, p = x.shape
    each = mean is not None or groups == c
    width = min(c, 64) if each else c // groups  # of channels that have nothing in common some go together
    while each and width > 16 and b * -(-c // width) < 256:  # fewer, where the GPU would not be full
        width //= 2
    parts = -(-c // width)
    # the interpreter's cast to bfloat16 does not round: it stores float32, whose values are rounded already
    y = torch.empty_like(x, dtype=torch.float32 if INTERPRETING else x.dtype) if values else x
    q = torch.empty((b, p, c), dtype=torch.int8, device=device) if codes else x
    s, means, factors = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((b,), (b, c), (b, c)))
    tops = torch.empty((b, parts), dtype=torch.int32, device=device)
    w, bb, gm, gv = (x if t is None else t.contiguous() for t in (weight, bias, mean, variance))
    shared = (device.index, x.shape, x.stride(), x.dtype, each, groups, mean is None, float(eps),
              *(None if t is None else t.dtype for t in (weight, bias, mean, variance)))  # fmt: skip
    constants = (weight is not None, bias is not None)
    with on(device):
        block_p, block_c = shape_of_tile(width, 4096 if each and mean is None else 8192)  # the former would spill
        _statistics(
            (*shared, alignment(x, w, bb, gm, gv)), (parts, b, 1),
            (x, w, bb, gm, gv, means, factors, tops, p, c, width, parts, p if each else p * width, float(eps), *x.stride()),
            (each, mean is not None, *constants, _DTYPES[x.dtype], block_p, block_c), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        block_p, block_c = shape_of_tile(min(c, 128), 8192)
        _write(
            (*shared, y.stride(), codes, values, alignment(x, w, bb, y, q)), (-(-p // block_p), -(-c // block_c), b),
            (x, w, bb, means, factors, tops, y, q, s, p, c, parts, *x.stride(), *y.stride()),
            (*constants, codes, values, _DTYPES[x.dtype], block_p, block_c, power_of_two(parts)), num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return [y.to(dtype)] * values + [q, s] * codes
