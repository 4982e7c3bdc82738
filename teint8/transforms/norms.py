"""LayerNorm and RMSNorm where a rule names "norm": teint8's one form of them, whose codes wait for the linear that follows."""

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

if TYPE_CHECKING:
    from teint8.policy import Rule
    from teint8.transforms.route import Route


def normalize(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``F.layer_norm`` or ``F.rms_norm``. Values are those of ``ops.norm`` in every case; codes are made in the same kernel."""
    if not any("norm" in rule.ops for rule in route.policy.rules):
        return route.other(func, args, kwargs)
    if func is F.layer_norm:
        x, shape, weight, bias, eps = shapes.bind(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
        kind, eps = "layer", 1e-5 if eps is None else eps
    else:
        x, shape, weight, eps = shapes.bind(("input", "normalized_shape", "weight", "eps"), args, kwargs)
        kind, bias = "rms", None
        eps = torch.finfo(x.dtype).eps if eps is None else eps
    path, rule = _rule(route, weight)
    reason = _why_float(rule, x, shape)
    m, n = (0, 0) if x.ndim == 0 else (x.numel() // max(x.shape[-1], 1), x.shape[-1])
    if reason:
        route.refuse(rule, path, "norm", reason)
        _record(route, path, m, n, "float", reason)
        return route.other(func, args, kwargs)
    assert rule is not None
    impl = "reference" if rule.compute == "simulate" else ""
    _record(route, path, m, n, impl or _name(x, m, n), "")
    weight, bias = route.plain((weight, bias))
    if not impl and route.keeps_codes() and not differentiates(x, weight, bias) and 0 not in x.shape:
        y, codes = norm_and_codes(x, weight, bias, kind, eps)
        route.keep_codes(y, codes)
        return y
    return ops.norm(x, weight, bias, kind=kind, eps=eps, impl=impl)


def _rule(route: Route, weight: Any) -> tuple[str, Rule | None]:
    operand = route.operand(weight) if isinstance(weight, Tensor) else None
    if operand is None and isinstance(weight, Tensor):
        operand = Operand(weight)
    path = route.path(operand) if operand is not None else "?" if _torch.is_compiling() else callsite.line_of_call()
    return path, route.rule(path, "norm")


def _why_float(rule: Rule | None, x: Any, shape: Any) -> str:
    if rule is None or rule.weight is None or rule.activation is None:
        return "no rule matches" if rule is None else "its rule leaves it in float"
    if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
        return f"the input is {getattr(x, 'dtype', type(x).__name__)}{' and nested' if isinstance(x, Tensor) and x.is_nested else ''}"
    if torch.is_autocast_enabled(x.device.type):
        return "torch.autocast decides on its dtype"
    return "" if len(shape) == 1 else f"it is over {len(shape)} dimensions"


def _name(x: Tensor, m: int, n: int) -> str:
    m, n = _torch.number(m), _torch.number(n)
    return ops.select("norm", ops.Problem(x.device.type, x.dtype, 1, m, 0, n)).name if m and n else "reference"


def _record(route: Route, path: str, m: int, n: int, ran_as: str, reason: str) -> None:
    """A norm is no matmul: its row has no K, and "composed" and "triton" are its implementations."""
    if route.receipt is not None and not torch.compiler.is_dynamo_compiling():
        sizes = (_torch.number(m), _torch.number(n))
        route.receipt.add((path, "norm", *sizes, 0, 1, ran_as, "" if reason else "codes", reason))
