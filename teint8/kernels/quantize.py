"""Row quantization in Triton: one program a row, codes and scale of the numerics contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.activation import INTERPRETING
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.tiles import cdiv, power_of_two

MAX_BLOCK = 16384  # a longer row is read twice, in blocks


@triton.jit
def _mix32(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def mixed_seed(seed):
    """What keys are made from, of an int64 seed: once a program."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix32(_mix32(low) ^ high)


@triton.jit
def noise_key(mixed, index):
    """Odd keys of rows, or of columns with ``mixed_seed(seed ^ 1)``."""
    h = (mixed + index.to(tl.uint32)) * 0x9E3779B1
    return (h ^ (h >> 15)) | 1


@triton.jit
def noise_of(row_key, column_key):
    """``numerics.noise`` of elements from the keys of their rows and columns."""
    return (((row_key * column_key) >> 9) | 0x3F800000).to(tl.float32, bitcast=True)


if INTERPRETING:

    @triton.jit
    def _floor_bits(v):
        return (tl.floor(v) + 12582911.0).to(tl.int32, bitcast=True)

else:

    @triton.jit
    def _floor_bits(v):
        """int32 whose low byte is floor(v) - 1: an addition that rounds down."""
        return tl.inline_asm_elementwise("add.rm.f32 $0, $1, 0f4B3FFFFF;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def code_bits(x, multiplier, noise, STOCHASTIC: tl.constexpr):
    """int32 whose low byte is the code; where the multiplier is 0 it is garbage if x is no number.

    No clamp is needed: without noise |v| <= 127 (1 + 2^-22), and with it the multiplier is ``shrunk``. Launched without FMA
    contraction, which would round once.
    """
    v = x * multiplier
    if STOCHASTIC:
        return _floor_bits(v + noise)
    return (v + 12582912.0).to(tl.int32, bitcast=True)  # the low byte of v + 1.5 * 2^23 is rint(v), ties to even


@triton.jit
def shrunk(multiplier, STOCHASTIC: tl.constexpr):
    """What stochastic rounding multiplies with, so that absmax does not reach the code above 127."""
    return multiplier * 0.9999997615814209 if STOCHASTIC else multiplier


@triton.jit
def codes_of(x, multiplier, row_key, mixed, columns, STOCHASTIC: tl.constexpr, STATIC: tl.constexpr):
    """Codes of x, 0 where the multiplier is 0; keys of rows and columns for stochastic rounding alone."""
    if STATIC:  # what lies beyond the given scale is clipped
        codes = code_bits(tl.minimum(tl.maximum(x * multiplier, -127.0), 127.0), 1.0, x, False)
    else:
        noise = noise_of(row_key, noise_key(mixed, columns)) if STOCHASTIC else x
        codes = code_bits(x, multiplier, noise, STOCHASTIC)
    return tl.where(multiplier != 0, codes, 0).to(tl.int8)


@triton.jit
def scale_and_multiplier(top):
    """Scale and multiplier of a group from the bits of its absmax, as ``numerics.scale_of`` and ``multiplier_of``."""
    absmax = top.to(tl.float32, bitcast=True)
    finite = top < 0x7F800000
    usable = finite & (absmax >= 7.888609052210118e-31)  # 2^-100
    divisor = tl.where(usable, absmax, 127.0)
    full = tl.full(top.shape, 127.0, tl.float32)
    multiplier = tl.where(usable, tl.div_rn(full, divisor), 0.0)
    scale = tl.where(usable, tl.div_rn(divisor, full), tl.where(finite, 0.0, float("nan")))
    return scale, multiplier


@triton.jit
def static_scale_and_multiplier(top, given):
    """The same of a group that has a scale, as ``numerics.quantize_static``: NaN where its absmax is not finite."""
    usable = (top < 0x7F800000) & (given > 0)
    scale = tl.where(usable | (given == 0), given, float("nan"))
    quotient = tl.div_rn(tl.full(top.shape, 1.0, tl.float32), tl.where(usable, given, 1.0))
    return scale, tl.where(usable, quotient, 0.0)


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, seed_ptr, given_ptr, M, K, stride_xb, stride_xm, rows_per_seed,
    STOCHASTIC: tl.constexpr, STATIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = rows < M
    columns = tl.arange(0, BLOCK_K)[None, :]
    second = tl.program_id(1).to(tl.int64)  # of a pair of tensors
    x_ptrs = x_ptr + second * stride_xb + rows[:, None] * stride_xm + columns
    codes_ptrs = codes_ptr + (second * M + rows)[:, None] * K + columns
    scale_ptr += second * M
    # absmax by its bits: a NaN is above infinity, which is above every number
    if ONE_BLOCK:
        x = tl.load(x_ptrs, mask=in_m[:, None] & (columns < K), other=0.0).to(tl.float32)
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    else:
        tops = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_ptrs + k, mask=in_m[:, None] & (k + columns < K), other=0.0).to(tl.float32)
            tops = tl.maximum(tops, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        top = tl.max(tops, 1)
    if STATIC:
        scale, multiplier = static_scale_and_multiplier(top, tl.load(given_ptr + rows, mask=in_m, other=1.0))
    else:
        scale, multiplier = scale_and_multiplier(top)
    multiplier = shrunk(multiplier, STOCHASTIC)[:, None]
    tl.store(scale_ptr + rows, scale, mask=in_m)
    key = tl.zeros((BLOCK_M, 1), tl.uint32)
    mixed = key
    if STOCHASTIC:
        seed = tl.load(seed_ptr + rows // rows_per_seed, mask=in_m, other=0)
        key = noise_key(mixed_seed(seed), rows % rows_per_seed)[:, None]
        mixed = mixed_seed(seed ^ 1)[:, None]
    if ONE_BLOCK:
        q = codes_of(x, multiplier, key, mixed, columns, STOCHASTIC, STATIC)
        tl.store(codes_ptrs, q, mask=in_m[:, None] & (columns < K))
    else:
        for k in range(0, K, BLOCK_K):
            inside = in_m[:, None] & (k + columns < K)
            x = tl.load(x_ptrs + k, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes_ptrs + k, codes_of(x, multiplier, key, mixed, k + columns, STOCHASTIC, STATIC), mask=inside)


_launch = Launch(_quantize_kernel)


def between(a: Tensor, b: Tensor) -> int:
    """The stride, in elements, of the batch that two tensors make which may lie anywhere on one device."""
    return (b.data_ptr() - a.data_ptr()) // a.element_size()


def kind_of(stride: int) -> tuple[bool, bool, bool]:
    """What the JIT specializes on of a stride that differs from call to call."""
    return stride == 1, stride % 16 == 0, -(2**31) <= stride < 2**31


def quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None, pair: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales (M,) of x (M, K); seed (S,), scale (M,) and pair (M, K) as in ``teint8.ops.registry``."""
    seed = seed if scale is None else None
    if pair is not None:
        x, pair = (t.float() if t.dtype == torch.float64 else t for t in (x, pair))
        if x.stride(1) != 1 or pair.stride() != x.stride():
            x, pair = x.contiguous(), pair.contiguous()
    m, k = x.shape
    device = x.device
    if x.dtype == torch.float64:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    count = 1 if pair is None else 2
    codes = torch.empty((count * m, k), dtype=torch.int8, device=device)
    scales = torch.empty((count * m,), dtype=torch.float32, device=device)
    # short rows share a program; the interpreter's cost is that of its programs
    block_k = min(power_of_two(k), MAX_BLOCK)
    block_m = max((4096 if device.type == "cuda" else 65536) // block_k, 1)
    block_m = min(block_m, power_of_two(m))
    stride, per_seed = x.stride(0), 1 if seed is None else m // seed.numel()
    step = 0 if pair is None else between(x, pair)
    seeds, given = codes if seed is None else seed.contiguous(), scales if scale is None else scale.contiguous()
    key = (device.index, x.dtype, m, k, stride, per_seed, seed is None, scale is None, count, kind_of(step), x.data_ptr() % 16 == 0,
           alignment(seeds, given))  # fmt: skip
    args = (x, codes, scales, seeds, given, m, k, step, stride, per_seed)
    with on(device):
        _launch(key, (cdiv(m, block_m), count, 1), args, (seed is not None, scale is not None, block_m, block_k, k <= block_k),
                num_warps=min(max(block_m * block_k // 1024, 1), 4), enable_fp_fusion=False)  # fmt: skip
    return codes, scales
