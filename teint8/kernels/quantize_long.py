"""Quantization of few, long rows (the samples of a convolution): many programs a row, in two reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.quantize import code_bits, scale_and_multiplier

BLOCK, SPAN = 4096, 4
"""Values that a program holds at once, and how often it does so for the largest."""


@triton.jit
def _tops_kernel(x_ptr, tops_ptr, N, stride_xm, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """The bits of absmax of rows, NaN above infinity, above all numbers; ``tops`` are 0 before."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK * SPAN + tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(SPAN):
        x = tl.load(x_ptr + m * stride_xm + n + i * BLOCK, mask=n + i * BLOCK < N, other=0.0).to(tl.float32)
        tops = tl.maximum(tops, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(tops_ptr + m, tl.max(tops, 0), sem="relaxed")


@triton.jit
def _known_kernel(x_ptr, tops_ptr, codes_ptr, scale_ptr, N, stride_xm, BLOCK: tl.constexpr):
    """Codes of rows whose absmax is known."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale, multiplier = scale_and_multiplier(tl.load(tops_ptr + m + tl.arange(0, 1)))
    x = tl.load(x_ptr + m * stride_xm + n, mask=n < N, other=0.0).to(tl.float32)
    q = tl.where(multiplier != 0, code_bits(x, multiplier, x, False), 0)
    tl.store(codes_ptr + m * N + n, q.to(tl.int8), mask=n < N)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + m + tl.arange(0, 1), scale)


_tops = Launch(_tops_kernel)
_known = Launch(_known_kernel)


def quantize_known(x: Tensor, tops: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Codes (M, N) and scales (M,) of x (M, N), rows dense, given the bits of absmax of its rows, int32 (M,)."""
    m, n = x.shape
    codes = torch.empty((m, n), dtype=torch.int8, device=x.device)
    scale = torch.empty((m,), dtype=torch.float32, device=x.device)
    stride = x.stride(0)
    with on(x.device):
        _known((x.device.index, m, n, x.dtype, stride, block, alignment(x, tops)), (-(-n // block), m, 1),
               (x, tops, codes, scale, n, stride), (block,), num_warps=4, enable_fp_fusion=False)  # fmt: skip
    return codes, scale


def quantize_long(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M, N) and scales (M,) of x (M, N), rounded to nearest."""
    x = x.float() if x.dtype == torch.float64 else x
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = x.shape
    tops = torch.zeros((m,), dtype=torch.int32, device=x.device)
    with on(x.device):
        _tops((x.device.index, m, n, x.dtype, x.stride(0), alignment(x)), (-(-n // (BLOCK * SPAN)), m, 1),
              (x, tops, n, x.stride(0)), (BLOCK, SPAN), num_warps=8)  # fmt: skip
    return quantize_known(x, tops, BLOCK)
