"""Lookups in INT8 tables: a scale for each row, so that a row is quantized after it was looked up, or before, with the same bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8.ops.raw import dequantize, quantize
from teint8.ops.straight import hat
from teint8.qtensor import QTensor


def embedding(ids: Tensor, weight: Tensor | QTensor, *, impl: str = "", **how: Any) -> Tensor:
    """``F.embedding`` of a table whose rows are INT8, with the straight-through derivative to the float table.

    Args:
        ids: integers of any shape.
        weight: (rows, features), any float dtype, or its QTensor: rows are dequantized as they are looked up.
        impl: name of an implementation of ``quantize``, "" for the best.
        how: padding_idx, scale_grad_by_freq and sparse, as in torch.

    Returns:
        (*ids.shape, features), in the table's dtype.

    Raises:
        TypeError: ids that are neither int32 nor int64.
        ValueError: a table that is not of two dimensions, or packed along its rows.

    Examples:
        >>> embedding(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
        tensor([[2.9921, 5.0000],
                [1.0079, 2.0000]])

    """
    _check(ids, weight)
    if isinstance(weight, QTensor):
        codes, scale = weight.rows()
        flat = ids.reshape(-1)
        rows = dequantize(codes.index_select(0, flat), scale.index_select(0, flat), weight.dtype)
        return rows.view(*ids.shape, rows.shape[-1])
    rows = F.embedding(ids, weight, **how)
    return _on_the_grid(rows, impl)  # type: ignore[no-any-return]


def embedding_bag(ids: Tensor, weight: Tensor | QTensor, offsets: Tensor | None = None, *, impl: str = "", **how: Any) -> Any:
    """``F.embedding_bag`` of a table whose rows are INT8: sums, means or maxima of its rows.

    Args:
        ids: integers (bags, length), or (ids,) with offsets.
        weight, impl: as for ``embedding``.
        offsets: where each bag begins, as in torch.
        how: mode, per_sample_weights, include_last_offset, padding_idx and more, as in torch.

    Returns:
        (bags, features).

    Raises:
        TypeError, ValueError: as for ``embedding``.

    Examples:
        >>> embedding_bag(torch.tensor([[0, 1]]), torch.tensor([[1.0, 2.0], [3.0, 5.0]]), mode="sum")
        tensor([[4., 7.]])

    """
    _check(ids, weight)
    padding = how.pop("padding_idx", None)
    table = {name: how.pop(name) for name in ("scale_grad_by_freq", "sparse") if name in how}
    rows = embedding(ids.reshape(-1), weight, impl=impl, **(table if isinstance(weight, Tensor) else {}))
    at = torch.arange(ids.numel(), device=ids.device)
    if padding is not None:  # rows that a bag leaves out are one row, behind all others
        count = weight.shape[0]
        if not -count <= padding < count:
            raise ValueError(f"embedding_bag: padding_idx is {padding}; the table has {count} rows")
        left_out = ids.reshape(-1) == (padding % count)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        at = torch.where(left_out, ids.numel(), at)
        how["padding_idx"] = -1
    return F.embedding_bag(at.view(ids.shape).to(ids.dtype), rows, offsets, **how)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as for the linear: Dynamo must not trace the Function
def _on_the_grid(rows: Tensor, impl: str) -> Tensor:
    codes, scale = quantize(rows.detach(), impl=impl)
    return hat(rows, codes, scale, None, rows.dtype)


def _check(ids: Tensor, weight: Tensor | QTensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embedding: ids are {ids.dtype}; int32 or int64 are needed")
    if weight.ndim != 2 or (isinstance(weight, QTensor) and weight.axis != -1):
        axis = f", packed along {weight.axis}" if isinstance(weight, QTensor) else ""
        raise ValueError(f"embedding: the table has shape {tuple(weight.shape)}{axis}; (rows, features), packed along -1, is needed")
