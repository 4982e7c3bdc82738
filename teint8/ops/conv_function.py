"""The derivatives of INT8 convolutions, transposed ones too, by the straight-through estimator: in float or in INT8.

Channels come last inside, so that what a window sees lies together: an activation (B, C, *S) has codes (B, *S, C) and a scale for
each sample and group, a weight (N, C / groups, *kernel) has codes (N, *kernel, C / groups) and a scale for each output channel. A
transposed convolution is a plain one over its input with zeros in between, and so is the gradient of a convolution by its input; that
by the weight is one in which channels and samples change places.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.ops.linear import differentiates, keeps
from teint8.ops.raw import quantize
from teint8.ops.raw_conv import Window, int8_conv, quantize_channels
from teint8.ops.straight import hat, no_second_derivative, unclipped
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


class _How(NamedTuple):
    """What is not a tensor; ``keep`` as for the linear."""

    shape: Shape
    dtype: torch.dtype
    gradient: str
    wgrad: str
    impl: str
    keep: bool


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


def _from_rows(rows: Tensor, transposed: bool, groups: int) -> Tensor:
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
        _from_rows(codes, transposed, 1),  # channels last in memory, as they are read
        _from_rows(scale.reshape(-1, *[1] * (w.ndim - 1)), transposed, 1).contiguous(),
        None,
        w.dtype,
        contracted(w.ndim, transposed),
    )


def contracted(ndim: int, transposed: bool) -> tuple[int, ...]:
    """The dimensions of a weight that a convolution sums over, counted from the end.

    Example:
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


def _by_channel(x: Tensor, seed: Tensor | None, impl: str) -> Codes:
    """Codes (C, *S, B) and scales (C) of x (B, C, *S)."""
    last = x.detach().movedim(1, 0).movedim(1, -1)
    codes, scales = quantize(last, seed=seed, group_dims=last.ndim - 1, impl=impl)
    return codes, _first(scales, 1)


def _spread(codes: Tensor, stride: Sequence[int]) -> Tensor:
    """Codes (B, *S, C) with zeros in between."""
    if all(step == 1 for step in stride):
        return codes
    sizes = [max((s - 1) * step + 1, 0) for s, step in zip(codes.shape[1:-1], stride, strict=True)]
    wide = codes.new_zeros((codes.shape[0], *sizes, codes.shape[-1]))
    wide[(slice(None), *(slice(None, None, step) for step in stride))] = codes
    return wide


def _multiply(x: Codes, w: Codes, bias: Tensor | None, shape: Shape, dtype: torch.dtype, impl: str) -> Tensor:
    """(B, *S', N) from codes."""
    xq = _spread(x[0], shape.stride) if shape.transposed else x[0]
    return int8_conv(xq, x[1], *w, bias, shape.window(w[0].shape[1:-1]), dtype, impl)


def _wgrad(inputs: Codes, outputs: Codes, shape: Shape, kernel: Sequence[int], dtype: torch.dtype, impl: str) -> Tensor:
    """(N, C / groups, *kernel): for each of its elements the sum over samples and windows of codes by channel."""
    (iq, i_scale), (oq, o_scale), g = inputs, outputs, shape.groups
    c = iq.shape[0] // g
    apart = iq.reshape(g, c, *iq.shape[1:]).movedim(0, -2).flatten(-2)  # (C / groups, *S, groups * B)
    padding: list[int] = []
    for s, o, k, step, p, d in zip(iq.shape[1:-1], oq.shape[1:-1], kernel, shape.stride, shape.padding, shape.dilation, strict=True):
        padding += [p, (k - 1) * d + (o - 1) * step + 1 - s - p]  # what a stride leaves over of the input is cut off
    window = Window(shape.dilation, tuple(padding), shape.stride, g)
    return int8_conv(apart, i_scale.view(g, c).t(), oq, o_scale, None, window, dtype, impl).movedim(-1, 0)


def float_conv(x: Tensor, w: Tensor, shape: Shape, bias: Tensor | None = None) -> Tensor:
    """torch's own convolution."""
    outs = list(shape.output_padding) or [0] * len(shape.stride)
    y: Tensor = torch.ops.aten.convolution(
        x, w, bias, list(shape.stride), list(shape.padding), list(shape.dilation), shape.transposed, outs, shape.groups
    )
    return y


