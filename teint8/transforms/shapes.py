"""Shapes of the calls that routing takes over: arguments by name, operands as ``ops.linear`` wants them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from teint8.qtensor import QTensor


def bind(names: tuple[str, ...], args: Any, kwargs: Any, also: tuple[str, ...] = ()) -> list[Any]:
    """Arguments in the order of ``names`` (or their other names in ``also``), None where they are not given."""
    values = list(args) + [None] * (len(names) - len(args))
    for i in range(len(args), len(names)):
        values[i] = kwargs.get(names[i])
        if values[i] is None and also:
            values[i] = kwargs.get(also[i])
    return values


def why_not(x: Tensor, w: Tensor) -> str:
    """Why x (..., K) by a float weight is no INT8 linear, or ""."""
    if w.ndim == 2:
        return ""
    if w.ndim != 3:
        return f"the weight has {w.ndim} dimensions; 2 or 3 are supported"
    if x.ndim == 2 or (x.ndim == 3 and x.shape[0] in (1, w.shape[0])):
        return ""
    return f"activation {tuple(x.shape)} by batched weight {tuple(w.shape)}: (B, M, K) by (B, ...) is supported"


def align(x: Tensor, w: Any) -> Tensor:
    """x expanded to the batch of a batched weight."""
    if w.ndim == 3 and (x.ndim == 2 or x.shape[0] != w.shape[0]):
        return x.expand(w.shape[0], *x.shape[-2:])
    return x


def channels(w: Any, bias: Tensor | None, rows: slice, granularity: str) -> tuple[Any, Tensor | None, slice | None]:
    """Some output channels of a weight (N, K): the weight, the bias, and what to cut from the result.

    A scale for each channel is cut with the channels. One scale in all is that of the whole weight: the whole is multiplied, and
    the result is cut.
    """
    if granularity == "tensor":
        n = w.shape[-2]
        start, stop, _ = rows.indices(n)
        return w, None if bias is None else F.pad(bias, (start, n - stop)), rows
    if not isinstance(w, QTensor):
        return w[rows], bias, None
    codes, scale = (w.codes, w.scale) if w.axis == -1 else (w.codes.mT, w.scale.mT)
    return QTensor(codes[rows], scale[rows], w.activation_scale, w.dtype), bias, None
