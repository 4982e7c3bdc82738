"""How convolutions are laid out: channels last, in codes; transposed ones as plain ones over inputs with zeros in between."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from teint8.ops.raw import quantize
from teint8.ops.raw_conv import Window, quantize_channels
from teint8.qtensor import QTensor

Codes = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """What a convolution is, but for its tensors: the arguments of ``torch.convolution``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def window(self, kernel: Sequence[int]) -> Window:
        """The window of the plain convolution that it comes to; over an input with zeros in between where it is transposed."""
        if not self.transposed:
            return Window(self.stride, tuple(p for p in self.padding for _ in range(2)), self.dilation, self.groups)
        before = [d * (k - 1) - p for k, p, d in zip(kernel, self.padding, self.dilation, strict=True)]
        sides = zip(before, self.output_padding, strict=True)
        return Window((1,) * len(before), tuple(p for b, more in sides for p in (b, b + more)), self.dilation, self.groups)

    def out(self, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the result."""
        if self.transposed:
            sizes = [(s - 1) * step + 1 for s, step in zip(sizes, self.stride, strict=True)]
        return self.window(kernel).out(sizes, kernel)

    def adjoint(self, sizes: Sequence[int], outs: Sequence[int], kernel: Sequence[int]) -> tuple[bool, Window]:
        """Whether the gradient of a result goes back to inputs of these sizes by a transposed convolution, and by which window."""
        padding: list[int] = []
        for s, o, k, step, p, d in zip(sizes, outs, kernel, self.stride, self.padding, self.dilation, strict=True):
            if self.transposed:
                padding += [p, (s - 1) * step + d * (k - 1) + 1 - o - p]
            else:
                before = d * (k - 1) - p
                padding += [before, s + d * (k - 1) - (o - 1) * step - 1 - before]
        steps = self.stride if self.transposed else (1,) * len(self.stride)
        return not self.transposed, Window(steps, tuple(padding), self.dilation, self.groups)


def kernel_rows(w: Tensor, transposed: bool, groups: int) -> Tensor:
    """A weight, or its codes, as (N, *kernel, C / groups): the kernels of a plain convolution, turned around of a transposed one.

    Args:
        w: (N, C / groups, *kernel), or (C, N / groups, *kernel) of a transposed convolution.

    """
    if transposed:
        c, n, *kernel = w.shape
        w = w.reshape(groups, c // groups, n, *kernel).transpose(1, 2).reshape(groups * n, c // groups, *kernel)
        w = w.flip(list(range(2, w.ndim)))
    return w.movedim(1, -1)


def from_rows(rows: Tensor, transposed: bool, groups: int) -> Tensor:
    """The weight's own layout again."""
    w = rows.movedim(-1, 1)
    if transposed:
        n, c, *kernel = w.flip(list(range(2, w.ndim))).shape
        w = w.flip(list(range(2, w.ndim))).reshape(groups, n // groups, c, *kernel)
        w = w.transpose(1, 2).reshape(groups * c, n // groups, *kernel)
    return w


def kernel_codes(w: Tensor, granularity: str, transposed: bool, groups: int, impl: str = "") -> Codes:
    """Codes (N, *kernel, C / groups) and scales (N) of a float weight."""
    rows = kernel_rows(w.detach(), transposed, groups)
    whole = rows.ndim if granularity == "tensor" else rows.ndim - 1
    codes, scale = quantize(rows, group_dims=whole, impl=impl)
    return codes, _first(scale, 1)


def _first(scales: Tensor, kept: int) -> Tensor:
    """The first along all but some dimensions in front: scales that are one, expanded."""
    while scales.ndim > kept:
        scales = scales.select(-1, 0)
    return scales


def packed_kernel(w: Tensor, granularity: str, transposed: bool) -> QTensor:
    """A QTensor of a weight whose convolution has no groups, if it is transposed."""
    codes, scale = kernel_codes(w, granularity, transposed, 1)
    return QTensor(
        from_rows(codes, transposed, 1),  # channels last in memory, as they are read
        from_rows(scale.reshape(-1, *[1] * (w.ndim - 1)), transposed, 1).contiguous(),
        None,
        w.dtype,
        contracted(w.ndim, transposed),
    )


def contracted(ndim: int, transposed: bool) -> tuple[int, ...]:
    """The dimensions of a weight that a convolution sums over, counted from the end.

    Examples:
        >>> contracted(4, False), contracted(4, True)
        ((-3, -2, -1), (-4, -2, -1))

    """
    return tuple(i - ndim for i in range(ndim) if i != (1 if transposed else 0))


def activation_codes(x: Tensor, activation: str, scale: Tensor | None, groups: int, impl: str, seed: Tensor | None = None) -> Codes:
    """Codes (B, *S, C) and scales (B, V) of x (B, C, *S): V is the number of groups, or 1 where one scale is for all."""
    if activation == "tensor" or scale is not None or groups == 1:
        last = x.detach().movedim(1, -1)
        whole = last.ndim if activation == "tensor" else last.ndim - 1
        codes, scales = quantize(last, seed=seed, scale=scale, group_dims=whole, impl=impl)
        return codes, _first(scales, 1).unsqueeze(1)
    if groups == x.shape[1] and seed is None:
        return quantize_channels(x.detach().movedim(1, -1), impl)
    last = x.detach().unflatten(1, (groups, -1)).movedim(2, -1)
    codes, scales = quantize(last, seed=seed, group_dims=last.ndim - 2, impl=impl)
    return codes.movedim(1, -2).flatten(-2), _first(scales, 2)


def by_channel(x: Tensor, seed: Tensor | None, impl: str) -> Codes:
    """Codes (C, *S, B) and scales (C) of x (B, C, *S)."""
    last = x.detach().movedim(1, 0).movedim(1, -1)
    codes, scales = quantize(last, seed=seed, group_dims=last.ndim - 1, impl=impl)
    return codes, _first(scales, 1)


def spread(codes: Tensor, stride: Sequence[int]) -> Tensor:
    """Codes (B, *S, C) with zeros in between."""
    if all(step == 1 for step in stride):
        return codes
    sizes = [max((s - 1) * step + 1, 0) for s, step in zip(codes.shape[1:-1], stride, strict=True)]
    wide = codes.new_zeros((codes.shape[0], *sizes, codes.shape[-1]))
    wide[(slice(None), *(slice(None, None, step) for step in stride))] = codes
    return wide
