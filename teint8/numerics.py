"""The numerics contract in plain torch: the text that every kernel is tested against, bit for bit.

For a group of values ``x`` (a token's features, an output channel's weights), symmetric INT8 with float32 scales::

    absmax = max |x|                        in float32, whatever the dtype of x
    scale  = absmax / 127                   one IEEE division; absmax below 2^-100 counts as 0: scale 0, codes 0
    code   = clamp(rint(x * (127 / absmax)), -127, 127)
    x_hat  = code * scale
    acc    = sum over k of code_x * code_w  exact
    y      = (float32(acc) * scale_w) * scale_x (+ bias), each operation rounded once, then cast

A group that holds a NaN or an infinity gets scale NaN and codes 0: its outputs are NaN, and no others are.

Every operation is defined by IEEE 754, so that two implementations either agree in every bit or one of them is wrong.
Two traps of torch are avoided below: ``127 / tensor`` is a reciprocal and a multiply (two roundings), and on CUDA
``tensor / 127`` multiplies by a rounded reciprocal. Both divide by full tensors here.
"""

import math

import torch
from torch import Tensor

from teint8.noise import mix32, noise

__all__ = [
    "BLOCKS",
    "MAX_INT32_K",
    "QMAX",
    "TINY",
    "absmax",
    "block_of",
    "by_block",
    "clipped",
    "codes_of",
    "dequantize",
    "int8_block_mm",
    "int8_mm",
    "mix32",
    "multiplier_of",
    "noise",
    "quantize",
    "quantize_static",
    "scale_of",
    "tells_absmax",
]

QMAX = 127
"""Largest code. -128 is never used: codes are symmetric, so that negation is exact."""

TINY = 2.0**-100
"""An absmax below this counts as zero: 127 / absmax stays finite and no scale is denormal."""

MAX_INT32_K = 131072
"""Longest contraction that one int32 accumulator holds: 131072 * 127 * 127 < 2**31."""


def absmax(x: Tensor) -> Tensor:
    """Absmax of the last dimension in float32: ``(..., K) -> (...)``; 0 where K is 0, NaN where a value is NaN.

    Args:
        x: (..., K), any float dtype.

    Returns:
        float32 (...).

    Examples:
        >>> absmax(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))
        tensor([2.0000, 0.5000])

    """
    if x.shape[-1] == 0:
        return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    return x.float().abs().amax(-1)


def scale_of(absmax: Tensor) -> Tensor:
    """``absmax / 127``; 0 where absmax is below 2^-100, NaN where it is not finite.

    Args:
        absmax: float32, any shape.

    Returns:
        float32 scales of that shape.

    Examples:
        >>> scale_of(torch.tensor([127.0, 0.0, float("inf")]))
        tensor([1., 0., nan])

    """
    scale = torch.where(absmax < TINY, 0.0, absmax / torch.full_like(absmax, QMAX))
    return torch.where(absmax.isfinite(), scale, math.nan)


def tells_absmax(dtype: torch.dtype) -> bool:
    """Whether ``scale * 127``, rounded to this dtype, is the absmax of values of it: in float32 two neighbours may have one scale.

    Args:
        dtype: of the values.

    Returns:
        True for bfloat16 and float16, in all of whose numbers ``tests/test_kernels.py`` tries it.

    Examples:
        >>> tells_absmax(torch.bfloat16), tells_absmax(torch.float32)
        (True, False)

    """
    return dtype in (torch.bfloat16, torch.float16)


def multiplier_of(absmax: Tensor) -> Tensor:
    """``127 / absmax``, what values are multiplied by; 0 where the codes are 0 by definition.

    Args:
        absmax: float32, any shape.

    Returns:
        float32 of that shape.

    Examples:
        >>> multiplier_of(torch.tensor([254.0, 0.0, float("nan")]))
        tensor([0.5000, 0.0000, 0.0000])

    """
    valid = absmax.isfinite() & (absmax >= TINY)
    return torch.where(valid, torch.full_like(absmax, QMAX) / torch.where(valid, absmax, 1.0), 0.0)


