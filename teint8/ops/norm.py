"""RMSNorm and LayerNorm with derivatives, and the linears that follow one: the residual, the norm and the codes in one kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8.norms import KINDS
from teint8.ops import raw, registry
from teint8.ops.linear import differentiates, keeps
from teint8.ops.mlp import merged_linear
from teint8.ops.registry import Problem
from teint8.qtensor import QTensor

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, float eps, bool codes, bool values, str impl) -> Tensor[]"
)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    codes: bool,
    values: bool,
    impl: str,
) -> list[Tensor]:
    if x.numel() == 0:
        return [torch.empty_like(x)] * (residual is not None) + [torch.empty_like(x)] * values + list(raw.quantize(x)) * codes
    problem = Problem(x.device.type, x.dtype, 1, x.shape[0], 0, x.shape[1])
    tensors = [None if t is None else t.detach() for t in (x, residual, weight, bias)]
    out: list[Tensor] = registry.select("norm", problem, impl).run(*tensors, kind, eps, codes, values)
    return out


_library.impl("norm", _norm, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::norm", lib=_library)  # type: ignore[untyped-decorator]
def _norm_fake(
    x: Tensor, residual: Any, weight: Any, bias: Any, kind: Any, eps: Any, codes: bool, values: bool, impl: str
) -> list[Tensor]:
    out = [x.new_empty(x.shape) for _ in range((residual is not None) + values)]
    return out + [x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)] * codes


@torch.library.register_vmap("teint8::norm", lib=_library)  # type: ignore[untyped-decorator]
def _norm_vmap(info: Any, in_dims: Any, x: Tensor, residual: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    x, residual, weight, bias = (
        None if t is None else raw.front(t, dim, info.batch_size) for t, dim in zip((x, residual, weight, bias), in_dims, strict=False)
    )
    assert x is not None
    if in_dims[2] is None and in_dims[3] is None:  # the mapped dimension folds into the rows
        flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, residual)]
        one = [None if t is None else t[0] for t in (weight, bias)]
        out = torch.ops.teint8.norm(*flat, *one, *rest)
        return [t.unflatten(0, x.shape[:2]) for t in out], [0] * len(out)
    each = [[None if t is None else t[i] for t in (x, residual, weight, bias)] for i in range(info.batch_size)]
    made = [torch.ops.teint8.norm(*tensors, *rest) for tensors in each]
    return [torch.stack(t) for t in zip(*made, strict=True)], [0] * len(made[0])


def _raw(
    x: Tensor, residual: Tensor | None, weight: Any, bias: Any, kind: str, eps: float, codes: bool, values: bool, impl: str
) -> Any:
    op = _norm if raw.direct(x, residual, weight, bias) else torch.ops.teint8.norm
    return op(x, residual, weight, bias, kind, eps, codes, values, impl)


def _parts(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized row and 1 / sqrt(variance + eps) in float32, of torch's own differentiable functions."""
    c = x.float()
    c = c - c.mean(-1, keepdim=True) if kind == "layer" else c
    inverse = torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)
    return c * inverse, inverse


def _centered(x: Tensor, kind: str) -> Tensor:
    return x - x.mean(-1, keepdim=True) if kind == "layer" else x


class _Norm(torch.autograd.Function):
    """The norm of x (M, K)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, keep: bool, impl: str) -> Tensor:
        y: Tensor = _raw(x, None, weight, bias, kind, eps, False, True, impl)[0]
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.kind, ctx.eps, ctx.keep, _ = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if of_one_dtype(x, weight) and not ctx.keep and not torch.is_grad_enabled():
            form = F.layer_norm if ctx.kind == "layer" else F.rms_norm
            dx, dw = native_gradients(lambda x, w: form(x, x.shape[-1:], w, eps=ctx.eps), x, weight, g, ctx.needs_input_grad)
            db = g.float().sum(0).to(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
            return dx, dw, db, None, None, None, None
        n, inverse = _parts(x, ctx.kind, ctx.eps)
        g = g.float()
        gw = g if weight is None else g * weight.float()
        dx = inverse * _centered(gw - n * (gw * n).mean(-1, keepdim=True), ctx.kind)
        dw = None if weight is None else (g * n).sum(0).to(weight.dtype)
        return dx.to(x.dtype), dw, None if ctx.bias is None else g.sum(0).to(ctx.bias), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, db: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        n, inverse = _parts(x, ctx.kind, ctx.eps)
        out = torch.zeros_like(n)
        if dx is not None:
            dc = _centered(dx.float(), ctx.kind)
            dn = inverse * (dc - n * (n * dc).mean(-1, keepdim=True))
            out = out + (dn if weight is None else dn * weight.float())
        if dw is not None:
            out = out + n * dw.float()
        return (out if db is None else out + db.float()).to(x.dtype)


def of_one_dtype(x: Tensor, weight: Tensor | None) -> bool:
    """Whether torch's own kernels take both as they are: a weight of another dtype would be rounded, and its gradient, too."""
    return weight is None or weight.dtype == x.dtype


