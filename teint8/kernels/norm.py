"""RMSNorm and LayerNorm of a row, with the residual added before and the codes taken after, in one read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels import hopper
from teint8.kernels.activation import INTERPRETING, rounded_pairs
from teint8.kernels.int8_mm import major_of
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.quantize import code_bits, scale_and_multiplier
from teint8.kernels.quantize_both_kernels import _bits, _top
from teint8.kernels.tiles import power_of_two


@triton.jit
def _fixed(t):
    """t in [-1, 1] times 2^15 twice, cut to an integer."""
    return (t * 1073741824.0).to(tl.int32)


@triton.jit
def _mean(total, N):
    """The mean of integers that count 2^-30, from their sum in int64."""
    count = tl.full((1,), 1.0, tl.float32) * N  # N may be a constant
    return tl.div_rn(tl.full((1,), 1.0, tl.float32) * total.to(tl.float32), count) * 9.313225746154785e-10


@triton.jit
def _top_bits(c):
    """The bits of max |c|, (1,); NaN is above infinity."""
    top = _top(c, 0) + tl.zeros((1,), tl.float32)
    return top.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _power(bits):
    """The power of two at or below a finite number, given its bits; 1 below 2^-100, whose bits are 27 << 23."""
    return tl.where(bits >= 0x0D800000, bits & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, value_ptr, codes_ptr, scale_ptr, M, N, eps, stride_xm, stride_rm,
    LAYER: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, VALUES: tl.constexpr, CODES: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK)
    inside = (n < N) | EVEN
    one = tl.full((1,), 1.0, tl.float32)
    if WEIGHT and STAGES > 1:
        weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if BIAS and STAGES > 1:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    pid = tl.program_id(0)
    # of many rows the next one is on its way
    for at in tl.range(pid, pid + 1 if STAGES == 1 else M, 1 if STAGES == 1 else tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(at, tl.int64)
        c = tl.load(x_ptr + row * stride_xm + n, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT and STAGES == 1:
            weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if BIAS and STAGES == 1:
            bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            c = rounded_pairs(c + tl.load(residual_ptr + row * stride_rm + n, mask=inside, other=0.0).to(tl.float32), DTYPE)
            tl.store(sum_ptr + row * N + n, c.to(sum_ptr.dtype.element_ty), mask=inside)
        bits = _top_bits(c)
        # a row that is not finite has garbage sums, and the factor NaN below
        finite = bits < 0x7F800000
        power = _power(tl.where(finite, bits, 0))
        if LAYER:
            # two numbers below 2^30 fit into int32
            pairs = tl.sum(tl.reshape(_fixed(c * tl.div_rn(one * 0.5, power)), (BLOCK // 2, 2)), 1)
            mean = _mean(tl.sum(pairs.to(tl.int64), 0), N)
            c = c - (mean * 2.0) * power
            c = c if EVEN else tl.where(inside, c, 0.0)
            power = _power(_top_bits(c))
        # 2^15 twice makes the square one of 2^30; powers of two round nothing
        t = c * tl.div_rn(one * 16384.0, power)
        # and four numbers of [0, 2^30] fit into uint32
        fours = tl.reshape((t * t).to(tl.int32).to(tl.uint32, bitcast=True), (BLOCK // 4, 4))
        total = tl.sum(tl.sum(fours, 1).to(tl.int64), 0)
        variance = ((_mean(total, N) * 4.0) * power) * power
        factor = tl.div_rn(one, tl.sqrt_rn(variance + eps))
        y = c * tl.where(finite, factor, float("nan"))
        if WEIGHT:
            y = y * weight
        if BIAS:
            y = y + bias
        y = rounded_pairs(y, DTYPE)
        if VALUES:
            tl.store(value_ptr + row * N + n, y.to(value_ptr.dtype.element_ty), mask=inside)
        if CODES:
            # past the end y is no number of the row
            top = _top(y if EVEN else tl.where(inside, y, 0.0), 0)
            scale, multiplier = scale_and_multiplier(_bits(top + tl.zeros((1,), tl.float32), DTYPE))
            tl.store(scale_ptr + row + tl.arange(0, 1), scale)
            if tl.max(multiplier, 0) != 0:
                tl.store(codes_ptr + row * N + n, code_bits(y, multiplier, y, False).to(tl.int8), mask=inside)
            else:
                tl.store(codes_ptr + row * N + n, tl.zeros((BLOCK,), tl.int8), mask=inside)


_launch = Launch(_norm_kernel)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    codes: bool,
    values: bool,
) -> list[Tensor]:
    """The norm of x (M, K) plus a residual (M, K): their sum where there is one, the values, codes and scales, as asked for."""
    dtype, device = x.dtype, x.device
    if dtype == torch.float64 and residual is not None:  # the sum is one of float64, the rest is of float32
        total = x + residual
        return [total, *norm(total, None, weight, bias, kind, eps, codes, values)]
    x, residual = (None if t is None else t.float() if t.dtype == torch.float64 else t for t in (x, residual))
    x, residual = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (x, residual))
    assert x is not None
    m, n = x.shape
    # the interpreter's cast to bfloat16 does not round: it stores float32, whose values are rounded already
    inner = torch.float32 if INTERPRETING else x.dtype
    total = x if residual is None else torch.empty((m, n), dtype=inner, device=device)
    y = torch.empty((m, n), dtype=inner, device=device) if values else x
    q = torch.empty((m, n), dtype=torch.int8, device=device) if codes else x
    s = torch.empty((m,), dtype=torch.float32, device=device) if codes else x
    w, b = (x if t is None else t.contiguous() for t in (weight, bias))
    r = x if residual is None else residual
    key = (device.index, m, n, x.dtype, kind, codes, values, residual is None, x.stride(0), r.stride(0),
           None if weight is None else w.dtype, None if bias is None else b.dtype,
           alignment(x, r, w, b))  # fmt: skip
    block = max(power_of_two(n), 4)
    # long rows on Hopper: a program has several rows, and with few registers more of them are on their way at once (measured)
    long = block >= 4096 and device.type == "cuda" and major_of(device.index) == 9
    long = long and block * x.element_size() * (1 + (residual is not None)) <= 1 << 15  # of which shared memory holds two
    programs = min(m, 8 * hopper.programs(x.device.index)) if long else m
    constants = (kind == "layer", residual is not None, weight is not None, bias is not None, values, codes, _DTYPES[x.dtype], block,
                 n == block, 3 if long else 1)  # fmt: skip
    with on(device):
        _launch(key, (programs, 1, 1), (x, r, w, b, total, y, q, s, m, n, float(eps), x.stride(0), r.stride(0)), constants,
                num_warps=min(max(block // 1024, 1), 16), enable_fp_fusion=False, **({"maxnreg": 128} if long else {}))  # fmt: skip
    return [total.to(dtype)] * (residual is not None) + [y.to(dtype)] * values + [q, s] * codes
