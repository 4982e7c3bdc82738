"""INT8 linear with its derivatives: the straight-through estimator (STE), in float or in INT8."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.ops.raw import fused_linear, int8_mm, quantize
from teint8.ops.straight import hat, no_second_derivative, unclipped
from teint8.qtensor import QTensor


class _How(NamedTuple):
    """What is not a tensor. ``keep``: residuals stay differentiable floats, for second derivatives; else codes and scales."""

    dtype: torch.dtype
    gradient: str
    wgrad: str
    impl: str
    keep: bool


class _Linear(torch.autograd.Function):
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
        clipped: Tensor | None,
        seed: Tensor | None,
        how: _How,
    ) -> Tensor:
        if xq is not None and xs is not None:
            return int8_mm(xq, xs, wq, ws, bias, how.dtype, how.impl)
        y = x.to(how.dtype) @ numerics.dequantize(wq, ws, how.dtype).mT
        return y if bias is None else y + bias.to(how.dtype).unsqueeze(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, bias, xq, xs, wq, ws, xtq, xts, clipped, seed, how = inputs
        ctx.set_materialize_grads(False)
        ctx.how = how
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w, bias)]
        ctx.save_for_forward(x, w, xq, xs, wq, ws, clipped)
        if not how.keep:
            if xq is not None:
                x = None
            if how.gradient and how.wgrad == "int8":  # dW wants x along the tokens
                xq = xs = None
            if how.gradient and w is not None:  # dX wants w along its channels; w is the parameter and costs nothing
                wq = ws = None
            else:
                w = None
        ctx.save_for_backward(x, w, xq, xs, wq, ws, xtq, xts, clipped, seed)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:  # type: ignore[override]
        grads: list[Tensor | None] = [None, None, None]
        if g is not None:
            x, w, xq, xs, wq, ws, xtq, xts, clipped, seed = ctx.saved_tensors
            how: _How = ctx.how
            if ctx.needs_input_grad[0]:
                grads[0] = unclipped(_dgrad(g, w, wq, ws, seed, how), clipped)
            if ctx.needs_input_grad[1]:
                columns = None if xtq is None else (xtq, xts)
                grads[1] = _wgrad(g, x, xq, xs, clipped, columns, seed, how)
            if ctx.needs_input_grad[2]:
                grads[2] = g.sum(-2)
            grads = [None if d is None else d.to(dtype) for d, dtype in zip(grads, ctx.dtypes, strict=True)]
            if not how.keep and torch.is_grad_enabled():
                grads = [None if d is None else no_second_derivative(d) for d in grads]
        return (*grads, *[None] * 9)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, dbias: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, w, xq, xs, wq, ws, clipped = ctx.saved_tensors
        dtype = ctx.how.dtype
        parts = []
        if dx is not None:
            parts.append(unclipped(dx, clipped).to(dtype) @ hat(w, wq, ws, None, dtype).mT)
        if dw is not None:
            parts.append(hat(x, xq, xs, clipped, dtype) @ dw.to(dtype).mT)
        if dbias is not None:
            parts.append(dbias.to(dtype).unsqueeze(-2).expand(*x.shape[:-1], wq.shape[-2]))
        return sum(parts[1:], parts[0]).clone()


def _dgrad(g: Tensor, w: Tensor | None, wq: Any, ws: Any, seed: Tensor | None, how: _How) -> Tensor:
    """dX = G W_hat; in INT8, G by token against W by input channel."""
    if not how.gradient:
        return g @ hat(w, wq, ws, None, g.dtype)
    w = numerics.dequantize(wq, ws) if w is None else w
    return _product(g, w.mT, None, seed, how)


def _wgrad(
    g: Tensor, x: Any, xq: Any, xs: Any, clipped: Any, columns: tuple[Tensor, Tensor] | None, seed: Tensor | None, how: _How
) -> Tensor:
    """dW = G^T X_hat; in INT8, G by output channel against X by feature, both along the tokens."""
    if columns is None:
        return g.mT @ hat(x, xq, xs, clipped, g.dtype)
    # another stream of noise than dX has: the rows of G^T are not the rows of G
    return _product(g.mT, None if x is None else x.mT, columns, None if seed is None else seed + 1, how)


def _product(g: Tensor, other: Any, codes: tuple[Tensor, Tensor] | None, seed: Tensor | None, how: _How) -> Tensor:
    """g @ other^T in INT8, quantized along the shared dimension; differentiable again where residuals are kept."""
    gq, gs = quantize(g.detach(), seed=seed, impl=how.impl)
    oq, os = quantize(other.detach(), impl=how.impl) if codes is None else codes
    if not how.keep:
        return int8_mm(gq, gs, oq, os, None, g.dtype, how.impl)
    second = how._replace(dtype=g.dtype, gradient="", wgrad="float")
    y: Tensor = _Linear.apply(g, other, None, gq, gs, oq, os, None, None, None, None, second)
    return y


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # Dynamo must not trace the Function: it returns zero gradients under torch.func, silently
def _linear(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    wq: Tensor,
    ws: Tensor,
    activation: str,
    activation_scale: Tensor | None,
    gradient: str,
    wgrad: str,
    impl: str,
    dtype: torch.dtype,
) -> Tensor:
    """The linear of flat operands, with its weight already quantized."""
    xq = xs = clipped = xtq = xts = seed = None
    if activation:
        whole = x.ndim if activation == "tensor" else 1
        xq, xs = quantize(x.detach(), scale=activation_scale, group_dims=whole, impl=impl)
    if not _differentiates(x, w, bias):
        return _Linear.forward(x, None, bias, xq, xs, wq, ws, None, None, None, None, _How(dtype, "", "", impl, False))
    if activation_scale is not None:
        clipped = numerics.clipped(x.detach(), activation_scale)
    if gradient and wgrad == "int8":
        xtq, xts = quantize(x.detach().mT, impl=impl)
    if gradient == "stochastic":
        seed = torch.randint(2**62, (), device=x.device)
    how = _How(dtype, gradient, wgrad, impl, keep=_torch.in_transform() or _torch.forward_ad_level() >= 0)
    y: Tensor = _Linear.apply(x, w, bias, xq, xs, wq, ws, xtq, xts, clipped, seed, how)
    return y


def _differentiates(*tensors: Tensor | None) -> bool:
    if _torch.in_transform() or _torch.forward_ad_level() >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear(
    x: Tensor,
    weight: Tensor | QTensor,
    bias: Tensor | None = None,
    *,
    weight_granularity: str = "row",
    activation: str | None = "row",
    static: bool = False,
    gradient: str | None = None,
    wgrad: str = "int8",
    impl: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ weight^T + bias`` in INT8 by the numerics contract, with STE derivatives (Bengio et al., 2013).

    ``y = (float32(sum_k x_code * w_code) * w_scale) * x_scale + bias``, cast to the dtype of x. Backward in float:
    ``dX = G W_hat, dW = G^T X_hat, dbias = sum G``; in INT8 G is quantized too, by token for dX and by channel for dW.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides.
        weight: (N, K) of that dtype, or its QTensor; (B, N, K) with x (B, M, K) is a batch of linears.
        bias: (N), or (B, N) with a batched weight, or None.
        weight_granularity: "row" or "tensor", for a float weight.
        activation: "row" for a scale a token, "tensor" for one in all, None for a float activation (W8A16).
        static: take the activation's scale from ``weight.activation_scale`` (a QTensor's).
        gradient: None for a float backward, "nearest" or "stochastic" for an INT8 one.
        wgrad: "int8" or "float" for dW, where gradient is given.
        impl: name of an implementation, "reference" for plain torch; "" for the best.
        dtype: of the result; that of x unless given (torch.autocast gives it).

    Returns:
        (..., N) or (B, M, N).

    Raises:
        TypeError: not a float tensor, or two float dtypes. ValueError: shapes or devices that do not fit, static without a scale.

    The relative error of one product is about 0.012 on Gaussian data at K = 4096; ``tests/test_contract.py`` bounds it.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> linear(x, w)
        tensor([[11.0157]])

    """
    packed = weight if isinstance(weight, QTensor) else None
    scale = _activation_scale(packed) if static else None
    if packed is None:
        w = weight
        _check(x, w, w.dtype, bias, dtype)  # type: ignore[union-attr,arg-type]
        group = 1 if weight_granularity == "row" else 2
        wq, ws = quantize(w.detach(), group_dims=group, impl=impl)  # type: ignore[union-attr]
    else:
        w = None
        wq, ws = packed.rows()
        _check(x, wq, packed.dtype, bias, dtype)
    if activation == "row" and not static and not impl and not _differentiates(x, w, bias):  # type: ignore[arg-type]
        fused = fused_linear(x, wq, ws, bias, dtype or x.dtype)
        if fused is not None:
            return fused
    flat = x if wq.ndim > 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y: Tensor = _linear(flat, w, bias, wq, ws, activation or "", scale, gradient or "", wgrad, impl, dtype or x.dtype)
    return y if wq.ndim > 2 else y.reshape(*x.shape[:-1], wq.shape[-2])


