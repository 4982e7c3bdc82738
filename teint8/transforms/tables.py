"""Lookups in tables: ``F.embedding`` and ``F.embedding_bag``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from teint8 import _torch, ops
from teint8.qtensor import QTensor
from teint8.transforms import shapes

if TYPE_CHECKING:
    from teint8.policy import Rule
    from teint8.transforms.route import Route

_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
        "include_last_offset", "padding_idx")  # fmt: skip
FUNCTIONS = (F.embedding, F.embedding_bag)


def look_up(route: Route, func: Any, args: Any, kwargs: Any, weight: Any) -> Any:
    """The rows of INT8 where a rule names "embedding", or where the table is packed; else torch's own call.

    Args:
        weight: the Operand of the table.

    """
    bag = func is F.embedding_bag
    names = _BAG if bag else _EMBEDDING
    given = dict(zip(names, shapes.bind(names, args, kwargs), strict=True))
    ids, _ = given.pop("input"), given.pop("weight")
    if weight.conditioning is not None:  # rows are looked up as the model has them
        weight = weight._replace(value=weight.conditioning.dequantize(), conditioning=None)
    path = route.path(weight)
    rule = route.rule(path, "embedding")
    packed = isinstance(weight.value, QTensor) and weight.value.axis == -1 and not weight.transposed
    reason = _why_not(rule, weight.value, given)
    if reason and not (packed and given["max_norm"] is None):
        if not isinstance(weight.value, QTensor):  # else it is noted where it is dequantized
            _note(route, path, ids, weight, "float", reason, rule)
        return func(*route.plain(args), **route.plain(kwargs))
    if not reason:
        weight = route.packed(weight, -1, "row") if route.surveys else weight
    _note(route, path, ids, weight, "dequantized", "", rule)
    how = {name: value for name, value in given.items() if value is not None and name not in ("max_norm", "norm_type", "offsets")}
    impl = "reference" if rule is not None and rule.compute == "simulate" else ""
    if bag:
        return ops.embedding_bag(ids, weight.value, given["offsets"], impl=impl, **how)
    return ops.embedding(ids, weight.value, impl=impl, **how)


def _why_not(rule: Rule | None, table: Any, given: dict[str, Any]) -> str:
    if rule is None or rule.weight is None:
        return "tables are looked up as INT8 where a rule names 'embedding'" if rule is None else "its rule leaves the weight in float"
    if given["max_norm"] is not None:
        return "max_norm edits the table in place"
    if rule.weight.granularity != "row":
        return "a row of a table has a scale of its own: Quant(granularity='row')"
    if isinstance(table, Tensor) and not table.is_floating_point():
        return f"the table is {table.dtype}"
    if isinstance(table, QTensor) and table.axis != -1:
        return f"the table was packed along {table.axis}"
    return "" if table.ndim == 2 else f"the table has {table.ndim} dimensions"


def _note(route: Route, path: str, ids: Any, weight: Any, ran_as: str, reason: str, rule: Rule | None) -> None:
    wanted = rule is not None and rule.weight is not None
    if route.strict and wanted and reason:
        raise ValueError(
            f"strict: {path} (embedding) cannot run in INT8: {reason}. Leave it in float with "
            f"Rule({path!r}, ops=('embedding',), weight=None) before the other rules, or leave strict off"
        )
    if route.receipt is None or (_torch.is_compiling() and not wanted) or (not wanted and not isinstance(weight.value, QTensor)):
        return
    rows, features = weight.value.shape[-2:]
    sizes = map(_torch.number, (ids.numel(), features, rows))
    route.receipt.add((path, "embedding", *sizes, 1, ran_as, "" if reason else "W8A16", reason))
