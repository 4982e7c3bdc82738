"""Norms where a rule names "norm": of LayerNorm and RMSNorm teint8's one form, whose codes wait for the linear that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8 import _torch, ops
from teint8.ops.linear import differentiates
from teint8.ops.norm import norm_and_codes
from teint8.transforms import callsite, shapes
from teint8.transforms.operands import Operand
from teint8.transforms.reasons import autocast_dtype

if TYPE_CHECKING:
    from teint8.policy import Rule
    from teint8.transforms.route import Route


def normalize(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``F.layer_norm`` or ``F.rms_norm``. Values are those of ``ops.norm`` in every case; codes are made in the same kernel."""
    if not any("norm" in rule.ops for rule in route.policy.rules):
        return route.other(func, args, kwargs)
    layer = func in (F.layer_norm, torch.layer_norm)
    names = ("input", "normalized_shape", "weight", "bias", "eps") if layer else ("input", "normalized_shape", "weight", "eps")
    x, shape, weight, *rest = shapes.bind(names, args, kwargs)
    path, rule = _rule(route, weight)
    unwanted = _why_not_wanted(rule)
    reason = unwanted or _why_float(x, shape)
    if reason:
        if not unwanted:
            route.refuse(rule, path, "norm", reason)
        _record(route, path, x, "float", "", reason)
        return route.other(func, args, kwargs)
    assert rule is not None
    kind, bias, eps = ("layer", rest[0], rest[1]) if layer else ("rms", None, rest[0])
    eps = (1e-5 if layer else torch.finfo(x.dtype).eps) if eps is None else eps
    impl = "reference" if rule.compute == "simulate" else ""
    weight, bias = route.plain((weight, bias))
    by_row = rule.activation is not None and rule.activation.granularity == "row" and rule.activation.scale == "dynamic"
    waits = by_row and not impl and route.keeps_codes() and not differentiates(x, weight, bias) and 0 not in x.shape
    _record(route, path, x, impl or _name(x), "codes" if waits else "values", "")
    if waits:
        y, codes = norm_and_codes(x, weight, bias, kind, eps)
        route.keep_codes(y, codes)
        return y
    return ops.norm(x, weight, bias, kind=kind, eps=eps, impl=impl)


OTHERS: dict[Any, int] = {
    **dict.fromkeys((torch.batch_norm, torch.instance_norm), 1),
    **dict.fromkeys((F.group_norm, torch.group_norm), 2),
    **dict.fromkeys((F.batch_norm, F.instance_norm), 3),
}
"""Norms that stay as torch has them, and where their weight is among the arguments."""


def leave(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """GroupNorm, BatchNorm or InstanceNorm: in float, and said so where a rule names norms."""
    if any("norm" in rule.ops for rule in route.policy.rules):
        weight = kwargs.get("weight", args[OTHERS[func]] if len(args) > OTHERS[func] else None)
        path, rule = _rule(route, weight)
        name = func.__name__
        reason = _why_not_wanted(rule)
        if not reason:
            reason = f"{name} has torch's form alone: what follows quantizes its values (BatchNorm: fold_batchnorm)"
            route.refuse(rule, path, "norm", reason)
        _record(route, path, args[0] if args else kwargs.get("input"), "float", "", reason)
    return route.other(func, args, kwargs)


def _rule(route: Route, weight: Any) -> tuple[str, Rule | None]:
    operand = route.operand(weight) if isinstance(weight, Tensor) else None
    if operand is None and isinstance(weight, Tensor):
        operand = Operand(weight)
    path = route.path(operand) if operand is not None else callsite.line_or_none(route.policy, "norm")
    return path, route.rule(path, "norm")


def _why_not_wanted(rule: Rule | None) -> str:
    if rule is None or rule.weight is None or rule.activation is None:
        return "no rule matches" if rule is None else "its rule leaves it in float"
    return ""


def _why_float(x: Any, shape: Any) -> str:
    if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
        return f"the input is {getattr(x, 'dtype', type(x).__name__)}{' and nested' if isinstance(x, Tensor) and x.is_nested else ''}"
    if autocast_dtype(x) is not None:
        return "torch.autocast decides on its dtype"
    sizes = [shape] if isinstance(shape, int) else list(shape)
    return (
        "" if sizes == list(x.shape[-1:]) and x.ndim else f"it is over {sizes} of {tuple(x.shape)}, not over the last dimension alone"
    )


def _name(x: Tensor) -> str:
    n = _torch.number(x.shape[-1])
    m = _torch.number(x.numel()) // max(n, 1)
    return ops.select("norm", ops.Problem(x.device.type, x.dtype, 1, m, 0, n)).name if m and n else "reference"


def _record(route: Route, path: str, x: Any, ran_as: str, mode: str, reason: str) -> None:
    """A norm is no matmul: its rows have no K."""
    if route.receipt is None or torch.compiler.is_dynamo_compiling():
        return
    known = isinstance(x, Tensor) and not x.is_nested and x.ndim > 0
    n = _torch.number(x.shape[-1]) if known else 0
    m = _torch.number(x.numel()) // max(n, 1) if known else 0
    route.receipt.add((path, "norm", m, n, 0, 1, ran_as, mode, reason))
