"""The raw ops ``quantize`` and ``int8_mm``: schemas, fake tensors and vmap rules. They have no derivative.

Derivatives are in ``ops/linear.py``, on top of these: an op of torch.library with an autograd formula does not work under torch.func.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.ops import registry, traced
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "DEF")
_library.define("quantize(Tensor x, Tensor? seed, Tensor? scale, int group_dims, str impl) -> (Tensor, Tensor)")
_library.define("int8_mm(Tensor x_codes, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor? bias, str dtype, str impl) -> Tensor")
# a dtype travels by its name: AOTInductor of torch 2.11 hands another ScalarType to an op than it was given
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def quantize(
    x: Tensor,
    *,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
    group_dims: int = 1,
    impl: str = "",
) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x`` by the numerics contract; no gradient flows.

    Args:
        x: (..., K), any float dtype, any strides.
        seed: int64 () or (S,) for stochastic rounding, else nearest; draw it at random, or count by 2 (``numerics.noise`` says why).
        scale: float32, broadcastable to (...), for static quantization.
        group_dims: how many trailing dimensions share a scale: 1 for a scale a row, x.ndim for one in all.
        impl: name of an implementation, "" for the best.

    Returns:
        int8 codes in the shape of x, contiguous, and float32 scales (...), one for each row (stride 0 where rows share one).

    Raises:
        TypeError: x is not a float tensor.
        ValueError: a scale or group_dims that do not fit x, or an unknown implementation.

    Examples:
        >>> codes, scale = quantize(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        >>> codes.tolist(), scale.shape
        ([[64, -127], [0, 0]], torch.Size([2]))

    """
    if not x.is_floating_point():
        raise TypeError(f"quantize: x is {x.dtype}; a float tensor is needed, such as x.float()")
    if seed is None and scale is None and group_dims == 1 and not impl and traced.fits(x):
        codes, scales = traced.quantize(x)
        return codes, scales
    _check_groups(x, scale, group_dims)
    op = _quantize if direct(x, seed, scale) else torch.ops.teint8.quantize
    codes, scales = op(x, seed, scale, group_dims, impl)
    if group_dims > 1:
        scales = scales.reshape(*scales.shape, *[1] * (group_dims - 1)).expand(x.shape[:-1])
    return codes, scales


def _check_groups(x: Tensor, scale: Tensor | None, group_dims: int) -> None:
    if not 1 <= group_dims <= max(x.ndim, 1):
        raise ValueError(
            f"quantize: group_dims is {group_dims}, x has shape {tuple(x.shape)}; 1 to {x.ndim} dimensions can share a scale"
        )
    if scale is None or scale.ndim == 0:
        return
    rows = x.shape[:-1]
    if scale.ndim > len(rows) or any(s not in (1, r) for s, r in zip(scale.shape[::-1], rows[::-1], strict=False)):
        raise ValueError(f"quantize: scale has shape {tuple(scale.shape)}, and x {tuple(x.shape)}; it must broadcast to {tuple(rows)}")


def int8_mm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    impl: str = "",
) -> Tensor:
    """``((x_codes @ w_codes^T) * w_scale) * x_scale (+ bias)``, the sum exact, cast to ``dtype``; no gradient flows.

    Args:
        x_codes: int8 (..., K) with w_codes (N, K), or (B, M, K) with (B, N, K).
        x_scale: float32, the shape of x_codes without K.
        w_codes: int8 (N, K) or (B, N, K).
        w_scale: float32 (N) or (B, N).
        bias: (N) or (B, N), any float dtype, or None.
        dtype: float dtype of the result.
        impl: name of an implementation, "" for the best.

    Returns:
        (..., N) or (B, M, N).

    Raises:
        TypeError: codes that are no int8, or another dtype for the result.
        ValueError: shapes that do not fit, or an ``impl`` that is unknown or cannot run this; the message gives the reason.

    Examples:
        >>> codes, scale = quantize(torch.tensor([[1.0, 2.0]]))
        >>> int8_mm(codes, scale, codes, scale, None, torch.float32)
        tensor([[5.0158]])

    """
    if direct(x_codes, x_scale, w_codes, w_scale, bias):
        return _int8_mm(x_codes, x_scale, w_codes, w_scale, bias, dtype, impl)
    y: Tensor = torch.ops.teint8.int8_mm(x_codes, x_scale, w_codes, w_scale, bias, NAMES[dtype], impl)
    return y


