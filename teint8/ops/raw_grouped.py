"""Raw ops of rows that are sorted into groups, each with a weight of its own (mixture of experts). They have no derivative."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from teint8 import numerics
from teint8.ops import registry
from teint8.ops.raw import DTYPES, NAMES, direct
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define(
    "int8_grouped_mm(Tensor x_codes, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor ends, str dtype, str impl) -> Tensor"
)
_library.define("grouped_mm(Tensor x, Tensor w, Tensor ends) -> Tensor")
_library.define("grouped_outer(Tensor g, Tensor x, Tensor ends) -> Tensor")


def int8_grouped_mm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, ends: Tensor, dtype: torch.dtype, impl: str = ""
) -> Tensor:
    """``int8_mm`` of each group of rows by its own weight; no gradient flows.

    Args:
        x_codes: int8 (M, K), rows sorted by group.
        x_scale: float32 (M).
        w_codes: int8 (G, N, K).
        w_scale: float32 (G, N).
        ends: int32 or int64 (G): group g has the rows from ends[g - 1] (0 for the first) up to ends[g].
        dtype: float dtype of the result.
        impl: name of an implementation, "" for the best.

    Returns:
        (M, N); 0 for rows behind the last group.

    """
    if direct(x_codes, x_scale, w_codes, w_scale, ends):
        return _int8_grouped_mm(x_codes, x_scale, w_codes, w_scale, ends, NAMES[dtype], impl)
    y: Tensor = torch.ops.teint8.int8_grouped_mm(x_codes, x_scale, w_codes, w_scale, ends, NAMES[dtype], impl)
    return y


def problem_of(x: Tensor, weight_shape: Any, dtype: torch.dtype) -> Problem:
    """The Problem that a grouped matmul of x (M, K) with a weight (G, N, K) poses: ``batch`` is the number of groups."""
    groups, n, k = weight_shape
    return Problem(x.device.type, dtype, groups, x.shape[0], n, k)


def spans(ends: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """First row and end of each group.

    Raises:
        ValueError: ends that decrease, or that pass the last row.

    """
    start = 0
    for end in ends.tolist():
        if not start <= end <= rows:
            raise ValueError(f"grouped_linear: groups end at {ends.tolist()} of {rows} rows; ends must not decrease nor pass the last")
        yield start, end
        start = end


def _grouped(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A grouped matmul in a loop over its groups, whose sizes are asked of the device."""

    def run(xq: Any, xs: Any, wq: Any, ws: Any, ends: Any, dtype: torch.dtype) -> torch.Tensor:
        y = torch.zeros((xq.shape[0], wq.shape[1]), dtype=dtype, device=xq.device)
        for g, (a, b) in enumerate(spans(ends, xq.shape[0])):
            if a < b:
                y[a:b] = multiply(xq[None, a:b], xs[None, a:b], wq[g : g + 1], ws[g : g + 1], None, dtype)[0]
        return y

    return run


def _best_mm(xq: Any, xs: Any, wq: Any, ws: Any, bias: Any, dtype: torch.dtype) -> torch.Tensor:
    problem = Problem(xq.device.type, dtype, 1, xq.shape[1], wq.shape[1], xq.shape[2])
    y: torch.Tensor = registry.select("int8_mm", problem).run(xq, xs, wq, ws, bias, dtype)
    return y


registry.register("grouped_mm", "reference", _grouped(numerics.int8_mm))
registry.register("grouped_mm", "loop", _grouped(_best_mm), priority=5)


def _int8_grouped_mm(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, ends: Tensor, dtype: str, impl: str) -> Tensor:
    if 0 in (*xq.shape, *wq.shape):
        return torch.zeros((xq.shape[0], wq.shape[1]), dtype=DTYPES[dtype], device=xq.device)
    implementation = registry.select("grouped_mm", problem_of(xq, wq.shape, DTYPES[dtype]), impl)
    y: Tensor = implementation.run(xq, xs, wq, ws, ends, DTYPES[dtype])
    return y


def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], w.shape[1]))
    with torch.autocast(x.device.type, enabled=False):
        for matrix, (start, end) in zip(w, spans(ends, x.shape[0]), strict=True):
            y[start:end] = x[start:end] @ matrix.mT
    return y


def _grouped_outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    y = x.new_zeros((ends.shape[0], g.shape[1], x.shape[1]))
    with torch.autocast(x.device.type, enabled=False):
        for matrix, (start, end) in zip(y, spans(ends, x.shape[0]), strict=True):
            torch.mm(g[start:end].mT, x[start:end], out=matrix)
    return y


for _name, _run in (("int8_grouped_mm", _int8_grouped_mm), ("grouped_mm", _grouped_mm), ("grouped_outer", _grouped_outer)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::int8_grouped_mm", lib=_library)  # type: ignore[untyped-decorator]
def _int8_grouped_mm_fake(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, ends: Tensor, dtype: str, impl: str) -> Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[1]), dtype=DTYPES[dtype])


@torch.library.register_fake("teint8::grouped_mm", lib=_library)  # type: ignore[untyped-decorator]
def _grouped_mm_fake(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


@torch.library.register_fake("teint8::grouped_outer", lib=_library)  # type: ignore[untyped-decorator]
def _grouped_outer_fake(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((ends.shape[0], g.shape[1], x.shape[1]))
