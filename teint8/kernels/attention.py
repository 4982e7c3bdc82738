"""INT8 attention in Triton (``teint8.attentions``): scores stay in registers, and keys are read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.attentions import BLOCK, LOG2E, blocks
from teint8.kernels.activation import INTERPRETING, reciprocal
from teint8.kernels.int8_mm import major_of
from teint8.kernels.launch import Launch, on
from teint8.kernels.tiles import Tile, cdiv, power_of_two

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _larger(a, b):
    """The larger one; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scores(
    q, a, k_ptrs, ks_ptr, mask_ptrs, first, rows, S, in_d, stride_ms, CAUSAL: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N keys, the first of which is ``first``."""
    keys = first + tl.arange(0, BLOCK_N)
    if EVEN and EVEN_D:
        k = tl.load(k_ptrs)
        ks = tl.load(ks_ptr + keys)
    else:
        k = tl.load(k_ptrs, mask=in_d[:, None] & (keys < S)[None, :], other=0)
        ks = tl.load(ks_ptr + keys, mask=keys < S, other=0.0)
    t = (tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * ks[None, :]) * a[:, None]
    if MASK:
        at = mask_ptrs + keys.to(tl.int64)[None, :] * stride_ms
        mask = tl.load(at, mask=(keys < S)[None, :], other=0.0).to(tl.float32)
        lowest = tl.where(mask == NEGATIVE_INFINITY, NEGATIVE_INFINITY, -1e38)
        t += tl.maximum(mask, lowest, propagate_nan=tl.PropagateNan.ALL) * 1.4426950408889634
    if CAUSAL:
        t = tl.where(keys[None, :] > rows[:, None], NEGATIVE_INFINITY, t)
    if not EVEN:
        t = tl.where((keys < S)[None, :], t, NEGATIVE_INFINITY)
    return t


@triton.jit
def _weights(t, level):
    """Codes of weights, less 127 of what they stand for, in int32."""
    z = tl.maximum(t - level[:, None], -9.0)
    shifted = z + 12582912.0
    fraction = z - (shifted - 12582912.0)
    p = fraction * 0.0550090596079826 + 0.2422109693288803
    p = p * fraction + 0.6932829022407532
    p = p * fraction + 1.0
    p = (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return ((p * 254.0 + 12582912.0) - 127.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _power(exponent):
    """2^exponent of one that is at most 0, at least 2^-126."""
    return ((tl.maximum(exponent, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _add(t, v, sums_ptr, in_e, top, before, total, acc, BLOCK_N: tl.constexpr):
    """Adds a block of keys, whose scores are t and values v, to the sums of a row."""
    highest = tl.reduce(t, 1, _larger)
    top = _larger(top, highest)
    seen = tl.abs(highest) < float("inf")
    ceiling = tl.ceil(tl.where(seen, highest, 0.0))
    level = tl.where(seen, ceiling, NEGATIVE_INFINITY)
    after = tl.maximum(before, level)
    held = _power(tl.where(before == after, 0.0, before - after))
    new = _power(tl.where(seen, level - after, 0.0))
    codes = _weights(t, ceiling)
    # 127 more than a code is what it stands for
    add = tl.zeros((t.shape[0], v.shape[1]), tl.int32) + 127 * tl.load(sums_ptr, mask=in_e, other=0)[None, :]
    add = tl.dot(codes.to(tl.int8), v, add, out_dtype=tl.int32)
    acc = acc * held[:, None] + add.to(tl.float32) * new[:, None]
    total = total * held + (tl.sum(codes, 1) + 127 * BLOCK_N).to(tl.float32) * new
    return top, after, total, acc


@triton.jit
def _attention_kernel(
    q_ptr, a_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr, sums_ptr, mask_ptr, y_ptr, HEADS, SHARE, M, S, D, E,
    stride_mb, stride_mh, stride_mm, stride_ms,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if CAUSAL:  # the longest first
        tile = tiles - 1 - tile
    batch = head // HEADS
    shared = batch * (HEADS // SHARE) + (head % HEADS) // SHARE
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = rows < M
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + (head * M + rows)[:, None] * D + d[None, :], mask=in_m[:, None] & (d < D)[None, :], other=0)
    a = tl.load(a_ptr + head * M + rows, mask=in_m, other=0.0)
    k_ptrs = k_ptr + shared * S * D + n[None, :] * D + d[:, None]
    v_ptrs = v_ptr + shared * E * S + e[None, :].to(tl.int64) * S + n[:, None]
    ks_ptr += shared * S
    mask_ptrs = mask_ptr + batch * stride_mb + (head % HEADS) * stride_mh + tl.where(in_m, rows, 0).to(tl.int64)[:, None] * stride_mm
    last = tl.minimum(S, (tile + 1) * BLOCK_M) if CAUSAL else S
    # keys that every row of this tile sees, in whole blocks; the rest is looked at one by one
    whole = tl.minimum(tile * BLOCK_M if CAUSAL else S, S) // BLOCK_N * BLOCK_N
    in_e = e < E
    sums_ptrs = sums_ptr + shared * tl.cdiv(S, BLOCK_N) * E + e
    top = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
    before = top
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for first in range(0, whole, BLOCK_N):
        t = _scores(q, a, k_ptrs + first * D, ks_ptr, mask_ptrs, first, rows, S, d < D, stride_ms,
                    False, MASK, True, EVEN_D, BLOCK_N)  # fmt: skip
        v = tl.load(v_ptrs + first) if EVEN_D else tl.load(v_ptrs + first, mask=in_e[None, :], other=0)
        top, before, total, acc = _add(t, v, sums_ptrs + first // BLOCK_N * E, in_e, top, before, total, acc, BLOCK_N)
    for first in range(whole, last, BLOCK_N):
        t = _scores(q, a, k_ptrs + first * D, ks_ptr, mask_ptrs, first, rows, S, d < D, stride_ms,
                    CAUSAL, MASK, EVEN, EVEN_D, BLOCK_N)  # fmt: skip
        v = tl.load(v_ptrs + first, mask=in_e[None, :] & (first + n < S)[:, None], other=0)
        top, before, total, acc = _add(t, v, sums_ptrs + first // BLOCK_N * E, in_e, top, before, total, acc, BLOCK_N)
    inverse = reciprocal(tl.maximum(total, 1.0))
    vs = tl.load(vs_ptr + shared * E + e, mask=in_e, other=0.0)
    y = (acc * vs[None, :]) * inverse[:, None]
    y = tl.where((top == NEGATIVE_INFINITY)[:, None], 0.0, y)
    y = tl.where(((tl.abs(top) < float("inf")) | (top == NEGATIVE_INFINITY))[:, None], y, float("nan"))
    y_ptrs = y_ptr + (head * M + rows)[:, None] * E + e[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_e[None, :])


_launch = Launch(_attention_kernel)


def config_of(d: int, masked: bool, major: int = 8) -> Tile:
    """The tile for heads of width d on a chip of this generation: those that spill no registers (``tests/compile_targets.py``).

    But for one: on Hopper heads of 128 spill what is needed after the loop, where it was measured twice as fast as the others.
    """
    if masked:
        return Tile(16 if d > 128 else 32, BLOCK, 8, 2)
    if d > 128:
        return Tile(32, BLOCK, 8, 2)
    if d <= 64:
        return Tile(64, BLOCK, 4, 3)
    return Tile(64, BLOCK, 4 if major == 9 else 8, 2)


def attention(
    q: Tensor, qs: Tensor, k: Tensor, ks: Tensor, v: Tensor, vs: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dtype: torch.dtype, config: Tile | None = None,
) -> Tensor:  # fmt: skip
    """(B, H, M, E) from codes, as ``attentions.value``; ``config`` overrides the tile, which is as wide as a block of keys."""
    (b, h, m, d), (g, s), e, device = q.shape, k.shape[1:3], v.shape[2], q.device
    q, k, ks, v, vs = (t.contiguous() for t in (q, k, ks, v, vs))
    a = qs * torch.full_like(qs, scale * LOG2E)
    t = config or config_of(max(d, e), mask is not None, major_of(device.index))
    sums = blocks(v, 0).sum(-1, dtype=torch.int32).mT.contiguous()
    if t.block_n != BLOCK:
        raise ValueError(f"attention: the tile is {t.block_n} keys wide; {BLOCK} share a level, and so many are needed")
    # the interpreter's cast to bfloat16 does not round
    inner = torch.float32 if INTERPRETING or dtype == torch.float64 else dtype
    y = torch.empty((b, h, m, e), dtype=inner, device=device)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(b, h, m, s).stride()
    given = a if mask is None else mask
    block_d, block_e = max(32, power_of_two(d)), max(16, power_of_two(e))
    constants = (causal, mask is not None, s % t.block_n == 0, d == block_d and e == block_e, t.block_m, t.block_n, block_d, block_e)
    operands = (q, a, k, ks, v, vs, sums, given, y)
    key = (device.index, b, h, g, m, s, d, e, inner, given.dtype, strides, constants, t,
           tuple(o.data_ptr() % 16 == 0 for o in operands))  # fmt: skip
    with on(device):
        _launch(key, (cdiv(m, t.block_m) * b * h, 1, 1), (*operands, h, h // g, m, s, d, e, *strides), constants,
                num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=False)  # fmt: skip
    return y.to(dtype)