@functools.wraps(int8_mm)  # what teint8.ops exports; our own calls are of what was checked before
def checked_int8_mm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, impl: str = ""
) -> Tensor:
    """``int8_mm`` of what was looked at first."""
    x, w = x_codes.shape, w_codes.shape
    if x_codes.dtype is not torch.int8 or w_codes.dtype is not torch.int8:
        raise TypeError(f"int8_mm: codes are {x_codes.dtype} and {w_codes.dtype}; torch.int8 is needed, as quantize gives it")
    if dtype not in NAMES:
        raise TypeError(f"int8_mm: dtype is {dtype}; one of {', '.join(map(str, NAMES))} is needed")
    if x[-1:] != w[-1:] or len(w) not in (2, 3) or (len(w) == 3 and (len(x) != 3 or x[0] != w[0])):
        raise ValueError(
            f"int8_mm: x_codes has shape {tuple(x)}, and w_codes {tuple(w)}; (..., K) and (N, K) are needed, or (B, M, K) and (B, N, K)"
        )
    named = ("x_scale", x_scale, x[:-1]), ("w_scale", w_scale, w[:-1]), ("bias", w_scale if bias is None else bias, w[:-1])
    for name, t, shape in named:
        if t.shape != shape:
            raise ValueError(
                f"int8_mm: {name} has shape {tuple(t.shape)}; {tuple(shape)} is needed, as codes are {tuple(x)} and {tuple(w)}"
            )
    return int8_mm(x_codes, x_scale, w_codes, w_scale, bias, dtype, impl)


def int8_mm_add(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, residual: Tensor, dtype: torch.dtype, impl: str = ""
) -> Tensor:
    """``int8_mm(...) + residual``, each rounded once, in one kernel where one adds; no gradient flows.

    Args:
        residual: (..., N), in ``dtype``, of which nobody needs the values any more: the sum may be in its memory. The rest as for
            ``int8_mm``, without a bias.

    """
    flat = w_codes.ndim == x_codes.ndim == 2 and 0 not in (*x_codes.shape, w_codes.shape[0])
    if flat and dtype != torch.float64 and direct(x_codes, w_codes, residual):  # a kernel's own sum is one of float32
        problem = Problem(x_codes.device.type, dtype, 1, x_codes.shape[0], w_codes.shape[0], x_codes.shape[1])
        implementation = registry.select("int8_mm", problem, impl)
        if implementation.adds and implementation.flat:
            y: Tensor = implementation.run(x_codes, x_scale, w_codes, w_scale, None, dtype, residual=residual.detach(), into=True)
            return y
    return int8_mm(x_codes, x_scale, w_codes, w_scale, None, dtype, impl) + residual


