"""Norms with one float32 form, in plain torch: the text that the fused kernels are tested against, bit for bit.

A float sum depends on its order, and every kernel has its own. Here a row is scaled by a power of two, its terms are cut to multiples
of 2^-30, and those are added as integers, which is exact in any order. What that cuts off is below 1e-9 of the largest term, so that
the relative error of the mean square of a row of N values is below N * 4e-9; everything else is IEEE operations, each rounded once.

    p(x)     = 2^floor(log2 max |x|)                     what is divided by it is below 2
    M(t)     = (sum of trunc(t * 2^30)) / N * 2^-30      for |t| < 1
    c        = x - M(x / 2p(x)) * 2p(x)                  LayerNorm; x itself for RMSNorm
    variance = M((c / 2p(c))^2) * (2p(c))^2
    y        = c * (1 / sqrt(variance + eps)) * weight (+ bias)

Kinds: ``rms`` (Zhang and Sennrich, 2019), ``layer`` (Ba et al., 2016). Of channels: GroupNorm (Wu and He, 2018), where a row is a
group of them, InstanceNorm (Ulyanov et al., 2016), where it is one; BatchNorm (Ioffe and Szegedy, 2015) in inference, whose mean and
variance are given.
"""

import torch
from torch import Tensor

from teint8 import numerics

KINDS = ("rms", "layer")

_ONE = 2.0**30


def _mean(t: Tensor) -> Tensor:
    """Mean of the last dimension of float32 t in [-1, 1], in fixed point."""
    total = (t * _ONE).to(torch.int32).sum(-1, dtype=torch.int64).float()
    return (total / torch.full_like(total, t.shape[-1])) * (1 / _ONE)


def _power(c: Tensor) -> Tensor:
    """The power of two at or below the absmax of finite rows; 1 where that is below 2^-100."""
    top = numerics.absmax(c)
    power = (top.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(top >= numerics.TINY, power, 1.0)


def value(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of the rows of x (..., K), cast once to its dtype; NaN in a whole row that holds a NaN or an infinity.

    Args:
        kind: one of KINDS.
        x: any float dtype.
        weight, bias: (K,), any float dtype, or None.
        eps: added to the variance.

    Examples:
        >>> value("rms", torch.tensor([[3.0, 4.0]]), None, None, 0.0)
        tensor([[0.8485, 1.1314]])

    """
    y = _normalized(kind, x, eps)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _normalized(kind: str, x: Tensor, eps: float) -> Tensor:
    """The norm before weight and bias, in float32."""
    c = x.float()
    finite = numerics.absmax(c).isfinite()
    c = torch.where(finite.unsqueeze(-1), c, 0.0)
    power = _power(c)
    if kind == "layer":
        c = c - ((_mean(c * (torch.full_like(power, 0.5) / power).unsqueeze(-1)) * 2.0) * power).unsqueeze(-1)
        power = _power(c)
    t = c * (torch.full_like(power, 0.5) / power).unsqueeze(-1)
    variance = ((_mean(t * t) * 4.0) * power) * power
    return c * torch.where(finite, _inverse_root(variance, eps), torch.nan).unsqueeze(-1)


def _inverse_root(variance: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(variance + eps)``, each rounded once: through float64, for torch's float32 square root on CPUs is not."""
    root = (variance + torch.full_like(variance, eps)).double().sqrt().float()
    return torch.ones_like(root) / root


def of_channels(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    groups: int = 1,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x (B, C, ...), cast once to its dtype; given mean and variance BatchNorm in inference.

    NaN in a whole group that holds a NaN or an infinity; where mean and variance are given, in those elements alone.

    Args:
        x: any float dtype.
        weight, bias: (C,), any float dtype, or None.
        eps: added to the variance.
        groups: into how many C is divided.
        mean, variance: (C,), any float dtype, or None.

    Examples:
        >>> of_channels(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), None, None, 0.0, groups=2)
        tensor([[[-1.,  1.],
                 [-1.,  1.]]])

    """

    def each(t: Tensor) -> Tensor:
        return t.float().view(-1, *[1] * (x.ndim - 2))

    if mean is None or variance is None:
        y = _normalized("layer", x.reshape(x.shape[0], groups, -1), eps).reshape(x.shape)
    else:
        y = (x.float() - each(mean)) * each(_inverse_root(variance.float(), eps))
    y = y if weight is None else y * each(weight)
    return (y if bias is None else y + each(bias)).to(x.dtype)