def _float_backward(g: Tensor, x: Tensor, w: Tensor, shape: Shape, needed: tuple[bool, bool]) -> list[Tensor | None]:
    outs = list(shape.output_padding) or [0] * len(shape.stride)
    where = (list(shape.stride), list(shape.padding), list(shape.dilation), shape.transposed, outs, shape.groups)
    dx, dw, _ = torch.ops.aten.convolution_backward(g, x, w, [0], *where, [*needed, False])
    return [dx, dw]


class _Instead(torch.autograd.Function):
    """The values of one tensor with the derivatives of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(moves: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g, None

    @staticmethod
    def jvp(ctx: Any, moves: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        return moves.clone()


def _x_hat(x: Tensor | None, codes: Tensor, scale: Tensor, clipped: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values (B, C, *S) of codes (B, *S, C); they move with x where it is given."""
    q = codes.movedim(-1, 1)
    scales = scale.repeat_interleave(q.shape[1] // scale.shape[1], 1)
    return hat(x, q, scales.view(*q.shape[:2], *[1] * (q.ndim - 3)).expand(q.shape[:-1]), clipped, dtype)


def kernel_hat(w: Tensor | None, codes: Tensor, scale: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Values of codes in the weight's own layout; they move with w where it is given."""
    q = _from_rows(codes, shape.transposed, shape.groups)
    scales = _from_rows(scale.view(-1, *[1] * (q.ndim - 1)).expand(codes.shape), shape.transposed, shape.groups)
    return hat(w, q, scales[..., 0], None, dtype)


class _Conv(torch.autograd.Function):
    """y = conv(x_hat, w_hat) + bias from codes; x (B, C, *S), w in torch's layout, y (B, *S', N)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor | None,
        bias: Tensor | None,
        xq: Tensor,
        xs: Tensor,
        wq: Tensor,
        ws: Tensor,
        xtq: Tensor | None,
        xts: Tensor | None,
        clipped: Tensor | None,
        seed: Tensor | None,
        how: _How,
    ) -> Tensor:
        y = _multiply((xq, xs), (wq, ws), bias, how.shape, how.dtype, how.impl)
        # a view that autograd does not take for one: the caller may write to the result in place
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, bias, xq, xs, wq, ws, xtq, xts, clipped, seed, how = inputs
        ctx.set_materialize_grads(False)
        ctx.how, ctx.sizes = how, x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w, bias)]
        ctx.save_for_forward(x, w, xq, xs, wq, ws, clipped)
        if not how.keep:
            x = None
            if xtq is not None:  # dW wants x by channel
                xq = xs = None
            if not how.gradient:
                w = None
        ctx.save_for_backward(x, w, xq, xs, wq, ws, xtq, xts, clipped, seed)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:  # type: ignore[override]
        grads: list[Any] = [None, None, None]
        if g is not None:
            saved, how = ctx.saved_tensors, ctx.how  # read once: a checkpoint recomputes them
            clipped, g = saved[8], g.movedim(-1, 1)
            grads[:2] = _gradients(saved, ctx.sizes, ctx.needs_input_grad[:2], how, g)
            grads[0] = None if grads[0] is None else unclipped(grads[0], clipped)
            if ctx.needs_input_grad[2]:
                grads[2] = g.sum([0, *range(2, g.ndim)])
            grads = [None if d is None else d.to(dtype) for d, dtype in zip(grads, ctx.dtypes, strict=True)]
            if not how.keep and torch.is_grad_enabled():
                grads = [None if d is None else no_second_derivative(d) for d in grads]
        return (*grads, *[None] * 9)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, dbias: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, w, xq, xs, wq, ws, clipped = ctx.saved_tensors
        shape, dtype = ctx.how.shape, ctx.how.dtype
        parts = []
        if dx is not None:
            parts.append(float_conv(unclipped(dx, clipped).to(dtype), kernel_hat(w, wq, ws, shape, dtype), shape))
        if dw is not None:
            parts.append(float_conv(_x_hat(x, xq, xs, clipped, dtype), dw.to(dtype), shape))
        if dbias is not None:
            kernel = wq.shape[1:-1]
            size = (xq.shape[0], wq.shape[0], *shape.out(xq.shape[1:-1], kernel))
            parts.append(dbias.to(dtype).view(-1, *[1] * len(kernel)).expand(size))
        return sum(parts[1:], parts[0]).movedim(1, -1).clone()


def _gradients(saved: Any, sizes: Any, needed: Any, how: _How, g: Tensor) -> list[Tensor | None]:
    """dX and dW, of these what is wanted; g (B, N, *S')."""
    x, w, xq, xs, wq, ws, xtq, xts, clipped, seed = saved
    shape, kernel = how.shape, wq.shape[1:-1]
    need_x, need_w = needed
    int8_x, int8_w = bool(how.gradient) and need_x, xtq is not None and need_w
    grads: list[Tensor | None] = [None, None]
    in_float = (need_x and (how.keep or not int8_x), need_w and (how.keep or not int8_w))
    if any(in_float):
        w_shape = _from_rows(wq, shape.transposed, shape.groups).shape
        x_hat = _x_hat(x, xq, xs, clipped, g.dtype) if in_float[1] else g.new_empty(1).expand(sizes)
        w_hat = kernel_hat(w, wq, ws, shape, g.dtype) if in_float[0] else g.new_empty(1).expand(w_shape)
        grads = _float_backward(g, x_hat, w_hat, shape, in_float)
    if int8_x:
        gq = activation_codes(g, "row", None, shape.groups, how.impl, seed)
        weight = _from_rows(wq.float() * ws.view(-1, *[1] * (wq.ndim - 1)), shape.transposed, shape.groups) if w is None else w.detach()
        transposed, window = shape.adjoint(sizes[2:], g.shape[2:], kernel)
        codes = kernel_codes(weight, "row", transposed, shape.groups, how.impl)
        rows = _spread(gq[0], shape.stride) if transposed else gq[0]
        dx = int8_conv(rows, gq[1], *codes, None, window, g.dtype, how.impl).movedim(-1, 1)
        grads[0] = _instead(grads[0], dx, how)
    if int8_w:
        gt = _by_channel(g, None if seed is None else seed ^ 1, how.impl)
        inputs, outputs = (gt, (xtq, xts)) if shape.transposed else ((xtq, xts), gt)
        grads[1] = _instead(grads[1], _wgrad(inputs, outputs, shape, kernel, g.dtype, how.impl), how)
    return grads


def _instead(moves: Tensor | None, value: Tensor, how: _How) -> Tensor:
    """A gradient in INT8; where residuals are kept it moves as the one in float does."""
    if moves is None or not how.keep:
        return value
    y: Tensor = _Instead.apply(moves, value)
    return y


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as for the linear: Dynamo must not trace the Function
def convolve(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    x_codes: Codes | None,
    w_codes: Codes,
    activation: str,
    scale: Tensor | None,
    shape: tuple[Any, ...],
    gradient: str,
    wgrad: str,
    impl: str,
    dtype: torch.dtype,
) -> Tensor:
    """The convolution of operands that fit, its weight already quantized, and its activation perhaps."""
    shape = Shape(*shape)
    xq, xs = activation_codes(x, activation, scale, shape.groups, impl) if x_codes is None else x_codes
    if not differentiates(x, w, bias):
        how = _How(shape, dtype, "", "", impl, False)
        y = _Conv.forward(x, None, bias, xq, xs, *w_codes, None, None, None, None, how)
        return _as_torch(y, x)
    clipped = seed = None
    if scale is not None:
        clipped = numerics.clipped(x.detach(), scale)
    if gradient == "stochastic":
        seed = torch.randint(2**62, (), device=x.device)
    columns = gradient and wgrad == "int8" and differentiates(w)
    xtq, xts = _by_channel(x, None, impl) if columns else (None, None)
    how = _How(shape, dtype, gradient, wgrad, impl, keeps())
    y = _Conv.apply(x, w, bias, xq, xs, *w_codes, xtq, xts, clipped, seed, how)
    return _as_torch(y, x)


def _as_torch(y: Tensor, x: Tensor) -> Tensor:
    """(B, N, *S') of (B, *S', N), in the memory format that torch would give it."""
    y = y.movedim(-1, 1)
    return y if is_channels_last(x) else y.contiguous()


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def weight_only(
    x: Tensor, w: Tensor | None, bias: Tensor | None, codes: Codes, shape: tuple[Any, ...], of_weight: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """W8A16: torch's convolution of a float activation by the values of codes."""
    w_hat = kernel_hat(w, *codes, Shape(*shape), of_weight).to(dtype)
    return float_conv(x.to(dtype), w_hat, Shape(*shape), None if bias is None else bias.to(dtype))


def is_channels_last(x: Tensor) -> bool:
    """Whether torch would give a result whose channels come last in memory."""
    if _torch.in_transform() or x.ndim not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
