"""Codes of rows and transposed codes of columns, for the backward's K-major operands: two reads of the source, whatever it is.

The first kernel takes absmax of rows and of columns in one read, the second writes both codes in another. The source is a tensor, an
activation function of one (or of a gate and its other half), or the gradients of that: what lies between two matmuls is never written
down. The kernels are in ``quantize_both_kernels.py``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8._torch import dispatched
from teint8.kernels.activation import INTERPRETING
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.quantize import between, kind_of
from teint8.kernels.quantize_both_kernels import _absmax_kernel, _both_kernel
from teint8.kernels.scratch import Zeros


class Blocks(NamedTuple):
    """Tiles of the two kernels.

    Attributes:
        absmax: rows, columns, rows a program reads, pipeline stages, warps.
        codes: rows, columns, warps.

    """

    absmax: tuple[int, int, int, int, int]
    codes: tuple[int, int, int]


# by how many tensors are read and what is computed of them: the fastest of benchmarks/quantize.py --sweep on one H200
PLAIN = Blocks((64, 128, 512, 4, 4), (64, 128, 8))
FORWARD = Blocks((32, 64, 512, 4, 4), (128, 64, 8))
BACKWARD = Blocks((16, 64, 512, 3, 2), (32, 64, 2))
INTERPRETED = Blocks((64, 128, 128, 1, 4), (64, 128, 4))

_absmax = Launch(_absmax_kernel)
_both = Launch(_both_kernel)


def padded(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int8 tensor whose rows begin at multiples of 16 bytes, as TMA wants it."""
    k = shape[-1]
    if k % 16 == 0:
        return torch.empty(shape, dtype=torch.int8, device=device)
    return torch.empty((*shape[:-1], _up_to_16(k)), dtype=torch.int8, device=device)[..., :k]