def fused_linear(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``quantize`` and ``int8_mm`` in one, where an implementation of "linear" can; else None. For real tensors only.

    Args:
        x: (..., K), any float dtype. The rest as for ``int8_mm``, with w_codes (N, K).

    """
    if w_codes.ndim != 2 or dtype != x.dtype or not direct(x, w_codes, bias) or 0 in x.shape:
        return None
    n, k = w_codes.shape
    m = x.numel() // k
    implementation = registry.best("linear", Problem(x.device.type, x.dtype, 1, m, n, k))
    if implementation is None or n == 0:
        return None
    y: Tensor = implementation.run(x.reshape(m, k), w_codes, w_scale, bias, dtype)
    return y.view(*x.shape[:-1], n)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale`` in float32, then cast: ``numerics.dequantize``, in one kernel where there is one.

    Args:
        codes: int8 (..., K).
        scale: float32 (...).
        dtype: float dtype of the result.

    """
    if codes.is_cuda and direct(codes, scale) and codes.numel() > 0:
        from teint8.ops import cuda, cuda_reasons

        if cuda_reasons.why_not_triton() is None:
            return cuda.dequantize(codes, scale, dtype)
    return numerics.dequantize(codes, scale, dtype)


def weight_only_mm(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W8A16: floats x (..., K) by a weight of codes (N, K), or (B, M, K) by (B, N, K); a float matmul: no contract of bits."""
    if x.is_cuda and x.ndim == w_codes.ndim == 2 and direct(x, w_codes, w_scale, bias) and w_codes.numel() > 0:
        from teint8.ops import cuda, cuda_reasons

        b = None if bias is None else bias.detach()
        y = cuda.weight_only(x.detach(), w_codes, w_scale, b, dtype) if cuda_reasons.why_not_triton() is None else None
        if y is not None:
            return y
    y = x @ dequantize(w_codes, w_scale, dtype).mT
    return y if bias is None else y + bias.to(dtype).unsqueeze(-2)


def problem_of(x: Tensor, n: int, w_ndim: int) -> Problem:
    """The Problem that ``int8_mm`` of x (..., K) with a weight of n channels poses."""
    batch = x.shape[0] if w_ndim > 2 else 1
    k = x.shape[-1]
    return Problem(x.device.type, x.dtype, batch, x.numel() // max(k * batch, 1), n, k)


def direct(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would only cost time: real tensors, nothing that traces or transforms."""
    return not _torch.is_compiling() and _torch.are_plain(*tensors)


def _quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None, group_dims: int, impl: str) -> Any:
    shape = x.shape[: x.ndim - group_dims]
    if x.numel() == 0:
        # the scale of an empty group is 0, and there may be groups though there is no element
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_zeros(shape, dtype=torch.float32)
    flat = x.ndim == 2 and group_dims == 1
    rows = x.detach() if flat else x.detach().reshape(math.prod(shape), -1)
    seed = None if seed is None else seed.reshape(-1)
    scale = None if scale is None else scale.expand(shape).reshape(-1)
    problem = Problem(x.device.type, x.dtype, 1, rows.shape[0], 0, rows.shape[1])
    codes, scales = registry.select("quantize", problem, impl).run(rows, seed, scale)
    return (codes, scales) if flat else (codes.reshape(x.shape), scales.reshape(shape))


def _int8_mm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    shape, (n, k) = x_codes.shape, w_codes.shape[-2:]
    batch = w_codes.shape[0] if w_codes.ndim > 2 else 1
    if x_codes.numel() == 0 or n == 0:
        return _empty_mm(x_codes, x_scale, w_codes, bias, dtype)
    problem = Problem(x_codes.device.type, dtype, batch, x_codes.numel() // (k * batch), n, k)
    implementation = registry.select("int8_mm", problem, impl)
    b = None if bias is None else bias.detach()
    if implementation.flat and w_codes.ndim == 2 and len(shape) == 2:
        y: Tensor = implementation.run(x_codes, x_scale, w_codes, w_scale, b, dtype)
        return y
    y = implementation.run(
        x_codes.reshape(batch, -1, k),
        x_scale.reshape(batch, -1),
        w_codes.reshape(batch, n, k),
        w_scale.reshape(batch, n),
        None if b is None else b.reshape(batch, n),
        dtype,
    )
    # a view that autograd does not take for one: the caller may write to the result in place
    return torch.ops.aten._unsafe_view(y, (*shape[:-1], n))  # type: ignore[no-any-return]


def _empty_mm(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Where nothing is summed: 0 times the scale (NaN stays NaN), and the bias."""
    shape = (*x_codes.shape[:-1], w_codes.shape[-2])
    y = torch.zeros(shape, dtype=torch.float32, device=x_codes.device) * x_scale.unsqueeze(-1)
    if bias is not None:
        y = y + (bias.float() if w_codes.ndim == 2 else bias.float().unsqueeze(-2))
    return y.to(dtype)


_library.impl("quantize", _quantize, "CompositeExplicitAutograd")
_library.impl(
    "int8_mm",
    lambda xq, xs, wq, ws, bias, dtype, impl: _int8_mm(xq, xs, wq, ws, bias, DTYPES[dtype], impl),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake("teint8::quantize", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_fake(x: Tensor, seed: Tensor | None, scale: Tensor | None, group_dims: int, impl: str) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, x.new_empty(x.shape[: x.ndim - group_dims], dtype=torch.float32)


@torch.library.register_fake("teint8::int8_mm", lib=_library)  # type: ignore[untyped-decorator]
def _int8_mm_fake(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: str,
    impl: str,
) -> Tensor:
    return x_codes.new_empty((*x_codes.shape[:-1], w_codes.shape[-2]), dtype=DTYPES[dtype])


def front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension in front; expanded, not copied, where there is none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


@torch.library.register_vmap("teint8::quantize", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_vmap(info: Any, in_dims: Any, x: Tensor, seed: Tensor | None, scale: Tensor | None, group_dims: int, impl: str) -> Any:
    x = front(x, in_dims[0], info.batch_size)
    if seed is not None:
        seed = front(seed, in_dims[1], info.batch_size)
    if scale is not None:
        scale = front(scale, in_dims[2], info.batch_size)
        rows = x.ndim - group_dims
        scale = scale.reshape(scale.shape[0], *[1] * (rows - scale.ndim), *scale.shape[1:])
    return torch.ops.teint8.quantize(x, seed, scale, group_dims, impl), (0, 0)


@torch.library.register_vmap("teint8::int8_mm", lib=_library)  # type: ignore[untyped-decorator]
def _int8_mm_vmap(
    info: Any,
    in_dims: Any,
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: str,
    impl: str,
) -> Any:
    size, weight_dims = info.batch_size, in_dims[2:5]
    xq, xs = front(x_codes, in_dims[0], size), front(x_scale, in_dims[1], size)
    if weight_dims == (None, None, None) and w_codes.ndim == 2:  # the mapped dimension folds into the rows
        return torch.ops.teint8.int8_mm(xq, xs, w_codes, w_scale, bias, dtype, impl), 0
    wq, ws = front(w_codes, in_dims[2], size), front(w_scale, in_dims[3], size)
    b = None if bias is None else front(bias, in_dims[4], size)
    shape = (*xq.shape[:-1], wq.shape[-2])
    batch = math.prod(wq.shape[:-2])  # a batch of batches, or of stacked weights: one batched matmul
    y = torch.ops.teint8.int8_mm(
        xq.reshape(batch, -1, xq.shape[-1]),
        xs.reshape(batch, -1),
        wq.reshape(batch, *wq.shape[-2:]),
        ws.reshape(batch, -1),
        None if b is None else b.reshape(batch, -1),
        dtype,
        impl,
    )
    return y.reshape(shape), 0