def codes_of(x: Tensor, multiplier: Tensor, noise: Tensor | None = None) -> Tensor:
    """``clamp(rint(x * multiplier))`` in int8, ties to even; with noise ``floor(x * (multiplier * (1 - 2^-22)) + noise) - 1``.

    Args:
        x: values (..., K), any float dtype.
        multiplier: float32 (...), one for each group; 0 marks a group whose codes are 0 by definition.
        noise: float32 (..., K) in [1, 2), or None.

    Returns:
        int8 codes (..., K), in [-127, 127].

    Examples:
        >>> codes_of(torch.tensor([[0.5, 1.5, 300.0]]), torch.tensor([1.0]))
        tensor([[  0,   2, 127]], dtype=torch.int8)

    """
    if noise is None:
        rounded = (x.float() * multiplier.unsqueeze(-1)).round()
    else:  # the factor keeps absmax itself, whose product may be rounded up, away from the code above 127
        rounded = (x.float() * (multiplier * (1 - 2.0**-22)).unsqueeze(-1) + noise).floor() - 1
    # NaN * 0 is NaN, and a NaN has no int8 value: groups with multiplier 0 are set, not computed
    return torch.where(multiplier.unsqueeze(-1) == 0, 0.0, rounded).clamp(-QMAX, QMAX).to(torch.int8)


