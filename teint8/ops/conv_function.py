"""The derivatives of INT8 convolutions, transposed ones too, by the straight-through estimator: in float or in INT8.

Channels come last inside, so that what a window sees lies together: an activation (B, C, *S) has codes (B, *S, C) and a scale for
each sample and group, a weight (N, C / groups, *kernel) has codes (N, *kernel, C / groups) and a scale for each output channel. A
transposed convolution is a plain one over its input with zeros in between, and so is the gradient of a convolution by its input; that
by the weight is one in which channels and samples change places.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.ops.conv_layout import Codes, Shape, activation_codes, by_channel, from_rows, kernel_codes, spread
from teint8.ops.linear import differentiates, keeps
from teint8.ops.raw_conv import Window, int8_conv
from teint8.ops.straight import finished, hat, moved, unclipped


@dataclasses.dataclass(slots=True)
class _How:
    """What is not a tensor; ``keep`` as for the linear, and no tuple as there."""

    shape: Shape
    dtype: torch.dtype
    gradient: str
    wgrad: str
    impl: str
    keep: bool


def _multiply(x: Codes, w: Codes, bias: Tensor | None, shape: Shape, dtype: torch.dtype, impl: str) -> Tensor:
    """(B, *S', N) from codes."""
    xq = spread(x[0], shape.stride) if shape.transposed else x[0]
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


def _x_hat(x: Tensor | None, codes: Tensor, scale: Tensor, clipped: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values (B, C, *S) of codes (B, *S, C); they move with x where it is given."""
    q = codes.movedim(-1, 1)
    scales = scale.repeat_interleave(q.shape[1] // scale.shape[1], 1)
    return hat(x, q, scales.view(*q.shape[:2], *[1] * (q.ndim - 3)).expand(q.shape[:-1]), clipped, dtype)


def kernel_hat(w: Tensor | None, codes: Tensor, scale: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Values of codes in the weight's own layout; they move with w where it is given."""
    q = from_rows(codes, shape.transposed, shape.groups)
    scales = from_rows(scale.view(-1, *[1] * (q.ndim - 1)).expand(codes.shape), shape.transposed, shape.groups)
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
        if how.keep:  # the same for both, as for the linear
            ctx.save_for_forward(x, w, xq, xs, wq, ws, xtq, xts, clipped, seed)
        else:
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
            grads = finished(grads, ctx.dtypes, how.keep)
        return (*grads, *[None] * 9)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, dbias: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, w, xq, xs, wq, ws, *_, clipped, _ = ctx.saved_tensors
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
        w_shape = from_rows(wq, shape.transposed, shape.groups).shape
        x_hat = _x_hat(x, xq, xs, clipped, g.dtype) if in_float[1] else g.new_empty(1).expand(sizes)
        w_hat = kernel_hat(w, wq, ws, shape, g.dtype) if in_float[0] else g.new_empty(1).expand(w_shape)
        grads = _float_backward(g, x_hat, w_hat, shape, in_float)
    if int8_x:
        gq = activation_codes(g, "row", None, shape.groups, how.impl, seed)
        weight = from_rows(wq.float() * ws.view(-1, *[1] * (wq.ndim - 1)), shape.transposed, shape.groups) if w is None else w.detach()
        transposed, window = shape.adjoint(sizes[2:], g.shape[2:], kernel)
        codes = kernel_codes(weight, "row", transposed, shape.groups, how.impl)
        rows = spread(gq[0], shape.stride) if transposed else gq[0]
        dx = int8_conv(rows, gq[1], *codes, None, window, g.dtype, how.impl).movedim(-1, 1)
        grads[0] = _instead(grads[0], dx, how)
    if int8_w:
        gt = by_channel(g, None if seed is None else seed ^ 1, how.impl)
        inputs, outputs = (gt, (xtq, xts)) if shape.transposed else ((xtq, xts), gt)
        grads[1] = _instead(grads[1], _wgrad(inputs, outputs, shape, kernel, g.dtype, how.impl), how)
    return grads


def _instead(moves: Tensor | None, value: Tensor, how: _How) -> Tensor:
    """A gradient in INT8; where residuals are kept it moves as the one in float does."""
    return value if moves is None or not how.keep else moved(value, moves)


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
    xtq, xts = by_channel(x, None, impl) if columns else (None, None)
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
    # in one layout, however the codes lie: by it torch chooses how to add up
    w_hat = kernel_hat(w, *codes, Shape(*shape), of_weight).to(dtype).contiguous()
    return float_conv(x.to(dtype), w_hat, Shape(*shape), None if bias is None else bias.to(dtype))


def is_channels_last(x: Tensor) -> bool:
    """Whether torch would give a result whose channels come last in memory."""
    if _torch.in_transform() or x.ndim not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
