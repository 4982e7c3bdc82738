"""INT8 linear with its derivatives: the straight-through estimator (STE), in float or in INT8."""

import math
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.ops.blocks import block_linear, has_blocks
from teint8.ops.linear_function import How, Linear
from teint8.ops.raw import fused_linear, int8_mm, quantize
from teint8.ops.raw_blocks import quantize_blocks
from teint8.ops.raw_both import quantize_both
from teint8.ops.shared import Shared
from teint8.qtensor import QTensor


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # Dynamo must not trace the Function: it returns zero gradients under torch.func, silently
def _linear(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    x_codes: tuple[Tensor, ...] | None,
    w_codes: tuple[Tensor, ...],
    activation: str,
    activation_scale: Tensor | None,
    gradient: str,
    wgrad: str,
    impl: str,
    dtype: torch.dtype,
) -> Tensor:
    """The linear of flat operands, with its weight already quantized, and its activation perhaps."""
    clipped = seed = None
    wanted = differentiates(x, w, bias)
    columns = wanted and bool(gradient) and wgrad == "int8" and differentiates(w)
    if x_codes is None:
        x_codes = _activation_codes(x.detach(), activation, activation_scale, columns, impl)
    xq: Any
    xs: Any
    wq: Any
    ws: Any
    xq, xs, xtq, xts = x_codes if len(x_codes) == 4 else (*x_codes, None, None) if x_codes else (None,) * 4
    wq, ws, wtq, wts = w_codes if len(w_codes) == 4 else (*w_codes, None, None)
    if not wanted:
        return Linear.forward(x, None, bias, xq, xs, wq, ws, None, None, None, None, None, None, How(dtype, "", "", impl, False))
    if activation_scale is not None:
        clipped = numerics.clipped(x.detach(), activation_scale)
    if gradient == "stochastic":
        seed = torch.randint(2**62, (), device=x.device)
    how = How(dtype, gradient, wgrad, impl, keep=keeps())
    y: Tensor = Linear.apply(x, w, bias, xq, xs, wq, ws, xtq, xts, wtq, wts, clipped, seed, how)
    return y


def _activation_codes(x: Tensor, activation: str, scale: Tensor | None, columns: bool, impl: str) -> tuple[Tensor, ...]:
    """Codes and scales of x, with columns those of its transpose too; none for a float activation."""
    if not activation:
        return ()
    if columns and activation == "row" and scale is None:
        return quantize_both(x, impl=impl)
    whole = x.ndim if activation == "tensor" else 1
    rows = quantize(x, scale=scale, group_dims=whole, impl=impl)
    return (*rows, *quantize(x.mT, impl=impl)) if columns else rows


def weight_codes_of(w: Tensor, granularity: str, columns: bool, impl: str = "") -> tuple[Tensor, ...]:
    """Codes and scales of a float weight (..., N, K) by output channel; with columns, by input channel too, transposed, for dX."""
    w = w.detach()
    if numerics.block_of(granularity):
        return quantize_blocks(w, numerics.block_of(granularity), impl)
    if granularity == "tensor":
        rows = quantize(w, group_dims=2, impl=impl)
        return (*rows, *quantize(w.mT, impl=impl)) if columns else rows
    return quantize_both(w, impl=impl) if columns else quantize(w, impl=impl)


