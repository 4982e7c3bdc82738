"""INT8 attention in plain torch: the text that its kernels are tested against, bit for bit.

Rows of q and k, and channels of v along the keys, are quantized by the numerics contract; then, for each row of q::

    t = (float32(sum q_code * k_code) * k_scale) * (q_scale * c) + max(mask, -1e38) * log2(e)     c = scale * log2(e)
    z = max(t - max t, -9)
    p = 2^z                                           a polynomial with a relative error of 1e-4
    code = rint(254 * p) - 127                        a key that is masked, or beyond 2^-9, has the code -127: nothing
    y = (float32(sum (code + 127) * v_code) * v_scale) / sum (code + 127)

The weights are codes of a row whose largest is 1, so that no scale of their own is needed, and 127 more than a code is a weight
without a sign: 8 bits of it. Both sums are exact integers. The largest score is that of the whole row, not of the keys seen so far:
a kernel goes over the keys twice, and tiles do not change a result. A row that no key is seen by is 0; one that sees a NaN, or a
mask of +infinity, is NaN.

After Dao et al. (2022, FlashAttention: no scores in memory) and Zhang et al. (2025, SageAttention: INT8 scores).
"""

import math

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
EXP2 = (0.0550090596079826, 0.2422109693288803, 0.6932829022407532, 1.0)
"""Of 2^f, |f| <= 1/2, the highest power first; exactly 1 at 0."""
LOWEST = -9.0
"""Below 2^-9 of the largest weight a code is that of 0."""
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


def weights(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (..., M, S) of the weights that scores t come to, and the largest score of each row (..., M).

    Codes of a row whose largest score is not finite mean nothing.

    Examples:
        >>> codes, top = weights(torch.tensor([[0.0, -1.0, -20.0]]))
        >>> codes.tolist(), top.tolist()
        ([[127, 0, -127]], [0.0])

    """
    top = t.amax(-1)
    z = (t - top.unsqueeze(-1)).clamp(min=LOWEST)
    z = z.where(top.isfinite().unsqueeze(-1), LOWEST)
    whole = (z + _MAGIC) - _MAGIC
    fraction = z - whole
    p = torch.full_like(z, EXP2[0])
    for coefficient in EXP2[1:]:
        p = p * fraction + coefficient
    p = (p.view(torch.int32) + whole.int() * 2**23).view(torch.float32)
    return ((p * 254.0).round() - 127.0).to(torch.int8), top


def finish(acc: Tensor, total: Tensor, vs: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """y from exact sums: acc int (..., M, E) of (code + 127) * v_code, total int (..., M) of code + 127.

    Args:
        vs: float32 (..., E).
        top: the largest score, (..., M).
        dtype: of the result.

    """
    inverse = torch.ones_like(top) / total.clamp(min=1).float()
    y = (acc.float() * vs.unsqueeze(-2)) * inverse.unsqueeze(-1)
    y = y.masked_fill(top.isneginf().unsqueeze(-1), 0.0)
    return y.masked_fill((top.isnan() | top.isposinf()).unsqueeze(-1), math.nan).to(dtype)


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
    above = codes.long() + 127
    acc = (above.double() @ v.double().mT).long()
    return finish(acc, above.sum(-1), vs, top, dtype)
