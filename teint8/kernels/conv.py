"""INT8 convolutions in Triton, channels last: an implicit matmul, and depthwise ones. What windows see is never written down."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.int8_mm import Config, config_of, major_of
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.tiles import cdiv, place, power_of_two


@triton.jit
def _pixel(m, OD, OH, OW):
    """Sample and coordinates of windows."""
    w = m % OW
    h = m // OW % OH
    d = m // (OW * OH) % OD
    return m // (OW * OH * OD), d, h, w


@triton.jit
def _conv_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, bias_ptr, y_ptr, M, N, C, GROUPS, SCALES, D, H, W, OD, OH, OW, KH, KW,
    step_d, step_h, step_w, before_d, before_h, before_w, hole_d, hole_h, hole_w, TAPS,
    HAS_BIAS: tl.constexpr, BY_ROW: tl.constexpr, BY_TAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (B, D, H, W, GROUPS * C), w (GROUPS * N, TAPS, C).

    BY_TAP: a step of the loop lies in one tap, else it may span several. BY_ROW: what a row of the window sees lies in one
    piece, C numbers from pixel w on; TAPS are rows.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = rows < M
    in_n = columns < N
    b, od, oh, ow = _pixel(tl.where(in_m, rows, 0), OD, OH, OW)
    d0 = od * step_d - before_d
    h0 = oh * step_h - before_h
    w0 = ow * step_w - before_w
    channel = (group * N + tl.where(in_n, columns, 0)).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    sample = b.to(tl.int64) * D
    w_ptrs = w_ptr + channel[None, :] * (TAPS * C) + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    blocks = tl.cdiv(C, BLOCK_K)
    steps = TAPS * blocks if BY_TAP or BY_ROW else tl.cdiv(TAPS * C, BLOCK_K)
    for i in range(steps):
        if BY_ROW:
            tap = i // blocks
            c = i % blocks * BLOCK_K + ks
            inside_k = c < C
            offset = tap * C + i % blocks * BLOCK_K
            d = d0 + tap // KH * hole_d
            h = h0 + tap % KH * hole_h
            wide = W * (C // KW)
            at = (w0 * (C // KW))[:, None] + c[None, :]
            seen = (d >= 0) & (d < D) & (h >= 0) & (h < H) & in_m
            x_ptrs = x_ptr + (((sample + d) * H + h) * wide)[:, None] + at
            mask = seen[:, None] & inside_k[None, :] & (at >= 0) & (at < wide)
        elif BY_TAP:
            tap = i // blocks
            c = i % blocks * BLOCK_K + ks
            inside_k = c < C
            offset = tap * C + i % blocks * BLOCK_K
            d = d0 + tap // (KH * KW) * hole_d
            h = h0 + tap // KW % KH * hole_h
            w = w0 + tap % KW * hole_w
            seen = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & in_m
            pixel = ((sample + d) * H + h) * W + w
            x_ptrs = x_ptr + pixel[:, None] * (GROUPS * C) + group * C + c[None, :]
            mask = seen[:, None] & inside_k[None, :]
        else:
            k = i * BLOCK_K + ks
            tap = k // C
            c = k % C
            inside_k = k < TAPS * C
            offset = i * BLOCK_K
            d = d0[:, None] + (tap // (KH * KW) * hole_d)[None, :]
            h = h0[:, None] + (tap // KW % KH * hole_h)[None, :]
            w = w0[:, None] + (tap % KW * hole_w)[None, :]
            mask = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & in_m[:, None] & inside_k[None, :]
            x_ptrs = x_ptr + (((sample[:, None] + d) * H + h) * W + w) * (GROUPS * C) + group * C + c[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0)
        weight = tl.load(w_ptrs + offset, mask=inside_k[:, None], other=0)
        acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
    xs = tl.load(xs_ptr + b * SCALES + group // (GROUPS // SCALES))
    y = (acc.to(tl.float32) * tl.load(ws_ptr + channel)[None, :]) * xs[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * (GROUPS * N) + group * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def _depthwise_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, bias_ptr, y_ptr, M, C, SCALES, D, H, W, OD, OH, OW, KD, KH, KW,
    step_d, step_h, step_w, before_d, before_h, before_w, hole_d, hole_h, hole_w,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x (B, D, H, W, C), w (KD * KH * KW, C): one kernel a channel."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    rows = tl.program_id(0) // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_m = rows < M
    in_c = c < C
    b, od, oh, ow = _pixel(tl.where(in_m, rows, 0), OD, OH, OW)
    d0 = od * step_d - before_d
    h0 = oh * step_h - before_h
    w0 = ow * step_w - before_w
    sample = b.to(tl.int64) * D
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for tap in range(KD * KH * KW):
        d = d0 + tap // (KH * KW) * hole_d
        h = h0 + tap // KW % KH * hole_h
        w = w0 + tap % KW * hole_w
        seen = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & in_m
        pixel = ((sample + d) * H + h) * W + w
        x = tl.load(x_ptr + pixel[:, None] * C + c[None, :], mask=seen[:, None] & in_c[None, :], other=0)
        weight = tl.load(w_ptr + tap * C + c, mask=in_c, other=0)
        acc += x.to(tl.int32) * weight.to(tl.int32)[None, :]
    mask = in_m[:, None] & in_c[None, :]
    scale = tl.load(xs_ptr + b[:, None] * SCALES + (c // (C // SCALES))[None, :], mask=mask, other=0.0)
    y = (acc.to(tl.float32) * tl.load(ws_ptr + c, mask=in_c, other=0.0)[None, :]) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def tile_of(m: int, n: int = 128, k: int = 512, by_row: bool = False, major: int = 8) -> Config:
    """The tile for m windows of k products, and n channels: on Hopper the fastest at ResNet-50's shapes, elsewhere without spills."""
    if by_row:
        return Config(64, 64, 32, 4, 2)
    if major != 9 or m <= 128:
        return config_of(m, 8)
    if n <= 64:
        return Config(128, 64, 64, 4, 3)
    if m > 16384 and n > 128:
        return Config(128, 128, 64, 4, 4)
    # few windows of many channels: wider tiles, of which there is about one for each multiprocessor
    return Config(64, 256 if n >= 512 and m <= 4096 else 128, 128, 4, 3)


