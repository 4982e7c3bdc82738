"""Codes back to floats in Triton: ``codes * scale`` in float32, cast once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.tiles import cdiv


@triton.jit
def _dequantize_kernel(codes_ptr, scale_ptr, y_ptr, M, K, stride_cm, stride_sm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    scale = tl.load(scale_ptr + rows * stride_sm, mask=rows < M, other=0.0)
    codes = tl.load(codes_ptr + rows[:, None] * stride_cm + columns[None, :], mask=mask, other=0)
    y = codes.to(tl.float32) * scale[:, None]
    tl.store(y_ptr + rows[:, None] * K + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


_launch = Launch(_dequantize_kernel)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K) floats from int8 codes (M, K), any strides, and float32 scales (M,)."""
    m, k = codes.shape
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    # the interpreter's cast to bfloat16 does not round
    inner = torch.float32 if not codes.is_cuda else dtype
    y = torch.empty((m, k), dtype=inner, device=codes.device)
    key = (codes.device.index, m, k, codes.stride(0), scale.stride(0), dtype, alignment(codes, scale))
    with on(codes.device):
        _launch(key, (cdiv(m, 16), cdiv(k, 512), 1), (codes, scale, y, m, k, codes.stride(0), scale.stride(0)),
                (16, 512), num_warps=4, enable_fp_fusion=False)  # fmt: skip
    return y.to(dtype)
