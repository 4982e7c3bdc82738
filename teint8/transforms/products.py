"""Products by a weight that are written as contractions, and calls that stay float."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teint8.qtensor import QTensor
from teint8.transforms import contractions, shapes
from teint8.transforms.operands import Operand

if TYPE_CHECKING:
    from teint8.transforms.route import Route


def stays_float(op: str, reason: str) -> Callable[[Route, Any, Any, Any], Any]:
    """A call that may multiply by a weight and is not taken over: it stays float, and the receipt says so."""

    def run(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
        flat = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (tuple, list)) else (a,))]
        weights = [route.operand(t) for t in flat if isinstance(t, Tensor) and t.ndim > 1]
        for weight in weights:
            if weight is not None:
                route.stays_float(weight, op, reason)
        return route.other(func, args, kwargs)

    return run


def einsum(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.einsum``."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or kwargs or len(operands) != 2:
        return stays_float("matmul", "einsum of two operands by an equation is taken over")(route, func, args, kwargs)
    weight_first = route.operand(operands[0]) is not None and route.operand(operands[1]) is None
    x, w = reversed(operands) if weight_first else operands

    def in_float() -> Any:
        return torch.ops.aten.einsum(equation, list(route.plain(operands)))

    return _contracted(route, w, lambda: contractions.einsum(equation, x, w, weight_first), in_float)


def tensordot(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.tensordot``."""
    if kwargs.get("out") is not None:
        return stays_float("matmul", "out= is not supported")(route, func, args, kwargs)
    x, w, dims = shapes.bind(("a", "b", "dims"), args, kwargs)
    ours, theirs = contractions.dims_of(x, 2 if dims is None else dims)

    def in_float() -> Any:
        return torch.ops.aten.tensordot(*route.plain((x, w)), ours, theirs)

    return _contracted(route, w, lambda: contractions.tensordot(x, w, ours, theirs), in_float, x)


def inner(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.inner``."""
    if kwargs.get("out") is not None:
        return stays_float("matmul", "out= is not supported")(route, func, args, kwargs)
    x, w = shapes.bind(("self", "other"), args, kwargs, also=("input", "other"))
    return _contracted(route, w, lambda: contractions.inner(x, w), lambda: torch.ops.aten.inner(*route.plain((x, w))), x)


def _contracted(
    route: Route, w: Any, product_of: Callable[[], contractions.Product | str], in_float: Callable[[], Any], first: Any = None
) -> Any:
    """A product by w that is written as a contraction, where w is a weight; ``first`` comes before it, and may be one."""
    weight = route.operand(w)
    if weight is None:
        before = route.operand(first) if isinstance(first, Tensor) and first.ndim > 1 else None
        if before is not None:
            route.stays_float(before, "matmul", "the weight comes first: tensordot and inner are taken over where it comes second")
        return in_float()
    product = product_of()
    if not isinstance(product, str) and product.x.shape[-1] != w.shape[product.axis]:
        product = f"{product.x.shape[-1]} features by {w.shape[product.axis]}: what torch broadcasts is not taken over"
    if isinstance(product, str):
        route.stays_float(weight, "matmul", product)
        return in_float()
    y = route.multiply("matmul", product.x, weight, product.axis, None, lambda: None)
    if y is None:  # it stayed float: torch's own op, whose rounding is its own
        return in_float()
    return y if product.order is None else y.permute(product.order)


def bilinear(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """y = x1^T W x2 + b, for each output channel: the product by the second input in INT8, the sum over the first in float."""
    first, second, w, bias = shapes.bind(("input1", "input2", "weight", "bias"), args, kwargs)
    weight = route.operand(w) or Operand(w)
    rule = route.rule(route.path(weight), "matmul")

    def in_float() -> Any:
        return torch.ops.aten.bilinear(*route.plain((first, second, w, bias)))

    if rule is not None and rule.weight is not None and rule.weight.granularity != "row":
        route.stays_float(weight, "matmul", "bilinear is taken over with a scale for each row of the weight")
        return in_float()
    value = weight.value
    if isinstance(value, QTensor):
        flat: Any = QTensor(value.codes.flatten(0, 1), value.scale.flatten(0, 1), value.activation_scale, value.dtype)
    else:
        flat = value.flatten(0, 1)
    y = route.multiply("matmul", second, Operand(flat, route.path(weight)), -1, None, lambda: None)
    if y is None:  # it stayed float
        return in_float()
    first, bias = route.plain((first, bias))
    y = (y.unflatten(-1, value.shape[:2]) * first.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias
