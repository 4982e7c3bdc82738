"""The derivatives of INT8 linear: the straight-through estimator (STE), in float or in INT8."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from teint8.ops.raw import dequantize, int8_mm, quantize, weight_only_mm
from teint8.ops.raw_both import quantize_both
from teint8.ops.straight import finished, hat, unclipped

Codes = tuple[Tensor, Tensor]


@dataclasses.dataclass(slots=True)
class How:
    """What is not a tensor. ``keep``: residuals stay differentiable floats, for second derivatives; else codes and scales.

    No tuple: the rules that torch makes for vmap under jvp take an argument's parts for arguments.
    """

    dtype: torch.dtype
    gradient: str
    wgrad: str
    impl: str
    keep: bool


class Linear(torch.autograd.Function):
    """y = x_hat @ w_hat^T + bias from codes; x (M, K) with w (N, K), or (B, M, K) with (B, N, K). No x codes: W8A16."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor | None,
        bias: Tensor | None,
        xq: Tensor | None,
        xs: Tensor | None,
        wq: Tensor,
        ws: Tensor,
        xtq: Tensor | None,
        xts: Tensor | None,
        wtq: Tensor | None,
        wts: Tensor | None,
        clipped: Tensor | None,
        seed: Tensor | None,
        how: How,
    ) -> Tensor:
        if xq is not None and xs is not None:
            return int8_mm(xq, xs, wq, ws, bias, how.dtype, how.impl)
        return weight_only_mm(x.to(how.dtype), wq, ws, bias, how.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, bias, xq, xs, wq, ws, xtq, xts, wtq, wts, clipped, seed, how = inputs
        ctx.set_materialize_grads(False)
        ctx.how = how
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w, bias)]
        if how.keep:  # the same for both, whole: torch's rule for vmap under jvp holds the dimensions of the one for the other
            ctx.save_for_forward(x, w, xq, xs, wq, ws, xtq, xts, wtq, wts, clipped, seed)
        else:
            if xq is not None:
                x = None
            if not ctx.needs_input_grad[1]:  # dX wants nothing of x: a frozen weight, under adapters
                x = xq = xs = None
            if how.gradient and how.wgrad == "int8":  # dW wants x along the tokens
                xq = xs = None
            if how.gradient and (w is not None or wtq is not None):  # dX wants w along its channels
                wq = ws = None
            if not how.gradient or wtq is not None:
                w = None
        ctx.save_for_backward(x, w, xq, xs, wq, ws, xtq, xts, wtq, wts, clipped, seed)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:  # type: ignore[override]
        grads: list[Tensor | None] = [None, None, None]
        if g is not None:
            x, w, xq, xs, wq, ws, xtq, xts, wtq, wts, clipped, seed = ctx.saved_tensors
            how: How = ctx.how
            rows, columns = _gradient_codes(g, ctx.needs_input_grad, seed, how)
            if ctx.needs_input_grad[0]:
                grads[0] = unclipped(_dgrad(g, w, wq, ws, _pair(wtq, wts), rows, how), clipped)
            if ctx.needs_input_grad[1]:
                grads[1] = _wgrad(g, x, xq, xs, clipped, _pair(xtq, xts), columns, how)
            if ctx.needs_input_grad[2]:
                grads[2] = g.sum(-2)
            grads = finished(grads, ctx.dtypes, how.keep)
        return (*grads, *[None] * 11)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, dbias: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, w, xq, xs, wq, ws, *_, clipped, _ = ctx.saved_tensors
        dtype = ctx.how.dtype
        parts = []
        if dx is not None:
            parts.append(unclipped(dx, clipped).to(dtype) @ hat(w, wq, ws, None, dtype).mT)
        if dw is not None:
            parts.append(hat(x, xq, xs, clipped, dtype) @ dw.to(dtype).mT)
        if dbias is not None:
            parts.append(dbias.to(dtype).unsqueeze(-2).expand(*x.shape[:-1], wq.shape[-2]))
        return sum(parts[1:], parts[0]).clone()


def _pair(codes: Tensor | None, scale: Tensor | None) -> Codes | None:
    return None if codes is None or scale is None else (codes, scale)


def _gradient_codes(g: Tensor, needed: Any, seed: Tensor | None, how: How) -> tuple[Codes | None, Codes | None]:
    """G by token for dX and by channel for dW, each where it is wanted in INT8; both from one pass."""
    g = g.detach()
    want_rows = bool(how.gradient) and needed[0]
    want_columns = bool(how.gradient) and how.wgrad == "int8" and needed[1]
    if want_rows and want_columns:
        q, s, tq, ts = quantize_both(g, seed=seed, impl=how.impl)
        return (q, s), (tq, ts)
    rows = quantize(g, seed=seed, impl=how.impl) if want_rows else None
    return rows, quantize(g.mT, seed=None if seed is None else seed ^ 1, impl=how.impl) if want_columns else None


def _dgrad(g: Tensor, w: Tensor | None, wq: Any, ws: Any, channels: Codes | None, rows: Codes | None, how: How) -> Tensor:
    """dX = G W_hat; in INT8, G by token against W by input channel."""
    if rows is None:
        return g @ hat(w, wq, ws, None, g.dtype)
    other = w
    if other is None and channels is None:
        other = dequantize(wq, ws, torch.float32)
    return _product(g, rows, None if other is None else other.mT, channels, how)


def _wgrad(g: Tensor, x: Any, xq: Any, xs: Any, clipped: Any, features: Codes | None, columns: Codes | None, how: How) -> Tensor:
    """dW = G^T X_hat; in INT8, G by output channel against X by feature, both along the tokens."""
    if columns is None:
        return g.mT @ hat(x, xq, xs, clipped, g.dtype)
    return _product(g.mT, columns, None if x is None else x.mT, features, how)


def _product(g: Tensor, gradient: Codes, other: Any, codes: Codes | None, how: How) -> Tensor:
    """g @ other^T in INT8, quantized along the shared dimension; differentiable again where residuals are kept."""
    gq, gs = gradient
    oq, os = quantize(other.detach(), impl=how.impl) if codes is None else codes
    if not how.keep:
        return int8_mm(gq, gs, oq, os, None, g.dtype, how.impl)
    second = dataclasses.replace(how, dtype=g.dtype, gradient="", wgrad="float")
    y: Tensor = Linear.apply(g, other, None, gq, gs, oq, os, None, None, None, None, None, None, second)
    return y