def _activation_scale(weight: QTensor | None) -> Tensor:
    if weight is None or weight.activation_scale is None:
        held = "a float weight" if weight is None else repr(weight)
        raise ValueError(
            f"linear: the activation's scale is static, but there is none: {held} was given. "
            "Give the packed weight one with QTensor.with_activation_scale(scale), or use Quant(scale='dynamic')."
        )
    return weight.activation_scale


def _check(x: Tensor, w: Tensor, w_dtype: torch.dtype, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    """Raise for operands that do not fit; ``w`` has the weight's shape, ``w_dtype`` its float dtype."""
    if not x.is_floating_point():
        raise TypeError(f"linear: x has dtype {x.dtype}; a float tensor is needed: x.float()")
    if not w_dtype.is_floating_point:
        raise TypeError(f"linear: weight has dtype {w_dtype}; a float tensor or a QTensor is needed")
    if dtype is None and x.dtype != w_dtype:
        raise TypeError(f"linear: x is {x.dtype} but weight is {w_dtype}; cast one of them, or use torch.autocast")
    if w.ndim < 2 or x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"linear: x has shape {tuple(x.shape)} but weight has {tuple(w.shape)}; x (..., K) needs a weight (N, K)")
    if w.ndim > 2 and (w.ndim > 3 or x.ndim != 3 or x.shape[0] != w.shape[0]):
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)} but weight has {tuple(w.shape)}; a batched weight (B, N, K) needs x (B, M, K)"
        )
    if x.device != w.device:
        raise ValueError(f"linear: x is on {x.device} but weight is on {w.device}; move one with .to({str(w.device)!r})")
    if bias is not None:
        _check_bias(bias, w, x.device)


def _check_bias(bias: Tensor, w: Tensor, device: torch.device) -> None:
    if not bias.is_floating_point() or bias.device != device:
        raise ValueError(f"linear: bias is {bias.dtype} on {bias.device}; a float tensor on {device} is needed")
    if bias.shape != w.shape[:-1]:
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)} but weight has {tuple(w.shape)}; {tuple(w.shape[:-1])} is needed")
