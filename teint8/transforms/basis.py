"""A linear whose activation is conditioned before it is quantized: the same call in the other basis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teint8.conditioning import Conditioned
from teint8.ops.linear import differentiates, static_scale
from teint8.ops.raw import direct
from teint8.policy import Quant
from teint8.qtensor import QTensor
from teint8.transforms.operands import Operand
from teint8.transforms.reasons import autocast_dtype, by_block, why_float


def multiply(
    route: Any, op: str, x: Any, weight: Operand, axis: int, bias: Any, float_call: Callable[[], Any], rows: Any, ends: Any
) -> Any:
    """x by a conditioned weight; arguments as of ``Route.multiply``, route first."""
    conditioning = weight.conditioning
    assert conditioning is not None
    if not conditioning.changes_basis:
        plain = weight._replace(static=conditioning.activation_scale, conditioning=None)
        return route.multiply(op, x, plain, axis, bias, float_call, rows, ends)
    if ends is not None or (axis == -1) == weight.transposed:
        raise ValueError(f"{weight.path} is {conditioning!r}, for a weight (N, K) of a linear; this call uses it otherwise")
    x = route.plain(x)
    whole = weight._replace(value=conditioning.weight, transposed=False, static=conditioning.activation_scale, conditioning=None)
    how = _needs_codes_alone(route, op, x, whole, bias)
    if how is not None:
        codes = _codes(route, x, conditioning, how.scale == "static")
        y = route.multiply(op, x, whole._replace(x_codes=codes), -1, bias, float_call, rows, ends)
    else:
        inside = conditioning.apply(x)
        value: Any = conditioning.weight if isinstance(conditioning.weight, QTensor) else conditioning.conditioned()
        if isinstance(value, QTensor) and inside.dtype != x.dtype == value.dtype:  # a wider one is left by what was done to x
            value = dataclasses.replace(value, dtype=inside.dtype)

        def in_float() -> Any:
            y = torch.matmul(inside, (value.dequantize() if isinstance(value, QTensor) else value)[rows or slice(None)].mT)
            return y if bias is None else y + bias

        y = route.multiply(op, inside, whole._replace(value=value), -1, bias, in_float, rows, ends)
    y = y.to(autocast_dtype(x) or x.dtype)
    aside = conditioning.aside(x, rows)
    return y if aside is None else y + aside


def _needs_codes_alone(route: Any, op: str, x: Any, weight: Operand, bias: Any) -> Quant | None:
    """How an activation is quantized of which codes alone are needed: by row, for a packed weight, without derivatives; else None."""
    if torch.compiler.is_dynamo_compiling() or route.measures or not isinstance(weight.value, QTensor) or weight.value.block:
        return None
    rule = route.rule(route.path(weight), op)
    if why_float(op, rule, x, weight, -1) or by_block(rule) or x.numel() == 0 or x.shape[-1] != weight.value.shape[-1]:
        return None
    if x.dtype != weight.value.dtype and autocast_dtype(x) is None:  # in its basis x may be wider, and fit
        return None
    if rule.compute != "int8" or rule.activation is None or rule.activation.grouping != "row":
        return None
    return rule.activation if direct(x, weight.value.codes, bias) and not differentiates(x, bias) else None


def _codes(route: Any, x: Tensor, conditioning: Conditioned, static: bool) -> tuple[Tensor, Tensor]:
    """Codes of x in its basis; linears of one call that have the same one share them."""
    if static:
        return conditioning.codes(x, static_scale("linear", conditioning.weight, None))  # type: ignore[arg-type]
    smoothing = conditioning.smoothing
    if route.shared is None or conditioning.outliers or (smoothing is not None and smoothing.is_inference()):
        return conditioning.codes(x)
    basis = None if smoothing is None else (smoothing.data_ptr(), smoothing.stride(), smoothing._version)
    found: tuple[Tensor, Tensor] = route.shared.codes(x, ("conditioned", conditioning.rotation, basis), lambda: conditioning.codes(x))
    return found
