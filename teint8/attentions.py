"""INT8 attention in plain torch: the text that its kernels are tested against, bit for bit.

Rows of q and k, and channels of v along the keys, are quantized by the numerics contract; then, for each row of q and each block of
128 keys, from the first one on::

    t = (float32(sum q_code * k_code) * k_scale) * (q_scale * c) + max(mask, -1e38) * log2(e)     c = scale * log2(e)
    level = ceil(max of the block's t)
    p = 2^max(t - level, -9)                          a polynomial with a relative error of 1e-4
    code = rint(254 * p) - 127                        a key that is masked, or beyond 2^-9, has the code -127: nothing
    top = max(level, that of the blocks before)
    sum_v = sum_v * 2^(top before - top) + float32(sum (code + 127) * v_code) * 2^(level - top)
    sum_1 = sum_1 * 2^(top before - top) + float32(sum (code + 127)) * 2^(level - top)

and at the end y = (sum_v * v_scale) / sum_1. A block's weights have codes of their own, 8 bits of the power of two that holds its
largest: with one scale for a row, most of many keys would be a few codes only. What is summed within a block is exact, powers of two
scale without rounding, and a block adds one rounding of float32: neither tiles nor the order of keys within a block change a
result. 127 more than a code is a weight without a sign. A row that no key is seen by is 0; one that sees a NaN, or a mask of
+infinity, is NaN.

After Dao et al. (2022, FlashAttention: no scores in memory) and Zhang et al. (2025, SageAttention: INT8 scores).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = 1.4426950408889634
EXP2 = (0.0550090596079826, 0.2422109693288803, 0.6932829022407532, 1.0)
"""Of 2^f, |f| <= 1/2, the highest power first; exactly 1 at 0."""
BLOCK = 128
"""Keys that share a level."""
LOWEST = -9.0
"""Below 2^-9 of its level a weight's code is that of 0."""
FINITE = -1e38
"""Below this only -infinity masks: less would overflow to it."""
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer


def scores(q: Tensor, qs: Tensor, k: Tensor, ks: Tensor, scale: float) -> Tensor:
    """``log2(e) * scale * q k^T`` in float32, without a mask: (..., M, D), (..., M), (..., S, D), (..., S) -> (..., M, S)."""
    acc = (q.double() @ k.double().mT).long().float()
    return (acc * ks.unsqueeze(-2)) * multiplier(qs, scale).unsqueeze(-1)


def multiplier(qs: Tensor, scale: float) -> Tensor:
    """``q_scale * (scale * log2(e))``: the constant is rounded to float32 first."""
    return qs * torch.full_like(qs, scale * LOG2E)


