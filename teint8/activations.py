"""Activation functions with one float32 form each, in plain torch: the text that the fused kernels are tested against, bit for bit.

``exp`` and ``tanh`` of a library round as they like, and another library rounds otherwise. Here they are polynomials of IEEE
multiplications, additions and fused multiply-adds, so that a fused kernel, an unfused one and the CPU agree in every bit. The
relative error of the sigmoid is below 5e-6, a thousandth of an INT8 step; results are rounded once, to the dtype of the input.

Kinds: ``silu`` x * sigmoid(x); ``gelu`` x * Phi(x) with the error function of Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7);
``gelu_tanh`` its tanh form (Hendrycks and Gimpel, 2016). Each can be gated: ``act(g) * u`` (Shazeer, 2020: SwiGLU, GeGLU).
"""

import torch
from torch import Tensor

KINDS = ("silu", "gelu", "gelu_tanh")

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
_LOG2E = 1.4426950408889634
_EXP2 = (0.009582852944731712, 0.055906426161527634, 0.24024099111557007, 0.6931241750717163, 1.0)  # of 2^f, |f| <= 1 / 2
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_TANH = 1.5957691216057308  # 2 * sqrt(2 / pi)
_CUBE = 0.044715
_FLAT = 64.0  # beyond this gelu_tanh is 0 or x in every bit: its square must not overflow to inf * 0


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` in float32, rounded once, as the hardware's fused multiply-add; float32 tensors of one shape, or numbers."""
    product, c = a.double() * _as_float32(b), _as_float32(c)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    # float64 rounded once; rounding to odd here makes the second rounding, to float32, the only one that counts
    bits = total.view(torch.int64)
    up = (error > 0) == (total > 0)
    odd = torch.where((error != 0) & (bits % 2 == 0), torch.where(up, bits + 1, bits - 1), bits)
    return torch.where(total.isfinite(), odd.view(torch.float64), total).float()


def _as_float32(x: Tensor | float) -> Tensor | float:
    return x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32, device="cpu").item()


def exp_negative(x: Tensor) -> Tensor:
    """``exp(-x)`` for float32 x in [-86, 86], outside of which x is clamped; NaN gives a NaN."""
    x = x.clamp(-86.0, 86.0)
    shifted = fma(x, -_LOG2E, _MAGIC)
    fraction = fma(x, -_LOG2E, -(shifted - _MAGIC))
    p = torch.full_like(x, _EXP2[0])
    for coefficient in _EXP2[1:]:
        p = fma(p, fraction, coefficient)
    # the integer part goes to the exponent; what is above its 8 bits falls off, as in int32 arithmetic
    exponent = (shifted.view(torch.int32).long() << 23) & 0xFFFFFFFF
    bits = (p.view(torch.int32).long() + exponent) & 0xFFFFFFFF
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    return torch.where(x.isnan(), x, bits.int().view(torch.float32))


def reciprocal(d: Tensor) -> Tensor:
    """``1 / d``, one IEEE division: float32 d in [1, 2^125]."""
    return torch.ones_like(d) / d


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` of a float32 tensor.

    Examples:
        >>> sigmoid(torch.tensor([0.0, 3.0]))
        tensor([0.5000, 0.9526])

    """
    return reciprocal(1.0 + exp_negative(x))


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = sigmoid(x)
    z = x * s
    return z, fma(z, 1.0 - s, s)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    half_square = (x * x) * 0.5
    e = exp_negative(half_square)
    t = reciprocal(fma(x.abs(), 0.3275911 * 0.7071067811865476, 1.0))
    p = torch.full_like(x, _ERFC[0])
    for coefficient in _ERFC[1:]:
        p = fma(p, t, coefficient)
    tail = ((p * t) * e) * 0.5
    cdf = torch.where(x < 0, tail, 1.0 - tail)
    return x * cdf, fma(x, e * 0.3989422804014327, cdf)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    square = x.clamp(-_FLAT, _FLAT).square()
    s = sigmoid((x * fma(square, _CUBE, 1.0)) * _TANH)
    z = x * s
    slope = fma(square, 3 * _CUBE, 1.0) * _TANH
    return z, fma(z * (1.0 - s), slope, s)


_FORMS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


def value(kind: str, g: Tensor, u: Tensor | None = None) -> Tensor:
    """``act(g)`` or ``act(g) * u`` in float32, cast once to the dtype of g.

    Args:
        kind: one of KINDS.
        g: any shape, any float dtype.
        u: the same, or None.

    Examples:
        >>> value("silu", torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([1.4621])

    """
    z = _FORMS[kind](g.float())[0]
    return (z if u is None else z * u.float()).to(g.dtype)


def gradient(kind: str, g: Tensor, u: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients by g and u of ``value``, given d, that of its result: ``(d * u) * act'(g)`` and ``d * act(g)``, each cast once.

    Examples:
        >>> gradient("silu", torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([1.0]))
        (tensor([1.]), tensor([0.]))

    """
    z, slope = _FORMS[kind](g.float())
    d = d.float()
    if u is None:
        return (d * slope).to(g.dtype), None
    return ((d * u.float()) * slope).to(g.dtype), (d * z).to(u.dtype)
