"""Activation functions with derivatives, whose values have the same bits in every kernel that they are fused into."""

import math
from typing import Any

import torch
from torch import Tensor

from teint8.activations import KINDS
from teint8.ops import raw_both
from teint8.ops.linear import keeps


class _Activate(torch.autograd.Function):
    """act(g), or act(g) * u."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, u: Tensor | None, kind: str, keep: bool, impl: str) -> Tensor:
        return raw_both.activation(g, u, kind=kind, values=True, impl=impl)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, u, ctx.kind, ctx.keep, ctx.impl = inputs
        ctx.save_for_backward(g, u)
        ctx.save_for_forward(g, u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override]
        g, u = ctx.saved_tensors
        if ctx.keep or torch.is_grad_enabled():
            z, slope = value_and_slope(g, ctx.kind)
            d = d.float()
            if u is None:
                return (d * slope).to(g.dtype), None, None, None, None
            return (d * u.float() * slope).to(g.dtype), (d * z).to(u.dtype), None, None, None
        out = raw_both.activation(g, u, d, kind=ctx.kind, values=True, impl=ctx.impl)
        return out[0], out[1] if u is not None else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dg: Any, du: Any, *_: Any) -> Tensor:  # type: ignore[override]
        g, u = ctx.saved_tensors
        z, slope = value_and_slope(g, ctx.kind)
        out = torch.zeros_like(g, dtype=torch.float32)
        if dg is not None:
            out = out + dg.float() * slope * (1.0 if u is None else u.float())
        if du is not None:
            out = out + z * du.float()
        return out.to(g.dtype)


def value_and_slope(g: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(g) and its derivative in float32, of torch's own differentiable functions: for second derivatives."""
    x = g.float()
    if kind == "silu":
        s = torch.sigmoid(x)
        return x * s, s + x * s * (1 - s)
    if kind == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * 0.3989422804014327
    s = torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as ops/linear.py says
def _activate(g: Tensor, u: Tensor | None, kind: str, keep: bool, impl: str) -> Tensor:
    y: Tensor = _Activate.apply(g, u, kind, keep, impl)
    return y


def activate(kind: str, g: Tensor, u: Tensor | None = None, *, impl: str = "") -> Tensor:
    """``act(g)`` or, gated, ``act(g) * u``, in float32 and rounded once to the dtype of g.

    The value that the fused MLPs quantize, in every bit; within 5e-6 of torch's own (``tests/test_kernels.py``).

    Args:
        kind: "silu", "gelu" (erf) or "gelu_tanh".
        g: (..., N), any float dtype.
        u: the same, or None.
        impl: name of an implementation, "" for the best.

    Returns:
        The dtype and shape of g.

    Raises:
        ValueError: an unknown kind, or u that does not fit g.
        TypeError: not floats.

    Examples:
        >>> activate("silu", torch.tensor([[1.0]]), torch.tensor([[2.0]]))
        tensor([[1.4621]])

    """
    if kind not in KINDS:
        raise ValueError(f"activate: kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    if not g.is_floating_point():
        raise TypeError(f"activate: g has dtype {g.dtype}; a float tensor is needed")
    if u is not None and (u.shape != g.shape or u.dtype != g.dtype or u.device != g.device):
        raise ValueError(
            f"activate: g is {g.dtype} {tuple(g.shape)} on {g.device} but u is {u.dtype} {tuple(u.shape)} on {u.device}; "
            "both must be alike"
        )
    shape = (math.prod(g.shape[:-1]), g.shape[-1]) if g.ndim != 1 else (1, g.shape[0])
    flat: Tensor = _activate(g.reshape(shape), None if u is None else u.reshape(shape), kind, keeps(), impl)
    y: Tensor = flat.reshape(g.shape)
    return y