def keeps() -> bool:
    """Whether residuals must stay differentiable floats: under a torch.func transform or forward-mode derivatives."""
    return _torch.in_transform() or _torch.forward_ad_level() >= 0


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a derivative by any of these may be asked for; never by None."""
    if keeps():
        return any(t is not None for t in tensors)
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled():  # Dynamo does not know it
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def linear(
    x: Tensor,
    weight: Tensor | QTensor,
    bias: Tensor | None = None,
    *,
    weight_granularity: str = "row",
    activation: str | None = "row",
    static: bool = False,
    activation_scale: Tensor | None = None,
    gradient: str | None = None,
    gradient_granularity: str = "row",
    wgrad: str = "int8",
    impl: str = "",
    dtype: torch.dtype | None = None,
    shared: Shared | None = None,
    x_codes: tuple[Tensor, ...] | None = None,
    weight_codes: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """``x @ weight^T + bias`` in INT8 by the numerics contract, with STE derivatives (Bengio et al., 2013).

    ``y = (float32(sum_k x_code * w_code) * w_scale) * x_scale + bias``, cast to the dtype of x. Backward in float:
    ``dX = G W_hat, dW = G^T X_hat, dbias = sum G``; in INT8 G is quantized too, by token for dX and by channel for dW.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides.
        weight: (N, K) of that dtype, or its QTensor; (B, N, K) with x (B, M, K) is a batch of linears.
        bias: (N), or (B, N) with a batched weight, or None.
        weight_granularity: "row" or "tensor", for a float weight; or "block32", "block64", "block128": a scale for so many values
            along K, for a weight (N, K) (``numerics.int8_block_mm``).
        activation: "row" for a scale a token, "tensor" for one in all, "block32" and the like, None for a float activation (W8A16).
        static: take the activation's scale from ``weight.activation_scale`` (a QTensor's), or from ``activation_scale``.
        activation_scale: float32, one number, for a float weight.
        gradient: None for a float backward, "nearest" or "stochastic" for an INT8 one.
        gradient_granularity: "row", or that of the blocks of the operands.
        wgrad: "int8" or "float" for dW, where gradient is given.
        impl: name of an implementation, "reference" for plain torch; "" for the best.
        dtype: of the result; that of x unless given (torch.autocast gives it).
        shared: where codes of activations are kept, for calls that share one.
        x_codes: codes (..., K) and scales (...) of what takes the place of x, if they were made before; without derivatives alone.
        weight_codes: what ``weight_codes_of`` made of a float weight, if that was done before.

    Returns:
        (..., N) or (B, M, N).

    Raises:
        TypeError: not a float tensor, or two float dtypes.
        ValueError: shapes or devices that do not fit, static without a scale.

    The relative error of one product is about 0.012 on Gaussian data at K = 4096; ``tests/test_contract.py`` bounds it.

    Examples:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> linear(x, w)
        tensor([[11.0157]])

    """
    if x_codes is not None:
        _check_codes(x, weight, bias, x_codes, weight_granularity, activation)
    if has_blocks(weight, weight_granularity, activation):
        return _by_block(
            x, weight, bias, weight_granularity, activation, gradient, gradient_granularity, wgrad, impl, dtype, weight_codes
        )
    packed = weight if isinstance(weight, QTensor) else None
    scale = static_scale("linear", packed, activation_scale) if static else None
    if packed is None:
        w = weight
        _check(x, w, w.dtype, bias, dtype)  # type: ignore[union-attr,arg-type]
        codes = weight_codes or weight_codes_of(w, weight_granularity, bool(gradient) and differentiates(x, w, bias), impl)  # type: ignore[arg-type]
        wq, ws = codes[:2]
    else:
        w = None
        codes = wq, ws = packed.rows()
        _check(x, wq, packed.dtype, bias, dtype)
    if x_codes is not None:
        return int8_mm(x_codes[0], x_codes[1], wq, ws, bias, dtype or x.dtype, impl)
    waits = shared is not None and shared.holds(x, (False, wq.ndim > 2, impl))  # of a norm, or of another linear
    if activation == "row" and not static and not impl and not waits and not differentiates(x, w, bias):  # type: ignore[arg-type]
        fused = fused_linear(x, wq, ws, bias, dtype or x.dtype)
        if fused is not None:
            return fused
    flat = x if wq.ndim > 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if shared is not None and activation == "row" and scale is None:
        columns = bool(gradient) and wgrad == "int8" and w is not None and differentiates(w)  # type: ignore[arg-type]
        how = (columns, wq.ndim > 2, impl)
        x_codes = shared.codes(x, how, lambda: _activation_codes(flat.detach(), "row", None, columns, impl))
    y: Tensor = _linear(flat, w, bias, x_codes, codes, activation or "", scale, gradient or "", wgrad, impl, dtype or x.dtype)
    return y if wq.ndim > 2 else y.reshape(*x.shape[:-1], wq.shape[-2])


def _check_codes(x: Tensor, weight: Any, bias: Any, codes: tuple[Tensor, ...], granularity: str, activation: str | None) -> None:
    """Raise for codes of x that were made before and cannot be used."""
    if activation != "row" or has_blocks(weight, granularity, activation):
        raise ValueError(
            f"linear: x_codes were given, which are by row, but activation is {activation!r} and weight_granularity {granularity!r}; "
            "'row', and a weight without blocks, are needed"
        )
    if len(codes) != 2 or codes[0].shape != x.shape or codes[1].shape != x.shape[:-1]:
        shapes = [tuple(t.shape) for t in codes]
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)} but x_codes {shapes}; {tuple(x.shape)} and {tuple(x.shape[:-1])} are needed"
        )
    if differentiates(x, None if isinstance(weight, QTensor) else weight, bias):
        raise ValueError("linear: a derivative was asked for, and x_codes are no function of x: leave them out, or use torch.no_grad()")


def _by_block(
    x: Tensor, weight: Tensor | QTensor, bias: Any, weight_granularity: str, activation: Any, gradient: Any, gradient_granularity: str,
    wgrad: str, impl: str, dtype: Any, weight_codes: Any,
) -> Tensor:  # fmt: skip
    shape: Any = weight
    if isinstance(weight, QTensor):
        shape = weight.codes.mT if weight.axis == -2 else weight.codes
    _check(x, shape, weight.dtype, bias, dtype)
    if gradient == "stochastic":
        raise ValueError("linear: gradient is 'stochastic', which has no blocks; 'nearest' is needed")
    how = gradient_granularity if gradient else ""
    return block_linear(x, weight, bias, weight_granularity, activation, how, wgrad, impl, dtype or x.dtype, weight_codes)


def static_scale(op: str, weight: QTensor | None, given: Tensor | None) -> Tensor:
    """The static scale of an activation: of a packed weight its own, of a float one that which is given."""
    if weight is None and given is not None:
        return given.detach()
    if weight is None or weight.activation_scale is None:
        held = "a float weight" if weight is None else repr(weight)
        raise ValueError(
            f"{op}: the activation's scale is static, but there is none: {held} was given. "
            "Give it one with teint8.with_scales(params, scales) or QTensor.with_activation_scale, or use Quant(scale='dynamic')."
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
