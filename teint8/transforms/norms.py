"""Norms where a rule names "norm": teint8's one form of each, whose codes wait for the linear or the convolution that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8 import _torch, ops
from teint8.ops.channel_norm import values_and_codes
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


_BATCH = ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps")
_BATCH_OF_TORCH = ("input", "weight", "bias", "mean", "variance", "training", "momentum", "eps")
OF_CHANNELS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.group_norm, torch.group_norm), ("input", "num_groups", "weight", "bias", "eps")),
    **dict.fromkeys((F.batch_norm, F.instance_norm), _BATCH),
    **dict.fromkeys((torch.batch_norm, torch.instance_norm), _BATCH_OF_TORCH),
}
"""Norms of channels, and the names of their arguments."""
_THEIRS = {"running_mean": "mean", "running_var": "variance", "use_input_stats": "training"}


def normalize_channels(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """GroupNorm, InstanceNorm, BatchNorm in inference: values of one form, codes for a convolution that takes them as they are."""
    if not any("norm" in rule.ops for rule in route.policy.rules):
        return route.other(func, args, kwargs)
    names = OF_CHANNELS[func]
    bound = {_THEIRS.get(name, name): value for name, value in kwargs.items()} | dict(zip(names, args, strict=False))
    x: Any = bound.get("input")
    weight, bias, mean, variance = (bound.get(name) for name in ("weight", "bias", "mean", "variance"))
    eps = bound.get("eps", 1e-5)
    instance = func in (F.instance_norm, torch.instance_norm)
    of_input = "num_groups" in names or bound.get("training", instance)
    groups: Any = bound.get("num_groups") if "num_groups" in names else (getattr(x, "shape", (0, 0))[1:2] or [1])[0]
    path, rule = _rule(route, weight)
    unwanted = _why_not_wanted(rule)
    reason = unwanted or _why_float_channels(x, groups, of_input, mean, variance, instance or "num_groups" in names)
    if reason:
        if not unwanted:
            route.refuse(rule, path, "norm", reason)
        _record_channels(route, path, x, "float", "", reason)
        return route.other(func, args, kwargs)
    assert rule is not None
    weight, bias = route.plain((weight, bias))
    mean, variance = (None, None) if of_input else (mean, variance)
    impl = "reference" if rule.compute == "simulate" else ""
    by_row = rule.activation is not None and rule.activation.granularity == "row" and rule.activation.scale == "dynamic"
    waits = by_row and not impl and route.keeps_codes() and not differentiates(x, weight, bias) and x.numel() > 0 and 3 <= x.ndim <= 5
    _record_channels(route, path, x, impl or _name_of_channels(x, groups, mean), "codes" if waits else "values", "")
    if waits:
        y, codes = values_and_codes(x, weight, bias, mean, variance, groups, eps)
        route.keep_codes(y, codes, ("conv", 1, ""))
        return y
    if mean is None or variance is None:
        return ops.group_norm(x, groups, weight, bias, eps=eps, impl=impl)
    return ops.batch_norm(x, mean, variance, weight, bias, eps=eps, impl=impl)


def _why_float_channels(x: Any, groups: Any, of_input: bool, mean: Any, variance: Any, by_sample: bool) -> str:
    reason = _why_float_at_all(x)
    if reason:
        return reason
    if of_input and not by_sample:
        return "in train mode its statistics are those of the batch: it stays as torch has it (in eval mode it need not)"
    if of_input and (mean is not None or variance is not None):
        return "it keeps running statistics: torch's form alone"
    if x.ndim < 2 or (not of_input and (mean is None or variance is None)):  # torch raises
        return f"the input has shape {tuple(x.shape)}" if x.ndim < 2 else "mean and variance are not given"
    if any(t is not None and t.requires_grad for t in (mean, variance)):
        return "its statistics want a gradient, of which there is none"  # torch raises
    if not of_input:
        return ""
    fits = groups > 0 and x.shape[1] % groups == 0 and x.shape[1:].numel() != groups
    return "" if fits else f"a group of {tuple(x.shape)} in {groups} has one value, or they do not divide the channels"


def _name_of_channels(x: Tensor, groups: int, mean: Tensor | None) -> str:
    b, c = (_torch.number(size) for size in x.shape[:2])
    p = _torch.number(x.numel()) // max(b * c, 1)
    problem = ops.Problem(x.device.type, x.dtype, 1, b, p, c, (groups,) if mean is None else ())
    return ops.select("channel_norm", problem).name if b and c and p else "reference"


def _record_channels(route: Route, path: str, x: Any, ran_as: str, mode: str, reason: str) -> None:
    """As ``_record``, of rows of channels."""
    last = x.movedim(1, -1) if isinstance(x, Tensor) and not x.is_nested and x.ndim > 1 else x
    _record(route, path, last, ran_as, mode, reason)


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


def _why_float_at_all(x: Any) -> str:
    if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
        return f"the input is {getattr(x, 'dtype', type(x).__name__)}{' and nested' if isinstance(x, Tensor) and x.is_nested else ''}"
    return "" if autocast_dtype(x) is None else "torch.autocast decides on its dtype"


def _why_float(x: Any, shape: Any) -> str:
    reason = _why_float_at_all(x)
    if reason:
        return reason
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