def _up_to_16(k: int) -> int:
    return -(-k // 16) * 16


def _pieces(count: int, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Side by side, for a matmul may take them as one; but apart where an op returns them, whose results must not share memory."""
    if count == 1 or dispatched.active:
        return [padded(shape, device) for _ in range(count)]
    return list(padded((count, *shape), device).unbind())


def dense(x: Tensor) -> Tensor:
    """x as the kernels read it: float32 or less, rows contiguous, no row for several."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def alike(u: Tensor | None, g: Tensor) -> Tensor:
    """u, or g where there is none, with the strides of g, which the kernels use for both."""
    if u is None:
        return g
    u = dense(u)
    return u if u.stride() == g.stride() else torch.empty_strided(g.shape, g.stride(), dtype=g.dtype, device=g.device).copy_(u)


class _Plan(NamedTuple):
    """What sources of one shape come to.

    Attributes:
        outputs: tensors with codes by row.
        sides: those with codes by column.
        rows: groups that are rows.
        count: groups in all; there are scales of each, multipliers, and keys where there is noise.

    """

    lead: tuple[int, ...]
    m: int
    n: int
    batch: int
    outputs: int
    sides: int
    rows: int
    count: int
    blocks: Blocks
    grid: tuple[int, int, int]
    code_grid: tuple[int, int, int]
    out_strides: tuple[int, int, int, int]


_plans: dict[Any, _Plan] = {}


def _blocks_of(kind: str, backward: bool) -> Blocks:
    return INTERPRETED if INTERPRETING else BACKWARD if backward else FORWARD if kind else PLAIN


def _planned(shape: tuple[int, ...], outputs: int, value: bool, blocks: Blocks) -> _Plan:
    *lead, m, n = shape
    batch, sides = math.prod(lead), outputs + value
    rows = batch * outputs * m
    _, bn, span, _, _ = blocks.absmax
    cm, cn, _ = blocks.codes
    code_stride, tcode_stride = _up_to_16(n), _up_to_16(m)
    out_strides = (m * code_stride if lead else code_stride, code_stride, n * tcode_stride if lead else tcode_stride, tcode_stride)
    return _Plan(tuple(lead), m, n, batch, outputs, sides, rows, rows + batch * sides * n, blocks, (-(-n // bn), -(-m // span), batch),
                 (-(-n // cn), -(-m // cm), batch), out_strides)  # fmt: skip


def quantize_both(
    g: Tensor,
    u: Tensor | None = None,
    d: Tensor | None = None,
    *,
    kind: str = "",
    seed: Tensor | None = None,
    value: bool = False,
    pair: Tensor | None = None,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Codes (..., M, N), scales (..., M), transposed codes (..., N, M), scales (..., N) of a source; twice for the gradients of a gate.

    Args:
        g: (M, N) or (B, M, N): the tensor itself, or what an activation of this kind is applied to.
        u: as g, the other half of a gate, or None.
        d: as g, for the gradients of the activation: that of its result; None for its value.
        kind: "" or one of ``teint8.activations.KINDS``.
        seed: int64 (B,) for stochastic rounding of rows, seed ^ 1 for those of the transpose; seed + 2 for the second gradient.
        value: with d, append transposed codes and scales of the activation's value, rounded to nearest.
        pair: a second tensor like g (M, N), which makes a batch of two with it.
        blocks: tiles; the bits do not depend on them.

    """
    shape, device = g.shape if pair is None else (2, *g.shape), g.device
    g = dense(g)
    gated, backward = u is not None, d is not None
    u, d = alike(u, g), g if d is None else dense(d)
    step = g.stride(0)
    if pair is not None:
        pair = alike(pair, g)
        step = between(g, pair)
    strides = (step, g.stride(-2), d.stride(0), d.stride(-2))
    seed = None if seed is None else seed.contiguous()
    key = (device.index, g.dtype, shape, kind_of(step), strides[1:], kind, gated, backward, value, seed is None, blocks,
           alignment(g, u, d, g if seed is None else seed))  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[key] = _planned(shape, 2 if gated and backward else 1, value, blocks or _blocks_of(kind, backward))
    lead, m, n, batch, outputs, sides, rows, count, blocks, grid, code_grid, out_strides = plan
    scales = torch.empty((2 if seed is None else 3) * count, dtype=torch.float32, device=device)
    codes = _pieces(outputs, (*lead, m, n), device)
    tcodes = _pieces(sides, (*lead, n, m), device)
    with on(device), Zeros(count + batch * (grid[0] + grid[1]), device) as tops:
        first = (g, u, d, tops, scales, scales if seed is None else seed, m, n, count, *strides)
        second = (g, u, d, scales, codes[0], tcodes[0], codes[-1], tcodes[outputs - 1], tcodes[-1], m, n, count, *strides, *out_strides)
        if _both.known(key) and _absmax.known(key):
            _absmax.again(key, grid, first)
            _both.again(key, code_grid, second)
        else:
            how = (kind, gated, backward)
            wide = max(n * out_strides[1], n * out_strides[3], m * max(strides[1], strides[3], out_strides[1])) >= 2**31
            bm, bn, span, stages, warps = blocks.absmax
            _absmax.first(key, grid, first,
                          (*how, m % span == 0 and n % bn == 0, wide, outputs, value, seed is not None, bm, bn, span, stages),
                          num_warps=warps, enable_fp_fusion=False)  # fmt: skip
            bm, bn, warps = blocks.codes
            _both.first(key, code_grid, second, (*how, m % bm == 0 and n % bn == 0, wide, outputs, value, seed is not None, bm, bn),
                        num_warps=warps, enable_fp_fusion=False)  # fmt: skip
    if sides == 1 and not lead:
        return [codes[0], scales[:m], tcodes[0], scales[m:count]]
    scale, tscale = scales[:rows].view(batch, outputs, m), scales[rows:count].view(batch, sides, n)
    out: list[Tensor] = []
    for i in range(sides):
        out += [codes[i], scale[:, i].reshape(*lead, m)] if i < outputs else []
        out += [tcodes[i], tscale[:, i].reshape(*lead, n)]
    return out