def masked(t: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores t (..., M, S) with a float mask added, and -infinity where a key lies behind its row (causal)."""
    if mask is not None:
        # the least finite number of a dtype, which some models mask with, stays finite
        finite = mask.float().clamp(min=FINITE).masked_fill(mask.isneginf(), -math.inf)
        t = t + finite * torch.full_like(mask, LOG2E, dtype=torch.float32)
    if causal:
        rows, keys = (torch.arange(n, device=t.device) for n in t.shape[-2:])
        t = t.masked_fill(keys > rows.unsqueeze(-1), -math.inf)
    return t


def blocks(t: Tensor, fill: float) -> Tensor:
    """(..., S) as (..., blocks, BLOCK), the last block filled up."""
    whole: Tensor = F.pad(t, (0, -t.shape[-1] % BLOCK), value=fill)
    return whole.reshape(*t.shape[:-1], whole.shape[-1] // BLOCK, BLOCK)


def weights(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (..., blocks, BLOCK) of the weights that scores t (..., S) come to, and the largest score of each block (..., blocks).

    Codes of a block whose largest score is not finite mean nothing, but where that is -infinity: they are -127.

    Examples:
        >>> codes, top = weights(torch.tensor([[0.0, -1.0, -20.0]]))
        >>> codes[0, 0, :4].tolist(), top.tolist()
        ([127, 0, -127, -127], [[0.0]])

    """
    t = blocks(t, -math.inf)
    top = t.amax(-1)
    z = (t - level(top).where(top.isfinite(), 0.0).unsqueeze(-1)).clamp(min=LOWEST)
    z = z.where(top.isfinite().unsqueeze(-1), LOWEST)
    whole = (z + _MAGIC) - _MAGIC
    fraction = z - whole
    p = torch.full_like(z, EXP2[0])
    for coefficient in EXP2[1:]:
        p = p * fraction + coefficient
    p = (p.view(torch.int32) + whole.int() * 2**23).view(torch.float32)
    return ((p * 254.0).round() - 127.0).to(torch.int8), top


def level(top: Tensor) -> Tensor:
    """The power of two that a block's weights are codes of: -infinity where none is seen, or what is seen is not finite."""
    return top.ceil().where(top.isfinite(), -math.inf)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, at least 2^-126; of NaN too, which stands for no keys before and none now."""
    return (exponent.nan_to_num(nan=-126.0).clamp(-126.0, 0.0).int() + 127).bitwise_left_shift(23).view(torch.float32)


def finish(acc: Tensor, total: Tensor, vs: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """y from the sums of each block: acc float32 (blocks, ..., M, E) of (code + 127) * v_code, total (blocks, ..., M) of code + 127.

    Args:
        acc: integers.
        total: integers.
        vs: float32 (..., E).
        top: the largest scores, (blocks, ..., M).
        dtype: of the result.

    """
    levels = level(top)
    before, sums, ones = torch.full_like(levels[0], -math.inf), torch.zeros_like(acc[0]), torch.zeros_like(total[0])
    for each, a, n in zip(levels, acc, total, strict=True):
        highest = torch.maximum(before, each)
        held, new = _power(before - highest), _power(each - highest)
        sums = sums * held.unsqueeze(-1) + a * new.unsqueeze(-1)
        ones = ones * held + n * new
        before = highest
    inverse = torch.ones_like(ones) / ones.clamp(min=1.0)
    y = (sums * vs.unsqueeze(-2)) * inverse.unsqueeze(-1)
    y = y.masked_fill(top.isneginf().all(0).unsqueeze(-1), 0.0)
    return y.masked_fill((top.isnan() | top.isposinf()).any(0).unsqueeze(-1), math.nan).to(dtype)


def value(
    q: Tensor, qs: Tensor, k: Tensor, ks: Tensor, v: Tensor, vs: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Attention of codes.

    Args:
        q: int8 (B, H, M, D).
        qs: float32 (B, H, M).
        k: int8 (B, G, S, D), H a multiple of G: heads that share keys lie next to each other.
        ks: float32 (B, G, S).
        v: int8 (B, G, E, S): its tokens come last.
        vs: float32 (B, G, E).
        mask: floats, broadcastable to (B, H, M, S), or None.
        causal: a row sees the keys up to its own number.
        scale: of the scores.
        dtype: of the result.

    Returns:
        (B, H, M, E).

    Examples:
        >>> codes, one = torch.tensor([[[[127, 0]]]], dtype=torch.int8), torch.tensor([[[1 / 127]]])
        >>> v = torch.tensor([[[[127], [0]]]], dtype=torch.int8)
        >>> value(codes, one, codes, one, v, one.expand(1, 1, 2), None, False, 1.0, torch.float32)
        tensor([[[[1., 0.]]]])

    """
    share = q.shape[1] // k.shape[1]
    k, ks, v, vs = (t.repeat_interleave(share, 1) for t in (k, ks, v, vs))
    codes, top = weights(masked(scores(q, qs, k, ks, scale), mask, causal))
    above = (codes.double() + 127.0).movedim(-2, 0)
    acc = above @ blocks(v, 0).double().permute(3, 0, 1, 4, 2)
    return finish(acc.float(), above.sum(-1).float(), vs, top.movedim(-1, 0), dtype)
