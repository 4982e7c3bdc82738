"""The end of a matmul whose K was split: parts of integer sums, added, scaled, biased and cast."""

import triton
import triton.language as tl
from torch import Tensor

from teint8.kernels.launch import Launch, on


@triton.jit
def _finish_kernel(
    sums_ptr, xs_ptr, ws_ptr, bias_ptr, y_ptr, M, N, stride_xs, stride_ws, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    total = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums_ptr + (part * M + m) * N + n, mask=inside, other=0)
    y = (total.to(tl.float32) * tl.load(ws_ptr + n * stride_ws, mask=inside, other=0.0)) * tl.load(xs_ptr + m * stride_xs)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


_launch = Launch(_finish_kernel)


def finish(sums: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y (M, N) from int32 parts of sums (S, M, N), scales (M,) and (N,), bias (N,) or None."""
    parts, m, n = sums.shape
    b = ws if bias is None else bias.contiguous()
    key = (sums.device.index, parts, m, n, xs.stride(0), ws.stride(0), None if bias is None else b.dtype, y.dtype,
           tuple(t.data_ptr() % 16 == 0 for t in (sums, xs, ws, b, y)))  # fmt: skip
    with on(sums.device):
        _launch(key, (-(-n // 512), m, 1), (sums, xs, ws, b, y, m, n, xs.stride(0), ws.stride(0)),
                (parts, bias is not None, 512), num_warps=2, enable_fp_fusion=False)  # fmt: skip
    return y
