"""The raw op ``int8_conv``: a convolution of codes whose channels come last. It has no derivative; those are in ``ops/conv.py``."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8 import numerics
from teint8.ops import registry
from teint8.ops.raw import DTYPES, NAMES, direct, front
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define(
    "int8_conv(Tensor x_codes, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, str dtype, str impl) -> Tensor"
)


class Window(NamedTuple):
    """How a kernel moves over its input, for each spatial dimension.

    Attributes:
        stride, dilation: one number each.
        padding: zeros before and behind, two numbers each: before and behind the first dimension, then the second; a negative number
            cuts off.
        groups: how many parts the channels are in, each with kernels of its own.

    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out(self, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the result."""
        each = zip(sizes, kernel, self.stride, self.padding[::2], self.padding[1::2], self.dilation, strict=True)
        return tuple((s + before + behind - d * (k - 1) - 1) // step + 1 for s, k, step, before, behind, d in each)


_library.define("quantize_channels(Tensor x, str impl) -> (Tensor, Tensor)")


def quantize_channels(x: Tensor, impl: str = "") -> tuple[Tensor, Tensor]:
    """Codes (B, *S, C), contiguous, and scales (B, C) of x (B, *S, C): each channel of a sample has a scale; no gradient flows.

    Examples:
        >>> codes, scale = quantize_channels(torch.tensor([[[1.0, 4.0], [2.0, 1.0]]]))
        >>> codes.tolist()
        [[[64, 127], [127, 32]]]

    """
    op = _quantize_channels if direct(x) else torch.ops.teint8.quantize_channels
    codes, scales = op(x, impl)
    return codes, scales


def _quantize_channels(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[0], x.shape[-1]
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_zeros((batch, channels), dtype=torch.float32)
    flat = x.detach().reshape(batch, -1, channels)
    problem = Problem(x.device.type, x.dtype, 1, batch, flat.shape[1], channels)
    codes, scales = registry.select("quantize_channels", problem, impl).run(flat)
    return codes.view(x.shape), scales


def _channels_by(quantize: Any) -> Any:
    """Each channel as a row, which ``quantize`` quantizes as it is registered."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.mT.reshape(-1, x.shape[1])
        codes, scales = quantize(rows, None, None)
        return codes.view(x.mT.shape).mT.contiguous(), scales.view(x.shape[0], x.shape[2])

    return run


def _best_quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None) -> Any:
    return registry.select("quantize", Problem(x.device.type, x.dtype, 1, x.shape[0], 0, x.shape[1])).run(x, seed, scale)


