"""The linear of a mixture of experts: rows sorted by expert, each by the weight of its own, with STE derivatives."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8.ops.linear import differentiates, keeps, weight_codes_of
from teint8.ops.raw import quantize
from teint8.ops.raw_grouped import int8_grouped_mm
from teint8.ops.straight import finished, hat
from teint8.qtensor import QTensor


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _Product(torch.autograd.Function):
    """Floats: rows (M, K) by the weights (G, N, K) of their groups; and what its derivatives are made of."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        y: Tensor = torch.ops.teint8.grouped_mm(x, w, ends)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w, ends = ctx.saved_tensors
        return _Product.apply(g, w.mT, ends), _Outer.apply(g, x, ends), None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, _: Any) -> Tensor:  # type: ignore[override]
        x, w, ends = ctx.saved_tensors
        parts = [] if dx is None else [_Product.apply(dx, w, ends)]
        return _total([*parts, *([] if dw is None else [_Product.apply(x, dw, ends)])])


class _Outer(torch.autograd.Function):
    """Floats: for each group G^T X (G, N, K) of its rows."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        y: Tensor = torch.ops.teint8.grouped_outer(g, x, ends)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:  # type: ignore[override]
        g, x, ends = ctx.saved_tensors
        return _Product.apply(x, h, ends), _Product.apply(g, h.mT, ends), None

    @staticmethod
    def jvp(ctx: Any, dg: Any, dx: Any, _: Any) -> Tensor:  # type: ignore[override]
        g, x, ends = ctx.saved_tensors
        parts = [] if dg is None else [_Outer.apply(dg, x, ends)]
        return _total([*parts, *([] if dx is None else [_Outer.apply(g, dx, ends)])])


class _How(NamedTuple):
    """What is not a tensor; ``keep`` as for the linear."""

    dtype: torch.dtype
    gradient: str
    impl: str
    keep: bool


class _Grouped(torch.autograd.Function):
    """y = x_hat @ w_hat[group]^T from codes. With ``gradient`` dX is in INT8; dW is in float."""

    @staticmethod
    def forward(
        x: Tensor, w: Any, xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, wtq: Any, wts: Any, ends: Tensor, seed: Any, how: _How
    ) -> Tensor:
        return int8_grouped_mm(xq, xs, wq, ws, ends, how.dtype, how.impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, xq, xs, wq, ws, wtq, wts, ends, seed, how = inputs
        ctx.set_materialize_grads(False)
        ctx.how, ctx.dtypes = how, [None if t is None else t.dtype for t in (x, w)]
        ctx.save_for_forward(x, w, xq, xs, wq, ws, ends)
        ctx.save_for_backward(*((x, w) if how.keep else (None, None)), xq, xs, wq, ws, wtq, wts, ends, seed)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:  # type: ignore[override]
        grads: list[Any] = [None, None]
        if g is not None:
            x, w, xq, xs, wq, ws, wtq, wts, ends, seed = ctx.saved_tensors
            how: _How = ctx.how
            w_hat: Any = None
            if ctx.needs_input_grad[0] and (how.keep or wtq is None):
                w_hat = hat(w, wq, ws, None, g.dtype)
            if ctx.needs_input_grad[0]:
                grads[0] = _dgrad(g, w_hat, wtq, wts, ends, seed, how) if how.gradient else _Product.apply(g, w_hat.mT, ends)
            if ctx.needs_input_grad[1]:
                grads[1] = _Outer.apply(g, hat(x, xq, xs, None, g.dtype), ends)
            grads = finished(grads, ctx.dtypes, how.keep)
        return (*grads, *[None] * 9)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, w, xq, xs, wq, ws, ends = ctx.saved_tensors
        dtype = ctx.how.dtype
        parts = []
        if dx is not None:
            parts.append(_Product.apply(dx.to(dtype), hat(w, wq, ws, None, dtype), ends))
        if dw is not None:
            parts.append(_Product.apply(hat(x, xq, xs, None, dtype), dw.to(dtype), ends))
        return _total(parts)


def _dgrad(g: Tensor, w_hat: Any, wtq: Any, wts: Any, ends: Tensor, seed: Any, how: _How) -> Tensor:
    """dX = G W_hat in INT8: G by token against W by input channel."""
    gq, gs = quantize(g.detach(), seed=seed, impl=how.impl)
    if wtq is None:
        wtq, wts = quantize(w_hat.detach().mT, impl=how.impl)
    if not how.keep:
        return int8_grouped_mm(gq, gs, wtq, wts, ends, g.dtype, how.impl)
    again = how._replace(dtype=g.dtype, gradient="")
    y: Tensor = _Grouped.apply(g, w_hat.mT, gq, gs, wtq, wts, None, None, ends, None, again)
    return y


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as for the linear: Dynamo must not trace the Functions
def _grouped(x: Tensor, w: Tensor | None, w_codes: tuple[Tensor, ...], ends: Tensor, gradient: str, impl: str) -> Tensor:
    xq, xs = quantize(x.detach(), impl=impl)
    wq, ws, *transposed = w_codes
    wtq, wts = transposed or (None, None)
    if not differentiates(x, w):
        return int8_grouped_mm(xq, xs, wq, ws, ends, x.dtype, impl)
    seed = torch.randint(2**62, (), device=x.device) if gradient == "stochastic" else None
    y: Tensor = _Grouped.apply(x, w, xq, xs, wq, ws, wtq, wts, ends, seed, _How(x.dtype, gradient, impl, keeps()))
    return y


def grouped_linear(
    x: Tensor,
    weight: Tensor | QTensor,
    ends: Tensor,
    *,
    weight_granularity: str = "row",
    gradient: str | None = None,
    impl: str = "",
    weight_codes: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """``linear`` of rows sorted into groups, each by a weight of its own: ``F.grouped_mm`` of a mixture of experts.

    Row m of group g is ``linear(x[m], weight[g])``, bit for bit, forward; dX = G W_hat and dW = G^T X_hat of each group.

    Args:
        x: (M, K), float32, bfloat16, float16 or float64, its rows sorted by group.
        weight: (G, N, K) of that dtype, or its QTensor.
        ends: int32 or int64 (G): group g has the rows from ends[g - 1] (0 for the first) up to ends[g].
        weight_granularity: "row" or "tensor" (a scale for each expert), for a float weight.
        gradient: None for a float backward; "nearest" or "stochastic" for dX in INT8. dW is in float: a group's tokens are known
            on the GPU alone.
        impl: name of an implementation, "" for the best.
        weight_codes: what ``weight_codes_of`` made of a float weight, if that was done before.

    Returns:
        (M, N), in the dtype of x; 0 for rows behind the last group.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not; on a CPU, ends that decrease or pass the last row.

    ``torch.func.vmap`` over it raises: groups of each example differ.

    Examples:
        >>> x, w = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> grouped_linear(x, w, torch.tensor([1, 2], dtype=torch.int32))
        tensor([[1.0079],
                [4.0000]])

    """
    packed = weight if isinstance(weight, QTensor) else None
    w: Any = None if packed is not None else weight
    _check(x, weight, ends)
    if packed is not None:
        codes: tuple[Tensor, ...] = packed.rows()
    else:
        codes = weight_codes or weight_codes_of(w, weight_granularity, bool(gradient) and differentiates(x, w), impl)
    y: Tensor = _grouped(x, w, codes, ends, gradient or "", impl)
    return y


def _check(x: Tensor, weight: Tensor | QTensor, ends: Tensor) -> None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and ends {tuple(ends.shape)}"
    if not x.is_floating_point() or x.dtype != weight.dtype or ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"grouped_linear: x is {x.dtype}, weight {weight.dtype}, ends {ends.dtype}; one float dtype, and int32 or int64, are needed"
        )
    axis: Any = weight.axis if isinstance(weight, QTensor) else -1
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[axis] or ends.shape != weight.shape[:1]:
        raise ValueError(f"grouped_linear: {shapes} do not fit; (M, K), (G, N, K) and (G,) are needed")
    if not x.device == weight.device == ends.device:
        raise ValueError(f"grouped_linear: x is on {x.device}, weight on {weight.device}, ends on {ends.device}; one device is needed")
