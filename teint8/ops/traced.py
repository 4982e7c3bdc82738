"""Quantization in compiled code, written in aten ops with the contract's bits, so that Inductor fuses it into what comes before it."""

import math

import torch
from torch import Tensor

from teint8 import _compilers, _torch, numerics

FUSED_ON: tuple[str, ...] = ("cuda",)
"""Devices where this is done: on a CPU the kernel in C is faster."""


def fits(x: Tensor) -> bool:
    """Whether x is traced for a compiler that is to see how it is quantized."""
    return _torch.is_compiling() and x.device.type in FUSED_ON


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # one call for Dynamo; AOTAutograd sees the ops
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``numerics.quantize`` of the rows of x (..., K): codes (..., K), scales (...).

    Divisions are in float64: Inductor's float32 division is not that of IEEE 754 on GPUs, and a float64 quotient of float32 numbers,
    rounded to float32, is the correctly rounded one (2 * 24 + 2 <= 53).
    """
    _compilers.written_once_for(torch.ops.teint8.int8_mm.default)
    x = x.detach()
    absmax = numerics.absmax(x)
    finite = absmax.isfinite()
    valid = finite & (absmax >= numerics.TINY)
    wide = torch.where(valid, absmax, 1.0).double()
    most = torch.full_like(wide, numerics.QMAX)
    multiplier = torch.where(valid, (most / wide).float(), 0.0)
    scale = torch.where(valid, (wide / most).float(), torch.where(finite, 0.0, math.nan))
    return numerics.codes_of(x, multiplier), scale
