"""CPU implementations of convolutions: windows and depthwise products in C, where a compiler is at hand."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from teint8.kernels import cpu_rows
from teint8.ops import registry
from teint8.ops.cpu import results
from teint8.ops.raw_conv import Window
from teint8.ops.registry import Problem, register

_TAPS = 4096
_CHUNK = 1 << 23  # bytes of what windows see that are made at once


def _in_two(sizes: tuple[int, ...], fill: int) -> tuple[int, int]:
    """Numbers for two dimensions, of one or two."""
    return (fill, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


class _Flat(NamedTuple):
    """A convolution as one of images: spatial sizes of the result as they are, and in two dimensions with those of the kernel."""

    out: tuple[int, ...]
    size: tuple[int, int]
    kernel: tuple[int, int]
    where: tuple[tuple[int, int], ...]


@functools.lru_cache(4096)
def _flat(sizes: tuple[int, ...], kernel: tuple[int, ...], window: Window) -> _Flat:
    """Worked out once for each: for a small image it takes as long as its convolution."""
    out = window.out(sizes, kernel)
    where = _in_two(window.stride, 1), _in_two(window.padding[::2], 0), _in_two(window.dilation, 1)
    return _Flat(out, _in_two(out, 1), _in_two(kernel, 1), where)


def _in_images(xq: Tensor) -> Tensor:
    """Codes (B, H, W, C), contiguous."""
    return (xq.unsqueeze(1) if xq.ndim == 3 else xq).contiguous()


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def _conv_c(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, window: Window, dtype: torch.dtype) -> Tensor:
    """What windows see as rows of codes, some samples at a time, by the best matmul."""
    flat = _flat(xq.shape[1:-1], wq.shape[1:-1], window)
    x, n = _in_images(xq), wq.shape[0]
    w = wq.reshape(n, -1)
    pixels, batch, k = flat.size[0] * flat.size[1], x.shape[0], w.shape[1]
    each = max(_CHUNK // (pixels * k), 1)
    parts = []
    for i in range(0, batch, each):
        some, scales = (x, xs) if each >= batch else (x[i : i + each], xs[i : i + each])
        rows = torch.empty(some.shape[0] * pixels, k, dtype=torch.int8, device="cpu")
        cpu_rows.windows(some, rows, flat.kernel, flat.size, *flat.where)
        scales = scales.expand(-1, pixels).reshape(-1)
        best = registry.select("int8_mm", Problem("cpu", dtype, 1, rows.shape[0], n, k))
        if best.flat:
            parts.append(best.run(rows, scales, w, ws, bias, dtype))
        else:
            b = None if bias is None else bias.unsqueeze(0)
            parts.append(best.run(rows.unsqueeze(0), scales.unsqueeze(0), w.unsqueeze(0), ws.unsqueeze(0), b, dtype).squeeze(0))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(batch, *flat.out, n)


def _grouped_c(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, window: Window, dtype: torch.dtype) -> Tensor:
    """One group after the other."""
    g = window.groups
    c, n = xq.shape[-1] // g, wq.shape[0] // g
    y = torch.empty(xq.shape[0], *window.out(xq.shape[1:-1], wq.shape[1:-1]), g * n, dtype=dtype, device="cpu")
    alone = window._replace(groups=1)
    for i in range(g):
        channels, kernels, scale = slice(i * c, (i + 1) * c), slice(i * n, (i + 1) * n), i * xs.shape[1] // g
        b = None if bias is None else bias[kernels]
        y[..., kernels] = _conv_c(xq[..., channels], xs[:, scale : scale + 1], wq[kernels], ws[kernels], b, alone, dtype)
    return y


def _depthwise(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, window: Window, dtype: torch.dtype) -> Tensor:
    """A kernel for each channel."""
    flat = _flat(xq.shape[1:-1], wq.shape[1:-1], window)
    x, channels = _in_images(xq), wq.shape[0]
    made = results(x.shape[0] * math.prod(flat.out), channels, dtype).view(x.shape[0], *flat.size, channels)
    taps = wq.reshape(channels, -1).t().contiguous()
    scales = xs.repeat_interleave(channels // xs.shape[1], 1)
    cpu_rows.depthwise(x, scales, taps, ws.contiguous(), _float32(bias), made, flat.kernel, *flat.where)
    return made.view(x.shape[0], *flat.out, channels)


def _channels(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.stride(2) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scales = torch.empty(x.shape[0], x.shape[2], dtype=torch.float32, device="cpu")
    cpu_rows.channels(x, codes, scales)
    return codes, scales


def _why_not(problem: Problem) -> str | None:
    return f"it has no {problem.dtype}" if problem.dtype not in cpu_rows.DTYPES else cpu_rows.why_not()


def _flat_why_not(problem: Problem) -> str | None:
    return "it is for one or two spatial dimensions" if problem.extra[0] > 2 else _why_not(problem)


def _conv_why_not(problem: Problem) -> str | None:
    return f"the channels are in {problem.batch} groups" if problem.batch > 1 else _flat_why_not(problem)


def _grouped_why_not(problem: Problem) -> str | None:
    return "there is one group" if problem.batch == 1 else _flat_why_not(problem)


def _depthwise_why_not(problem: Problem) -> str | None:
    if problem.batch == 1 or problem.n > 1 or problem.extra[1] > 1:
        return "it is for one channel in each group"
    # a window's taps are held on the stack: a gradient's is the whole image
    return f"a kernel has {problem.k} taps; it is for up to {_TAPS}" if problem.k > _TAPS else _flat_why_not(problem)


def register_all() -> None:
    """Register the CPU's convolutions."""
    register("conv", "cpu-c", _conv_c, device="cpu", priority=20, why_not=_conv_why_not)
    register("conv", "cpu-c-grouped", _grouped_c, device="cpu", priority=15, why_not=_grouped_why_not)
    register("conv", "cpu-depthwise", _depthwise, device="cpu", priority=20, why_not=_depthwise_why_not)
    register("quantize_channels", "cpu-c", _channels, device="cpu", priority=20, why_not=_why_not)
