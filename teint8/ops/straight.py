"""The straight-through estimator (Bengio et al., 2013): values of the codes, derivatives of the floats."""

from typing import Any

import torch
from torch import Tensor

from teint8.ops.raw import dequantize


class _Straight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor, clipped: Tensor | None) -> Tensor:
        return dequantize(codes, scale, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[3])
        ctx.save_for_forward(inputs[3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return unclipped(g, ctx.saved_tensors[0]), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return unclipped(dx.clone(), ctx.saved_tensors[0])


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, anchor: Tensor) -> Tensor:
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "teint8: a second derivative was asked of a backward whose residuals are INT8 codes; it would lose the terms that "
            "move with x and w. Take both derivatives with torch.func (grad, jvp, hessian of a quantized function), which keeps them."
        )


class _Moved(torch.autograd.Function):
    """Values of one tensor, derivatives of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, moving: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return None, g

    @staticmethod
    def jvp(ctx: Any, _: Any, moving: Tensor) -> Tensor:  # type: ignore[override]
        return moving.clone()


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as for the linear: Dynamo must not trace the Function
def moved(value: Tensor, moving: Tensor) -> Tensor:
    """``value``, with the derivatives of ``moving``."""
    y: Tensor = _Moved.apply(value, moving)
    return y


def hat(x: Tensor | None, codes: Any, scale: Any, clipped: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x_hat`` in ``dtype``: it moves with ``x`` where x is given; x itself where there are no codes.

    Args:
        x: (..., K) float, or None for a constant.
        codes: int8 (..., K) or None.
        scale: float32 (...).
        clipped: bool (..., K), where a static scale clipped and no gradient flows, or None.
        dtype: of the result.

    """
    if codes is None:
        return x.to(dtype)  # type: ignore[union-attr]
    if x is None:
        return dequantize(codes, scale, dtype)
    value: Tensor = _Straight.apply(x, codes, scale, clipped)
    return value.to(dtype)


def unclipped(g: Tensor, clipped: Tensor | None) -> Tensor:
    """The gradient, 0 where a static scale clipped."""
    return g if clipped is None else g.masked_fill(clipped, 0)


def no_second_derivative(g: Tensor) -> Tensor:
    """``g``, with a derivative that raises: codes cannot say how they move with the values that they came from."""
    anchor = torch.zeros((), device="cpu", requires_grad=True)
    guarded: Tensor = _NoSecondDerivative.apply(g, anchor)
    return guarded


def finished(grads: list[Any], dtypes: list[Any], keep: bool) -> list[Any]:
    """Gradients in the dtypes of what they are of; with a derivative that raises where residuals were codes (not ``keep``)."""
    grads = [None if d is None else d.to(dtype) for d, dtype in zip(grads, dtypes, strict=True)]
    if keep or not torch.is_grad_enabled():
        return grads
    return [None if d is None else no_second_derivative(d) for d in grads]
