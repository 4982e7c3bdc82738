"""GroupNorm, InstanceNorm and BatchNorm in inference with derivatives, in the form whose codes wait for a convolution."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8.ops import raw, registry
from teint8.ops.linear import keeps
from teint8.ops.norm import native_gradients, of_one_dtype
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define(
    "channel_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, int groups, float eps, bool codes, "
    "bool values, str impl) -> Tensor[]"
)


def _channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    groups: int,
    eps: float,
    codes: bool,
    values: bool,
    impl: str,
) -> list[Tensor]:
    if x.numel() == 0:
        return [torch.empty_like(x)] * values + [t.new_empty(t.shape) for t in _fake_codes(x)] * codes
    tensors = [None if t is None else t.detach() for t in (x, weight, bias, mean, variance)]
    run = registry.select("channel_norm", problem_of(x, groups, mean is not None), impl).run
    out: list[Tensor] = run(*tensors, groups, eps, codes, values)
    like = torch.empty_like(x) if values else x
    if values and out[0].stride() != like.stride():
        out[0] = like.copy_(out[0])
    return out


def problem_of(x: Tensor, groups: int, given: bool) -> Problem:
    """The Problem that a norm of x (B, C, *S) poses; ``given``: mean and variance are."""
    b, c, *sizes = x.shape
    return Problem(x.device.type, x.dtype, 1, b, math.prod(sizes), c, () if given else (groups,))


def _fake_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    b, c, p = x.shape
    return x.new_empty((b, p, c), dtype=torch.int8), x.new_empty((b,), dtype=torch.float32)


_library.impl("channel_norm", _channel_norm, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::channel_norm", lib=_library)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, groups: int, eps: float, codes: bool, values: bool, impl: str
) -> list[Tensor]:
    return [torch.empty_like(x)] * values + list(_fake_codes(x)) * codes


@torch.library.register_vmap("teint8::channel_norm", lib=_library)  # type: ignore[untyped-decorator]
def _vmap(info: Any, in_dims: Any, x: Any, *rest: Any) -> Any:
    size = info.batch_size
    x = raw.front(x, in_dims[0], size)
    others = [None if t is None else raw.front(t, dim, size) for t, dim in zip(rest[:4], in_dims[1:], strict=False)]
    if all(dim is None for dim in in_dims[1:5]):  # the mapped dimension folds into the samples
        out = torch.ops.teint8.channel_norm(x.flatten(0, 1), *(None if t is None else t[0] for t in others), *rest[4:])
        return [t.unflatten(0, x.shape[:2]) for t in out], [0] * len(out)
    if size == 0:
        return [t.new_empty((0, *t.shape)) for t in _fake(x.new_empty(x.shape[1:]), *others, *rest[4:])], [0] * (rest[7] + 2 * rest[6])
    each = [torch.ops.teint8.channel_norm(x[i], *(None if t is None else t[i] for t in others), *rest[4:]) for i in range(size)]
    return [torch.stack(t) for t in zip(*each, strict=True)], [0] * len(each[0])


def raw_channel_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, groups: int, eps: float, *, codes: bool, values: bool, impl: str
) -> list[Tensor]:
    """Values (B, C, P), codes (B, P, C) and scales (B,) of x (B, C, P), as asked for; no derivative."""
    op = _channel_norm if raw.direct(x, weight, bias, mean, variance) else torch.ops.teint8.channel_norm
    out: list[Tensor] = op(x, weight, bias, mean, variance, groups, eps, codes, values, impl)
    return out


def _each(t: Tensor) -> Tensor:
    return t.float().unsqueeze(-1)


def _parts(x: Tensor, mean: Tensor | None, variance: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized x (B, C, P) and 1 / sqrt(variance + eps) in float32, of torch's own differentiable functions."""
    if mean is not None and variance is not None:
        inverse = _each(torch.rsqrt(variance.float() + eps))
        return (x.float() - _each(mean)) * inverse, inverse
    rows = x.float().reshape(x.shape[0], groups, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    inverse = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * inverse).reshape(x.shape), inverse


def _through(gw: Tensor, n: Tensor, inverse: Tensor, groups: int, given: bool) -> Tensor:
    """The derivative of the normalized x applied to a tensor; it is symmetric."""
    if given:
        return gw * inverse
    rows, n = (t.reshape(t.shape[0], groups, -1) for t in (gw, n))
    rows = rows - n * (rows * n).mean(-1, keepdim=True)
    return (inverse * (rows - rows.mean(-1, keepdim=True))).reshape(gw.shape)


