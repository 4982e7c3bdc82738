"""INT8 matmul of one to four rows, which is bound by reading the weight: dot products of bytes without tensor cores.

A program keeps partial sums of a few output channels in registers, four products an instruction (dp4a), and no tile goes through shared
memory. For an MLP one launch does gate and up, applies the activation and takes the absmax of its result, so that the codes of the
result need no pass over a whole row. The bits are those of the large kernels: sums are exact integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.activation import INTERPRETING, rounded, value_and_slope
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.quantize import code_bits, scale_and_multiplier
from teint8.kernels.quantize_both_kernels import _bits, _larger, _top

MAX_ROWS = 4

if INTERPRETING:

    @triton.jit
    def _dp4a(a, b, c):
        """c + the sum of the products of the four bytes of a and b."""
        c += (a >> 24) * (b >> 24)
        c += ((a << 8) >> 24) * ((b << 8) >> 24)
        c += ((a << 16) >> 24) * ((b << 16) >> 24)
        return c + ((a << 24) >> 24) * ((b << 24) >> 24)

else:

    @triton.jit
    def _dp4a(a, b, c):
        """c + the sum of the products of the four bytes of a and b."""
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _row_scale(x_ptr, xs_ptr, m, K, stride_xm, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Scale and multiplier of a row: of codes the scale is known, of floats the whole row is read for its absmax."""
    if not QUANTIZE:
        return tl.load(xs_ptr + m), 0.0
    top = tl.zeros((BLOCK,), tl.float32)
    n = tl.arange(0, BLOCK)
    for k in range(0, K, BLOCK):
        top = _larger(top, tl.abs(tl.load(x_ptr + m * stride_xm + k + n, mask=k + n < K, other=0.0).to(tl.float32)))
    return scale_and_multiplier(_bits(_top(top, 0), x_ptr.dtype.element_ty))


