"""The implementations in plain torch, "reference" and "composed" of the best ``quantize``, of ops without a file of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teint8 import activations, norms, numerics
from teint8.ops.registry import Problem, register, select


def _reference_quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None) -> Any:
    return numerics.quantize(x, seed) if scale is None else numerics.quantize_static(x, scale)


def _reference_both(x: Tensor, seed: Tensor | None) -> Any:
    return _both(x, seed, _reference_quantize)


def _composed_both(x: Tensor, seed: Tensor | None) -> Any:
    return _both(x, seed, _best_quantize)


def _both(x: Tensor, seed: Tensor | None, quantize: Callable[..., Any]) -> Any:
    m, k = x.shape[-2:]
    codes, scale = quantize(x.reshape(-1, k), seed, None)
    tcodes, tscale = quantize(x.mT.reshape(-1, m), None if seed is None else seed ^ 1, None)
    return codes.view(x.shape), scale.view(x.shape[:-1]), tcodes.view(x.mT.shape), tscale.view(x.mT.shape[:-1])


def _best_quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None) -> Any:
    problem = Problem(x.device.type, x.dtype, 1, x.shape[0], 0, x.shape[1])
    return select("quantize", problem).run(x, seed, scale)


def _activation(quantize: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The activation in plain torch, its results quantized by a function that quantizes rows."""

    def run(
        g: Any, u: Any, d: Any, kind: str, rows: bool, columns: bool, values: bool, value_columns: bool, seed: Any, scale: Any
    ) -> list[Tensor]:
        results = [activations.value(kind, g, u)] if d is None else [r for r in activations.gradient(kind, g, u, d) if r is not None]
        out: list[Tensor] = []
        for i, x in enumerate(results):
            codes, codes_scale, tcodes, tscale = _both(x, None if seed is None else seed + 2 * i, quantize)
            out += [x] * values + [codes, codes_scale] * rows + [tcodes, tscale] * columns
        value = activations.value(kind, g, u) if value_columns or scale is not None else g
        out += _both(value, None, quantize)[2:] if value_columns else []
        if scale is not None:
            codes, scale = quantize(value.reshape(-1, value.shape[-1]), None, None)
            out.append(numerics.dequantize(codes, scale, g.dtype).view(value.shape))
        return out

    return run


def _norm(quantize: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def run(x: Any, residual: Any, weight: Any, bias: Any, kind: str, eps: float, codes: bool, values: bool) -> list[Tensor]:
        total = x if residual is None else x + residual
        y = norms.value(kind, total, weight, bias, eps)
        return [total] * (residual is not None) + [y] * values + (list(quantize(y, None, None)) if codes else [])

    return run


def _channel_norm(quantize: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def run(
        x: Any, weight: Any, bias: Any, mean: Any, variance: Any, groups: int, eps: float, codes: bool, values: bool
    ) -> list[Tensor]:
        y = norms.of_channels(x, weight, bias, eps, groups=groups, mean=mean, variance=variance)
        last = y.mT
        made = quantize(last.reshape(len(x), -1), None, None) if codes else ()
        return [y] * values + [t.view(last.shape) if t.dtype == torch.int8 else t for t in made]

    return run


def register_all() -> None:
    """Register them, for every device."""
    register("channel_norm", "reference", _channel_norm(_reference_quantize))
    register("channel_norm", "composed", _channel_norm(_best_quantize), priority=5)
    register("norm", "reference", _norm(_reference_quantize))
    register("norm", "composed", _norm(_best_quantize), priority=5)
    register("quantize_both", "reference", _reference_both)
    register("quantize_both", "composed", _composed_both, priority=5)
    register("activation", "reference", _activation(_reference_quantize))
    register("activation", "composed", _activation(_best_quantize), priority=5)
    register("quantize", "reference", _reference_quantize)
    register("int8_mm", "reference", numerics.int8_mm)