def quantize(x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of ``x``, one dynamic scale for each.

    Args:
        x: (M, K), any float dtype.
        seed: None for rounding to nearest, else int64 (S,) with M a multiple of S: stochastic rounding, where seed s
            rounds rows ``s * M / S`` to ``(s + 1) * M / S``.

    Returns:
        int8 codes (M, K) and float32 scales (M,).

    Examples:
        >>> codes, scale = quantize(torch.tensor([[1.0, -2.0, 0.5]]))
        >>> codes.tolist(), round(scale.item(), 6)
        ([[64, -127, 32]], 0.015748)

    """
    a = absmax(x)
    return codes_of(x, multiplier_of(a), None if seed is None else noise(x.shape[0], x.shape[1], seed)), scale_of(a)


def quantize_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the rows of ``x`` at given scales: ``clamp(rint(x * (1 / scale)))``.

    Args:
        x: (M, K), any float dtype.
        scale: float32 (M,).

    Returns:
        int8 codes (M, K) and float32 scales (M,): the given ones, NaN where the row holds a NaN or an infinity.

    Examples:
        >>> codes, _ = quantize_static(torch.tensor([[1.0, -80.0]]), torch.tensor([0.5]))
        >>> codes
        tensor([[   2, -127]], dtype=torch.int8)

    """
    valid = (scale > 0) & absmax(x).isfinite()
    multiplier = torch.where(valid, torch.ones_like(scale) / torch.where(valid, scale, 1.0), 0.0)
    return codes_of(x, multiplier), torch.where(valid | (scale == 0), scale, math.nan)


def clipped(x: Tensor, scale: Tensor) -> Tensor:
    """Where ``quantize_static`` clips x (..., K) at a scale broadcastable to (...): the gradient is 0 there.

    Args:
        x: (..., K), any float dtype.
        scale: float32, broadcastable to (...).

    Returns:
        bool (..., K).

    Examples:
        >>> clipped(torch.tensor([[1.0, -80.0]]), torch.tensor([0.5]))
        tensor([[False,  True]])

    """
    return (x.float() * (torch.ones_like(scale) / scale).unsqueeze(-1)).round().abs() > QMAX


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes * scale`` in float32, then cast: ``(..., K), (...) -> (..., K)``.

    Args:
        codes: int8 (..., K).
        scale: float32 (...).
        dtype: of the result.

    Returns:
        (..., K) of that dtype.

    Examples:
        >>> dequantize(torch.tensor([[2, -127]], dtype=torch.int8), torch.tensor([0.5]))
        tensor([[  1.0000, -63.5000]])

    """
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)


def int8_mm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``((x_codes @ w_codes^T) * w_scale) * x_scale (+ bias)``, the sum over k exact.

    float64 holds every integer below 2^53, so that its matrix product of codes is exact in any order up to K = 5e11.

    Args:
        x_codes: int8 (B, M, K).
        x_scale: float32 (B, M).
        w_codes: int8 (B, N, K).
        w_scale: float32 (B, N).
        bias: (B, N), any float dtype, or None.
        dtype: of the result; cast once, at the end.

    Returns:
        (B, M, N) of that dtype.

    Examples:
        >>> xq, xs = quantize(torch.tensor([[1.0, -2.0, 0.5]]))
        >>> wq, ws = quantize(torch.tensor([[0.5, 0.25, 1.0], [1.0, 1.0, 1.0]]))
        >>> int8_mm(xq[None], xs[None], wq[None], ws[None], None, torch.float32)
        tensor([[[ 0.5079, -0.4882]]])

    """
    # through an integer: 0 * -1 is -0.0 in float64, and the sums of the contract have no sign of zero
    acc = (x_codes.double() @ w_codes.double().mT).long().float()
    y = (acc * w_scale.unsqueeze(-2)) * x_scale.unsqueeze(-1)
    return (y if bias is None else y + bias.float().unsqueeze(-2)).to(dtype)


BLOCKS = (32, 64, 128)
"""Sizes of blocks along K that may share a scale."""


def block_of(grouping: str) -> int:
    """The size of blocks that a granularity names ("block64"), or 0.

    Args:
        grouping: "row", "tensor", or "block" and a size.

    Returns:
        the size, an int; 0 for "row" and "tensor".

    Examples:
        >>> block_of("block64"), block_of("row")
        (64, 0)

    """
    return int(grouping.removeprefix("block")) if grouping.startswith("block") else 0


def by_block(x: Tensor, block: int) -> Tensor:
    """x (M, K) as the rows of its blocks (M * ceil(K / block), block), the last of each padded with zeros.

    Args:
        x: (M, K), any dtype.
        block: values that share a scale.

    Returns:
        (M * ceil(K / block), block) of that dtype.

    Examples:
        >>> by_block(torch.ones(2, 40), 32).shape
        torch.Size([4, 32])

    """
    k = x.shape[-1]
    padded = x if k % block == 0 else torch.nn.functional.pad(x, (0, -k % block))
    return padded.reshape(-1, block)


def int8_block_mm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """``sum over blocks b, in order, of ((x_b @ w_b^T) * w_scale_b) * x_scale_b (+ bias)``.

    Each sum of codes is exact, each operation after it rounded once to float32.

    Args:
        x_codes: int8 (M, K).
        x_scale: float32 (M, ceil(K / block)).
        w_codes: int8 (N, K).
        w_scale: float32 (N, ceil(K / block)).
        bias: (N,), any float dtype, or None.
        block: values that share a scale.
        dtype: of the result.

    Returns:
        (M, N) of that dtype.

    Examples:
        >>> codes, ones = torch.full((1, 64), 2, dtype=torch.int8), torch.ones(1, 2)
        >>> int8_block_mm(codes, ones, codes, ones, None, 32, torch.float32)
        tensor([[256.]])

    """
    y = torch.zeros((x_codes.shape[0], w_codes.shape[0]), dtype=torch.float32, device=x_codes.device)
    for b in range(x_scale.shape[1]):
        part = slice(b * block, (b + 1) * block)
        acc = (x_codes[:, part].double() @ w_codes[:, part].double().mT).long().float()
        y = y + (acc * w_scale[:, b]) * x_scale[:, b].unsqueeze(-1)
    return (y if bias is None else y + bias.float()).to(dtype)