_conv = Launch(_conv_kernel)
_depthwise = Launch(_depthwise_kernel)


class _Sizes(NamedTuple):
    """Three spatial dimensions, of one to three."""

    sizes: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]


@functools.lru_cache(4096)
def _three(sizes: tuple[int, ...], kernel: tuple[int, ...], window: Any) -> tuple[_Sizes, tuple[int, ...]]:
    """Three dimensions, and the spatial sizes of the result as they are; worked out once for each, for the host's sake."""
    out = window.out(sizes, kernel)

    def full(values: Any, fill: int) -> tuple[int, ...]:
        return (fill,) * (3 - len(values)) + tuple(values)

    whole = _Sizes(
        full(sizes, 1), full(out, 1), full(kernel, 1), full(window.stride, 1), full(window.padding[::2], 0), full(window.dilation, 1)
    )
    return whole, out


def conv(
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    window: Any,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """(B, *S', N) from codes (B, *S, C) and (N, *kernel, C / groups), scales (B, V) and (N), bias (N); as ``ops.raw_conv.int8_conv``.

    Args:
        window: a ``Window`` of ops.raw_conv.
        config: overrides the table; no result depends on it.

    """
    s, out = _three(xq.shape[1:-1], wq.shape[1:-1], window)
    g, n_all, c = window.groups, wq.shape[0], wq.shape[-1]
    n, device = n_all // g, xq.device
    m = xq.shape[0] * math.prod(s.out)
    xq, wq, xs, ws = xq.contiguous(), wq.contiguous(), xs.contiguous(), ws.contiguous()
    # the interpreter's cast to bfloat16 does not round
    inner = torch.float32 if dtype == torch.float64 or not xq.is_cuda else dtype
    y = torch.empty((xq.shape[0], *out, n_all), dtype=inner, device=device)
    b = ws if bias is None else bias.contiguous()
    scales = xs.shape[1]
    depthwise = n == c == 1 and g > 1
    if depthwise:
        wq = wq.reshape(n_all, -1).t().contiguous()
    operands = (xq, wq, xs, ws, b, y)
    key = (device.index, m, n, c, g, scales, s, inner, b.dtype, bias is None, config, alignment(*operands))
    where = (*s.stride, *s.before, *s.dilation)
    with on(device):
        if depthwise:
            block_c = min(power_of_two(g), 64)
            block_m = (2048 if device.type == "cuda" else 65536) // block_c
            _depthwise(key, (cdiv(m, block_m) * cdiv(g, block_c), 1, 1),
                       (*operands, m, g, scales, *s.sizes, *s.out, *s.kernel, *where), (bias is not None, block_m, block_c),
                       num_warps=4, enable_fp_fusion=False)  # fmt: skip
        else:
            by_row = g == 1 and c < 16 and s.dilation[2] == 1 and s.kernel[2] > 1
            t = config or tile_of(m, n, c * math.prod(s.kernel), by_row, major_of(device.index))
            # few channels: a step spans several taps, so that it is not mostly empty
            by_tap = c >= t.block_k // 2
            deep, taps = (c * s.kernel[2], math.prod(s.kernel[:2])) if by_row else (c, math.prod(s.kernel))
            grid = (cdiv(m, t.block_m) * cdiv(n, t.block_n) * g, 1, 1)
            _conv(key, grid, (*operands, m, n, deep, g, scales, *s.sizes, *s.out, *s.kernel[1:], *where, taps),
                  (bias is not None, by_row, by_tap, t.block_m, t.block_n, t.block_k, 8),
                  num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=False)  # fmt: skip
    return y.to(dtype)