@triton.jit
def _words(x_ptr, m, k, ks, inside, stride_xm, multiplier, QUANTIZE: tl.constexpr):
    """Codes of a row, four to a word; (1, BLOCK_K)."""
    if not QUANTIZE:
        x_words = x_ptr.to(tl.pointer_type(tl.int32))
        return tl.load(x_words + m * (stride_xm // 4) + k + ks, mask=inside, other=0)[None, :]
    j = tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + m * stride_xm + (k + ks)[:, None] * 4 + j, mask=inside[:, None], other=0.0).to(tl.float32)
    code = tl.where(multiplier != 0, code_bits(x, multiplier, x, False) & 255, 0)
    return tl.sum(code << (8 * j), 1)[None, :]


@triton.jit
def _float_row(sums, scale, wn, ws_ptr, stride_wsn, bias_ptr, BIAS: tl.constexpr):
    y = (tl.sum(sums, 1).to(tl.float32) * tl.load(ws_ptr + wn * stride_wsn)) * scale
    if BIAS:
        y += tl.load(bias_ptr + wn).to(tl.float32)
    return y


@triton.jit
def _finish(
    sums, up_sums, m, M, scale, wn, columns, in_n, N, ws_ptr, us_ptr, stride_wsn, stride_usn, bias_ptr, up_bias_ptr, y_ptr, tops_ptr,
    DTYPE: tl.constexpr, BIAS: tl.constexpr, UP_BIAS: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    if m < M:
        y = _float_row(sums, scale, wn, ws_ptr, stride_wsn, bias_ptr, BIAS)
        if KIND != "":
            y = value_and_slope(rounded(y, DTYPE), KIND)[0]
            if GATED:
                y = y * rounded(_float_row(up_sums, scale, wn, us_ptr, stride_usn, up_bias_ptr, UP_BIAS), DTYPE)
            y = rounded(y, DTYPE)
            top = tl.max(tl.where(in_n, _bits(tl.abs(y), DTYPE), 0), 0)
            tl.atomic_max(tops_ptr + m, top, sem="relaxed")
        tl.store(y_ptr + m * N + columns, y.to(y_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def _gemv_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, up_ptr, us_ptr, up_bias_ptr, y_ptr, tops_ptr, M, N, WORDS,
    stride_xm, stride_wn, stride_wsn, stride_un, stride_usn,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr, UP_BIAS: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    EVEN: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = columns < N
    wn = tl.where(in_n, columns, 0)  # channels past the end are channel 0, and are not stored
    ks = tl.arange(0, BLOCK_K)
    s0, m0 = _row_scale(x_ptr, xs_ptr, 0, WORDS * 4, stride_xm, QUANTIZE, 4 * BLOCK_K)
    if ROWS > 1:
        s1, m1 = _row_scale(x_ptr, xs_ptr, 1, WORDS * 4, stride_xm, QUANTIZE, 4 * BLOCK_K)
    if ROWS > 2:
        # of three rows the last is multiplied twice, and stored once
        last = tl.minimum(M - 1, 3)
        s2, m2 = _row_scale(x_ptr, xs_ptr, 2, WORDS * 4, stride_xm, QUANTIZE, 4 * BLOCK_K)
        s3, m3 = _row_scale(x_ptr, xs_ptr, last, WORDS * 4, stride_xm, QUANTIZE, 4 * BLOCK_K)
    w_ptrs = w_ptr.to(tl.pointer_type(tl.int32)) + wn.to(tl.int64)[:, None] * (stride_wn // 4) + ks[None, :]
    u_ptrs = up_ptr.to(tl.pointer_type(tl.int32)) + wn.to(tl.int64)[:, None] * (stride_un // 4) + ks[None, :]
    a0 = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    a1 = a0
    a2 = a0
    a3 = a0
    b0 = a0
    b1 = a0
    b2 = a0
    b3 = a0
    for k in tl.range(0, WORDS, BLOCK_K, num_stages=STAGES):
        inside = (k + ks) < WORDS
        if EVEN:
            w = tl.load(w_ptrs + k, eviction_policy="evict_first")
            u = tl.load(u_ptrs + k, eviction_policy="evict_first") if GATED else w
        else:
            w = tl.load(w_ptrs + k, mask=inside[None, :], other=0, eviction_policy="evict_first")
            u = tl.load(u_ptrs + k, mask=inside[None, :], other=0, eviction_policy="evict_first") if GATED else w
        x = _words(x_ptr, 0, k, ks, inside, stride_xm, m0, QUANTIZE) + tl.zeros_like(w)
        a0 = _dp4a(w, x, a0)
        if GATED:
            b0 = _dp4a(u, x, b0)
        if ROWS > 1:
            x = _words(x_ptr, 1, k, ks, inside, stride_xm, m1, QUANTIZE) + tl.zeros_like(w)
            a1 = _dp4a(w, x, a1)
            if GATED:
                b1 = _dp4a(u, x, b1)
        if ROWS > 2:
            x = _words(x_ptr, 2, k, ks, inside, stride_xm, m2, QUANTIZE) + tl.zeros_like(w)
            a2 = _dp4a(w, x, a2)
            if GATED:
                b2 = _dp4a(u, x, b2)
            x = _words(x_ptr, last, k, ks, inside, stride_xm, m3, QUANTIZE) + tl.zeros_like(w)
            a3 = _dp4a(w, x, a3)
            if GATED:
                b3 = _dp4a(u, x, b3)
    _finish(a0, b0, 0, M, s0, wn, columns, in_n, N, ws_ptr, us_ptr, stride_wsn, stride_usn, bias_ptr, up_bias_ptr, y_ptr, tops_ptr,
            DTYPE, BIAS, UP_BIAS, GATED, KIND)  # fmt: skip
    if ROWS > 1:
        _finish(a1, b1, 1, M, s1, wn, columns, in_n, N, ws_ptr, us_ptr, stride_wsn, stride_usn, bias_ptr, up_bias_ptr, y_ptr,
                tops_ptr, DTYPE, BIAS, UP_BIAS, GATED, KIND)  # fmt: skip
    if ROWS > 2:
        _finish(a2, b2, 2, M, s2, wn, columns, in_n, N, ws_ptr, us_ptr, stride_wsn, stride_usn, bias_ptr, up_bias_ptr, y_ptr,
                tops_ptr, DTYPE, BIAS, UP_BIAS, GATED, KIND)  # fmt: skip
        _finish(a3, b3, 3, M, s3, wn, columns, in_n, N, ws_ptr, us_ptr, stride_wsn, stride_usn, bias_ptr, up_bias_ptr, y_ptr,
                tops_ptr, DTYPE, BIAS, UP_BIAS, GATED, KIND)  # fmt: skip


_launch = Launch(_gemv_kernel)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Config = tuple[int, int, int, int]  # output channels and words of a tile, warps, pipeline stages
ONE: Config = (4, 256, 4, 1)
GATED: Config = (8, 128, 4, 1)


def usable(codes: Tensor) -> bool:
    """Whether codes (N, K) can be read as words."""
    return codes.stride(-1) == 1 and codes.shape[-1] % 4 == 0 and codes.stride(-2) % 4 == 0 and codes.data_ptr() % 4 == 0


def gemv(
    x: Tensor,
    xs: Tensor | None,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    up: tuple[Tensor, Tensor, Tensor | None] | None = None,
    kind: str = "",
    tops: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """(M, N) from codes (M, K) and (N, K), scales (M,) and (N,), bias (N,); M up to 4, codes ``usable``.

    Args:
        x, xs, wq, ws, bias, dtype: as for int8_mm; without xs x is floats, which are quantized inside.
        up: codes, scales and bias of a second weight, for ``act(x w^T) * (x up^T)``.
        kind: an activation that is applied to the result, or "".
        tops: int32 (M,), zeros, where the bits of absmax of the result are put; needed where there is a kind.
        config: overrides the default; no result depends on it.

    """
    m, k = x.shape
    n = wq.shape[0]
    device = x.device
    if xs is None and (x.stride(1) != 1 or x.dtype == torch.float64):
        x = x.float().contiguous()
    xs = None if xs is None else xs.contiguous()  # one scale of a whole tensor comes with a stride of 0
    uq, us, ub = up or (wq, ws, None)
    act_dtype = torch.float32 if dtype == torch.float64 else dtype
    inner = torch.float32 if INTERPRETING else act_dtype
    y = torch.empty((m, n), dtype=inner, device=device)
    c = config or (ONE if up is None else GATED)
    args = (x, ws if xs is None else xs, wq, ws, ws if bias is None else bias.contiguous(), uq, us,
            ws if ub is None else ub.contiguous(), y,
            y if tops is None else tops)  # fmt: skip
    strides = (x.stride(0), wq.stride(0), ws.stride(0), uq.stride(0), us.stride(0))
    key = (device.index, m, n, k, strides, dtype, x.dtype, None if bias is None else bias.dtype, None if ub is None else ub.dtype,
           up is None,
           kind, tops is None, c, alignment(*args))  # fmt: skip
    grid = (-(-n // c[0]), 1, 1)
    with on(device):
        if _launch.known(key):
            _launch.again(key, grid, (*args, m, n, k // 4, *strides))
        else:
            rows = 1 if m == 1 else 2 if m == 2 else 4
            constants = (rows, _DTYPES[act_dtype], bias is not None, ub is not None, up is not None, kind, k // 4 % c[1] == 0,
                         xs is None,
                         c[0], c[1], c[3])  # fmt: skip
            _launch.first(key, grid, (*args, m, n, k // 4, *strides), constants, num_warps=c[2], enable_fp_fusion=False)
    return y if inner == dtype else y.to(dtype)