registry.register("quantize_channels", "reference", _channels_by(lambda x, seed, scale: numerics.quantize(x)))
registry.register("quantize_channels", "composed", _channels_by(_best_quantize), priority=5)
_library.impl("quantize_channels", _quantize_channels, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::quantize_channels", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_channels_fake(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], x.shape[-1]), dtype=torch.float32)


@torch.library.register_vmap("teint8::quantize_channels", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_channels_vmap(info: Any, in_dims: Any, x: Tensor, impl: str) -> Any:
    x = x.movedim(in_dims[0], 0)
    codes, scales = torch.ops.teint8.quantize_channels(x.flatten(0, 1), impl)
    return (codes.view(x.shape), scales.view(*x.shape[:2], x.shape[-1])), (0, 0)


def int8_conv(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    window: Window,
    dtype: torch.dtype,
    impl: str = "",
) -> Tensor:
    """``(sum * w_scale) * x_scale (+ bias)`` of every window, the sum exact, cast to ``dtype``; no gradient flows.

    Args:
        x_codes: int8 (B, *S, C), one to three spatial dimensions S.
        x_scale: float32 (B, V): each of V equal parts of the channels has a scale; V divides the number of groups.
        w_codes: int8 (N, *kernel, C / groups).
        w_scale: float32 (N).
        bias: (N), any float dtype, or None.
        window: stride, padding, dilation and groups.
        dtype: float dtype of the result.
        impl: name of an implementation, "" for the best.

    Returns:
        (B, *S', N).

    Examples:
        >>> from teint8.ops import quantize
        >>> codes, scale = quantize(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> x, w = codes.view(1, 3, 1), codes[:, :2].reshape(1, 2, 1)
        >>> int8_conv(x, scale.view(1, 1), w, scale, None, Window((1,), (0, 0), (1,)), torch.float32).flatten()
        tensor([5.0159, 8.0157])

    """
    where = (list(window.stride), list(window.padding), list(window.dilation), window.groups)
    if direct(x_codes, x_scale, w_codes, w_scale, bias):
        return _int8_conv(x_codes, x_scale, w_codes, w_scale, bias, *where, NAMES[dtype], impl)
    y: Tensor = torch.ops.teint8.int8_conv(x_codes, x_scale, w_codes, w_scale, bias, *where, NAMES[dtype], impl)
    return y


@functools.lru_cache(4096)
def problem_of(x_shape: Sequence[Any], w_shape: Sequence[Any], window: Window, device: str, dtype: torch.dtype) -> Problem:
    """The Problem that a convolution poses: rows are windows, ``batch`` is the number of groups."""
    out = window.out(x_shape[1:-1], w_shape[1:-1])
    sizes = (x_shape[0] * math.prod(out), w_shape[0] // window.groups, math.prod(w_shape[1:]))
    return Problem(device, dtype, window.groups, *sizes, (len(out), w_shape[-1]))


def padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    """x (B, *S, C) with zeros around S, or less of it."""
    if not any(padding):
        return x
    pairs = [(padding[2 * i], padding[2 * i + 1]) for i in range(len(padding) // 2)]
    grow = [max(p, 0) for pair in reversed(pairs) for p in pair]
    x = torch.nn.functional.pad(x, [0, 0, *grow]) if any(grow) else x
    for i, (before, behind) in enumerate(pairs, 1):
        x = x.narrow(i, -min(before, 0), x.shape[i] + min(before, 0) + min(behind, 0))
    return x


def patches(x: Tensor, kernel: Sequence[int], window: Window) -> Tensor:
    """What each window sees: (B, *S', *kernel, C), a view of the padded input."""
    x = padded(x, window.padding)
    out = Window(window.stride, (0,) * len(window.padding), window.dilation).out(x.shape[1:-1], kernel)
    steps = [s * step for s, step in zip(x.stride()[1:-1], window.stride, strict=True)]
    holes = [s * d for s, d in zip(x.stride()[1:-1], window.dilation, strict=True)]
    return x.as_strided((x.shape[0], *out, *kernel, x.shape[-1]), (x.stride(0), *steps, *holes, x.stride(-1)))


def by_patches(multiply: Any) -> Any:
    """A convolution as the matmul of what each window sees, which ``multiply`` does as ``int8_mm`` is registered."""

    def run(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, window: Window, dtype: torch.dtype) -> Tensor:
        n, *kernel, _ = wq.shape
        g, nd = window.groups, len(kernel)
        seen = patches(xq, kernel, window)
        out = seen.shape[: nd + 1]
        m, k = out.numel(), wq[0].numel()
        rows = seen.reshape(*out, *kernel, g, -1).movedim(-2, 0).reshape(g, m, k)
        scales = xs.repeat_interleave(g // xs.shape[1], 1).t()  # (G, B)
        scales = scales.unsqueeze(-1).expand(-1, -1, m // max(xs.shape[0], 1)).reshape(g, m)
        b = None if bias is None else bias.reshape(g, n // g)
        y: Tensor = multiply(rows, scales, wq.reshape(g, n // g, k), ws.reshape(g, n // g), b, dtype)
        return y.squeeze(0).view(*out, n) if g == 1 else y.movedim(0, 1).reshape(*out, n)

    return run


def _best_mm(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    batch, m, k = xq.shape
    y: Tensor = registry.select("int8_mm", Problem(xq.device.type, dtype, batch, m, wq.shape[1], k)).run(xq, xs, wq, ws, bias, dtype)
    return y


def _reference(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, window: Window, dtype: torch.dtype) -> Tensor:
    """torch's convolution in float64, which holds the integer sums exactly in any order."""
    x, w = padded(xq, window.padding).double().movedim(-1, 1), wq.double().movedim(-1, 1)
    nd = len(window.stride)
    zeros = [0] * nd
    sums = torch.ops.aten.convolution(x, w, None, window.stride, zeros, window.dilation, False, zeros, window.groups)
    acc = sums.movedim(1, -1).round().long().float()
    scales = xs.repeat_interleave(wq.shape[0] // xs.shape[1], 1).view(-1, *[1] * nd, wq.shape[0])
    y = (acc * ws) * scales
    return (y if bias is None else y + bias.float()).to(dtype)  # type: ignore[no-any-return]


registry.register("conv", "reference", _reference)
registry.register("conv", "patches", by_patches(_best_mm), priority=5)


def _int8_conv(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
    impl: str,
) -> Tensor:
    window = Window(tuple(stride), tuple(padding), tuple(dilation), groups)
    out = (x_codes.shape[0], *window.out(x_codes.shape[1:-1], w_codes.shape[1:-1]), w_codes.shape[0])
    b = None if bias is None else bias.detach()
    if 0 in out or 0 in w_codes.shape:
        scales = x_scale.repeat_interleave(max(out[-1] // max(x_scale.shape[1], 1), 1), 1)[:, : out[-1]]
        zeros = torch.zeros(out, dtype=torch.float32, device=x_codes.device) * scales.view(out[0], *[1] * len(stride), out[-1])
        return (zeros if b is None else zeros + b.float()).to(DTYPES[dtype])
    problem = problem_of(x_codes.shape, w_codes.shape, window, x_codes.device.type, DTYPES[dtype])
    y: Tensor = registry.select("conv", problem, impl).run(x_codes, x_scale, w_codes, w_scale, b, window, DTYPES[dtype])
    return y.contiguous()


_library.impl("int8_conv", _int8_conv, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::int8_conv", lib=_library)  # type: ignore[untyped-decorator]
def _int8_conv_fake(
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    dtype: str,
    impl: str,
) -> Tensor:
    out = Window(tuple(stride), tuple(padding), tuple(dilation), groups).out(xq.shape[1:-1], wq.shape[1:-1])
    return xq.new_empty((xq.shape[0], *out, wq.shape[0]), dtype=DTYPES[dtype])


@torch.library.register_vmap("teint8::int8_conv", lib=_library)  # type: ignore[untyped-decorator]
def _int8_conv_vmap(
    info: Any,
    in_dims: Any,
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    dtype: str,
    impl: str,
) -> Any:
    size = info.batch_size
    xq, xs = front(xq, in_dims[0], size), front(xs, in_dims[1], size)
    where = (stride, padding, dilation)
    if in_dims[2:5] == (None, None, None):  # the mapped dimension folds into the samples
        y = torch.ops.teint8.int8_conv(xq.flatten(0, 1), xs.flatten(0, 1), wq, ws, bias, *where, groups, dtype, impl)
        return y.unflatten(0, (size, xq.shape[1])), 0
    wq, ws = front(wq, in_dims[2], size), front(ws, in_dims[3], size)
    b = None if bias is None else front(bias, in_dims[4], size).reshape(-1)
    if in_dims[:2] == (None, None) and groups == 1:  # kernels differ, and not what they see: they are channels of one
        y = torch.ops.teint8.int8_conv(xq[0], xs[0], wq.flatten(0, 1), ws.flatten(), b, *where, 1, dtype, impl)
        return y.unflatten(-1, (size, wq.shape[1])), y.ndim - 1
    # it folds into the groups
    x = xq.movedim(0, -2).flatten(-2)
    y = torch.ops.teint8.int8_conv(
        x, xs.movedim(0, 1).flatten(1), wq.flatten(0, 1), ws.flatten(), b, *where, groups * size, dtype, impl
    )
    return y.unflatten(-1, (size, wq.shape[1])), y.ndim - 1