class _ChannelNorm(torch.autograd.Function):
    """The norm of x (B, C, P)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, groups: int, eps: float,
        keep: bool, impl: str,
    ) -> Tensor:  # fmt: skip
        return raw_channel_norm(x, weight, bias, mean, variance, groups, eps, codes=False, values=True, impl=impl)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, mean, variance, ctx.groups, ctx.eps, ctx.keep, _ = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.save_for_forward(x, weight, mean, variance)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight, mean, variance = ctx.saved_tensors
        if mean is None and of_one_dtype(x, weight) and not ctx.keep and not torch.is_grad_enabled():
            dx, dw = native_gradients(lambda x, w: F.group_norm(x, ctx.groups, w, eps=ctx.eps), x, weight, g, ctx.needs_input_grad)
            db = g.float().sum((0, 2)).to(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
            return dx, dw, db, *[None] * 6
        n, inverse = _parts(x, mean, variance, ctx.groups, ctx.eps)
        g = g.float()
        gw = g if weight is None else g * _each(weight)
        dx = _through(gw, n, inverse, ctx.groups, mean is not None)
        dw = None if weight is None else (g * n).sum((0, 2)).to(weight.dtype)
        return dx.to(x.dtype), dw, None if ctx.bias is None else g.sum((0, 2)).to(ctx.bias), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, db: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, weight, mean, variance = ctx.saved_tensors
        n, inverse = _parts(x, mean, variance, ctx.groups, ctx.eps)
        out = torch.zeros_like(n)
        if dx is not None:
            dn = _through(dx.float(), n, inverse, ctx.groups, mean is not None)
            out = out + (dn if weight is None else dn * _each(weight))
        if dw is not None:
            out = out + n * _each(dw)
        return (out if db is None else out + _each(db)).to(x.dtype)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as ops/linear.py says
def _apply(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, groups: int, eps: float, keep: bool, impl: str) -> Tensor:
    y: Tensor = _ChannelNorm.apply(x, weight, bias, mean, variance, groups, eps, keep, impl)
    return y


def _check(name: str, x: Tensor, vectors: dict[str, Tensor | None], groups: int, eps: float) -> None:
    if eps < 0:
        raise ValueError(f"{name}: eps is {eps}; what is added to a variance is not negative")
    if not x.is_floating_point() or x.ndim < 2:
        raise TypeError(f"{name}: x is {x.dtype} {tuple(x.shape)}; floats (B, C, ...) are needed")
    c = x.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f"{name}: num_groups is {groups} and x has shape {tuple(x.shape)}; a divisor of its {c} channels is needed")
    for kind, t in vectors.items():
        if t is not None and (tuple(t.shape) != (c,) or not t.is_floating_point() or t.device != x.device):
            raise ValueError(f"{name}: {kind} is {t.dtype} {tuple(t.shape)} on {t.device}; floats ({c},) on {x.device} are needed")


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, impl: str = ""
) -> Tensor:
    """GroupNorm (Wu and He, 2018), and InstanceNorm with as many groups as channels, in one float32 form (``teint8.norms``).

    Args:
        x: (B, C, ...), any float dtype.
        num_groups: into how many C is divided.
        weight, bias: (C,), or None.
        eps: added to the variance.
        impl: name of an implementation, "" for the best.

    Returns:
        As x; ``tests/test_channel_norm.py`` compares it with float64.

    Raises:
        ValueError: shapes that do not fit, a negative eps.
        TypeError: not floats.

    Examples:
        >>> group_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), 2, eps=0.0)
        tensor([[[-1.,  1.],
                 [-1.,  1.]]])

    """
    _check("group_norm", x, {"weight": weight, "bias": bias}, num_groups, eps)
    flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    y: Tensor = _apply(flat, weight, bias, None, None, num_groups, eps, keeps(), impl)
    # a view that autograd does not take for one: the caller may write to the result in place
    return torch.ops.aten._unsafe_view(y, x.shape)  # type: ignore[no-any-return]


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    impl: str = "",
) -> Tensor:
    """BatchNorm in inference (Ioffe and Szegedy, 2015), in one float32 form (``teint8.norms``).

    There is no derivative by mean and variance: None in autograd, zeros under torch.func.

    Args:
        x: (B, C, ...), any float dtype.
        mean, variance: (C,), those that training has kept.
        weight, bias: (C,), or None.
        eps: added to the variance.
        impl: name of an implementation, "" for the best.

    Returns:
        As x.

    Raises:
        ValueError: shapes that do not fit, a negative eps.
        TypeError: not floats.

    Examples:
        >>> batch_norm(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
        tensor([[1.]])

    """
    _check("batch_norm", x, {"mean": mean, "variance": variance, "weight": weight, "bias": bias}, 1, eps)
    flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    y: Tensor = _apply(flat, weight, bias, mean, variance, 1, eps, keeps(), impl)
    # a view that autograd does not take for one: the caller may write to the result in place
    return torch.ops.aten._unsafe_view(y, x.shape)  # type: ignore[no-any-return]


def values_and_codes(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, groups: int, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``group_norm`` or ``batch_norm`` of x (B, C, *S), which is not empty, and codes (B, *S, C) and scales (B, 1); no derivative."""
    vectors = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    _check("group_norm" if mean is None else "batch_norm", x, vectors, groups, eps)
    flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    y, codes, scale = raw_channel_norm(flat, weight, bias, mean, variance, groups, eps, codes=True, values=True, impl="")
    return y.view(x.shape), (codes.view(x.shape[0], *x.shape[2:], x.shape[1]), scale.unsqueeze(1))