def native_gradients(
    form: Callable[[Tensor, Any], Tensor], x: Tensor, weight: Tensor | None, g: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of torch's own ``form(x, weight)``, those that are needed, by its fused kernels."""
    with torch.enable_grad():
        leaves = [None if t is None or not need else t.detach().requires_grad_() for t, need in zip((x, weight), needs, strict=False)]
        a, w = (t if leaf is None else leaf for leaf, t in zip(leaves, (x, weight), strict=True))
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(form(a, w), wanted, g) if wanted else ())  # type: ignore[arg-type]
    return [None if leaf is None else next(found) for leaf in leaves]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as ops/linear.py says
def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, keep: bool, impl: str) -> Tensor:
    y: Tensor = _Norm.apply(x, weight, bias, kind, eps, keep, impl)
    return y


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"norm: kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    if not x.is_floating_point() or x.ndim == 0:
        raise TypeError(f"norm: x is {x.dtype} {tuple(x.shape)}; floats (..., K) are needed")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.shape != x.shape[-1:] or not t.is_floating_point() or t.device != x.device):
            raise ValueError(
                f"norm: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; floats ({x.shape[-1]},) on {x.device} are needed"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"norm: x is {x.dtype} {tuple(x.shape)} on {x.device} but residual is {residual.dtype} {tuple(residual.shape)} on "
            f"{residual.device}; both must be alike"
        )


def norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, kind: str = "rms", eps: float = 1e-6, impl: str = ""
) -> Tensor:
    """RMSNorm or LayerNorm of the last dimension, in the form that ``norm_linear`` quantizes, in every bit (``teint8.norms``).

    Args:
        x: (..., K), any float dtype.
        weight, bias: (K,), or None.
        kind: "rms" or "layer".
        eps: added to the variance.
        impl: name of an implementation, "" for the best.

    Returns:
        (..., K) in the dtype of x; ``tests/test_norm.py`` compares it with float64.

    Raises:
        ValueError: an unknown kind, or shapes that do not fit.
        TypeError: not floats.

    Examples:
        >>> norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
        tensor([[0.8485, 1.1314]])

    """
    _check(x, weight, bias, None, kind)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y: Tensor = _apply(flat, weight, bias, kind, eps, keeps(), impl)
    return y.reshape(x.shape)


def norm_and_codes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``norm`` of x (..., K), which is not empty, and codes and scales of its rows (M, K) and (M,), of one kernel; no derivative."""
    _check(x, weight, bias, None, kind)
    y, codes, scale = _raw(x.reshape(-1, x.shape[-1]), None, weight, bias, kind, eps, True, True, "")
    return y.reshape(x.shape), (codes, scale)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weights: Any,
    biases: Any = None,
    *,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    residual: Tensor | None = None,
    gradient: str | None = None,
    wgrad: str = "int8",
    impl: str = "",
) -> tuple[Tensor, ...]:
    """``merged_linear(norm(x + residual), weights)``: q, k and v after a norm, or gate and up.

    The bits of ``norm`` and ``linear`` one after the other. Without derivatives the sum, the norm and its codes are one kernel, and
    the normalized values are never written.

    Args:
        x: (..., K), any float dtype.
        norm_weight, norm_bias: (K,), or None.
        weights, biases, gradient, wgrad, impl: as for ``merged_linear``.
        kind, eps: as for ``norm``.
        residual: as x; added to x before the norm.

    Returns:
        A tuple of (..., N_i); with a residual the sum (..., K) comes last.

    Raises:
        ValueError: not as many biases as weights, or shapes that do not fit.
        TypeError: dtypes or devices that differ.

    Examples:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
        >>> q, k, total = norm_linear(x, None, [w, w], residual=x)
        >>> q.shape, total[0]
        (torch.Size([2, 4]), tensor([2., 2., 2.]))

    """
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    if len(biases) != len(weights):
        raise ValueError(f"norm_linear: {len(weights)} weights but {len(biases)} biases; give one for each, or None")
    _check(x, norm_weight, norm_bias, residual, kind)
    floats = [w for w in weights if isinstance(w, Tensor)]
    fits = all(isinstance(w, (Tensor, QTensor)) and w.ndim == 2 and w.dtype == x.dtype and w.shape[1] == x.shape[-1] for w in weights)
    plain = fits and raw.direct(x, residual, norm_weight, norm_bias, *floats, *biases)
    if not plain or 0 in x.shape or differentiates(x, residual, norm_weight, norm_bias, *floats, *biases):
        total = x if residual is None else x + residual
        h = norm(total, norm_weight, norm_bias, kind=kind, eps=eps, impl=impl)
        ys = merged_linear(h, weights, biases, gradient=gradient, wgrad=wgrad, impl=impl)
        return ys if residual is None else (*ys, total)
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, residual)]
    *sums, q, s = _raw(flat[0], flat[1], norm_weight, norm_bias, kind, eps, True, False, impl)  # type: ignore[arg-type]
    out = []
    for w, b in zip(weights, biases, strict=True):
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"norm_linear: a bias has shape {tuple(b.shape)}; its weight has {tuple(w.shape)}")
        wq, ws = w.rows() if isinstance(w, QTensor) else raw.quantize(w.detach(), impl=impl)
        out.append(raw.int8_mm(q, s, wq, ws, b, x.dtype, impl).reshape(*x.shape[:-1], w.shape[0]))
    return (*out, *(t.reshape(x.shape) for t in sums))
