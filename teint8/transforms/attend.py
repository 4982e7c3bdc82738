"""Scaled dot-product attention: in INT8 where a rule names "attention", else as torch has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teint8 import _torch, ops
from teint8.ops.raw_attention import problem_of
from teint8.policy import Rule
from teint8.transforms import callsite
from teint8.transforms.reasons import autocast_dtype

if TYPE_CHECKING:
    from teint8.transforms.route import Route


def attend(
    route: Route,
    float_call: Callable[[], Any],
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``F.scaled_dot_product_attention`` of these, or ``float_call``. Its path is that of the line that calls it."""
    if not named(route):
        return float_call()
    path, rule = _rule(route)
    reason = _why_float(rule, (query, key, value), dropout_p, enable_gqa)
    sizes = _sizes(query, key, value)
    if reason:
        _refuse(route, rule, path, reason, sizes)
        return float_call()
    assert rule is not None
    impl = "reference" if rule.compute == "simulate" else ""
    if (route.receipt is not None or route.strict) and not torch.compiler.is_dynamo_compiling():
        batch, m, s, d, e = map(_torch.number, sizes)
        problem = problem_of((batch, 1, m, d), (batch, 1, e, s), query.device.type, query.dtype)
        ran_as = impl or ops.select("attention", problem).name
        route.need_kernel(rule, path, "attention", query, ran_as)
        fields = _record(route, path, sizes, ran_as, "A8A8", "", ops.describe("attention", ran_as, problem), query.element_size())
    else:
        fields = None
    route.replay_in_checkpoints()
    q, k, v = (t if t.ndim > 2 else t.unsqueeze(0) for t in (query, key, value))
    how: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "impl": impl, "dtype": autocast_dtype(query)}
    y = ops.attention(q, k, v, attn_mask, is_causal, **how)
    y = y if query.ndim > 2 else y.squeeze(0)
    if fields is not None:
        route.measure(fields, y, float_call, None, 1, None)
    return y


def named(route: Route) -> bool:
    """Whether a rule names attention."""
    return any("attention" in rule.ops for rule in route.policy.rules)


def stays_float(route: Route, reason: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Note that an attention of these stays float; in strict mode raise, where a rule is for it."""
    if named(route):
        path, rule = _rule(route)
        reason = reason if rule is not None and rule.weight is not None else _why_float(rule, (query, key, value), 0.0, True)
        _refuse(route, rule, path, reason, _sizes(query, key, value))


def _rule(route: Route) -> tuple[str, Rule | None]:
    path = callsite.line_or_none(route.policy, "attention")
    return path, route.rule(path, "attention")


def _refuse(route: Route, rule: Rule | None, path: str, reason: str, sizes: tuple[Any, ...]) -> None:
    route.refuse(rule, path, "attention", reason)
    _record(route, path, sizes, "float", "", reason)


def _record(
    route: Route, path: str, sizes: tuple[Any, ...], ran_as: str, mode: str, reason: str, kernel: str = "", size: int = 0
) -> Any:
    """M counts rows, N keys, K is the width of a head, batch all heads."""
    if route.receipt is None or torch.compiler.is_dynamo_compiling():
        return None
    batch, m, s, d, e = map(_torch.number, sizes)
    fields = (path, "attention", m, s, d, batch, ran_as, mode, reason)
    route.receipt.add(fields, kernel, batch * (m * d + s * d + s * e + m * e * size) if size else 0)
    return fields


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """Heads, rows, keys, and the widths of a head of keys and of values; zeros where they are no tensors of that kind."""
    if any(t.is_nested for t in (query, key, value)) or min(query.ndim, key.ndim, value.ndim) < 2:
        return (0, 0, 0, 0, 0)
    return math.prod(query.shape[:-2]), query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]


def _why_float(rule: Rule | None, tensors: tuple[Tensor, ...], dropout_p: float, enable_gqa: bool) -> str:
    if rule is None or rule.weight is None or rule.activation is None:
        return "no rule matches" if rule is None else "its rule leaves an operand in float"
    if any(quant.granularity != "row" or quant.scale != "dynamic" for quant in (rule.weight, rule.activation)):
        return "attention has dynamic scales by row, and no other"
    query, key, value = tensors
    if dropout_p > 0.0:
        return f"it has dropout ({dropout_p})"
    for t in tensors:
        if t.is_nested or t.layout is not torch.strided or not t.is_floating_point():
            return f"an operand is {t.dtype}, {t.layout}{' and nested' if t.is_nested else ''}"
    if not query.dtype == key.dtype == value.dtype:
        return f"its operands are {query.dtype}, {key.dtype} and {value.dtype}"
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or query.ndim < 2:
        return f"its batches are broadcast: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    return _why_unfit(query, key, value, enable_gqa)


def _why_unfit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str:
    """Heads and widths that only torch's own call takes, or refuses."""
    if key.shape[-1] == 0 or query.shape[-1] != key.shape[-1]:
        return f"heads of queries and keys are {query.shape[-1]} and {key.shape[-1]} wide"
    heads = [t.shape[-3] if t.ndim > 2 else 1 for t in (query, key, value)]
    shared = enable_gqa and heads[1] > 0 and heads[0] % heads[1] == 0
    if key.shape[-2] != value.shape[-2] or heads[1] != heads[2] or (heads[0] != heads[1] and not shared):
        return f"its heads are broadcast: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    return ""
