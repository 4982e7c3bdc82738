"""Scaled dot-product attention in INT8, with the derivatives of torch's float attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8 import _torch
from teint8.ops.linear import differentiates
from teint8.ops.raw import NAMES, quantize
from teint8.ops.raw_attention import int8_attention
from teint8.ops.straight import hat, moved


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _hat(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return hat(x, codes, scale, None, x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with both products in INT8, by ``teint8.attentions``; STE derivatives.

    Rows of q and k are quantized by token, channels of v along the keys of their head, the weights of a row and 128 keys to 8 bits.
    The error to float64 on normal q, k and v is below 0.02 (``tests/test_int8_attention.py``). The derivatives are those of
    torch's float attention at the dequantized q, k and v, which is computed too where one may be asked for.

    Args:
        query: (..., H, M, D), any float dtype.
        key: (..., G, S, D).
        value: (..., G, S, E).
        attn_mask: bool (True: seen) or floats that are added, broadcastable to (..., H, M, S).
        is_causal: row i sees keys 0 to i.
        scale: of the scores, 1 / sqrt(D) unless given.
        enable_gqa: H is a multiple of G; else they are alike.
        impl: name of an implementation, "reference" for plain torch; "" for the best.
        dtype: of the result; that of query unless given.

    Returns:
        (..., H, M, E). A row that sees no key is 0.

    Raises:
        TypeError: not floats of one dtype, or a mask of integers.
        ValueError: shapes or devices that do not fit.

    Examples:
        >>> q = torch.eye(2).reshape(1, 1, 2, 2)
        >>> attention(q, q, q, scale=100.0)
        tensor([[[[1., 0.],
                  [0., 1.]]]])

    """
    _check(query, key, value, attn_mask, enable_gqa)
    if dtype is not None and dtype not in NAMES:
        raise TypeError(f"attention: dtype is {dtype}; one of {', '.join(NAMES.values())} is needed")
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    dtype = dtype or query.dtype
    floats = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        floats = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -math.inf)
    quantizer = "reference" if impl == "reference" else ""
    q, k = (quantize(t.detach(), impl=quantizer) for t in (query, key))
    v = quantize(value.detach().mT, impl=quantizer)
    batch = math.prod(query.shape[:-3])
    four: Any = [t.reshape(batch, *t.shape[query.ndim - 3 :]) for t in (*q, *k, *v)]
    mask = None if floats is None else _of_four(floats, (*query.shape[:-1], key.shape[-2]))
    run: Any = int8_attention
    y: Tensor = run(*four, mask, is_causal, float(scale), dtype, impl).reshape(*query.shape[:-1], value.shape[-1])
    if not differentiates(query, key, value, attn_mask if floats is attn_mask else None):
        return y
    hats = (_hat(query, *q), _hat(key, *k), _hat(value.mT, *v).mT)
    how: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    form: Any = math_attention if (is_causal and attn_mask is not None) or _torch.needs_math_attention(query.device.type) else _fused
    result: Tensor = moved(y, form(*hats, None if floats is None else floats.to(query.dtype), **how).to(dtype))
    return result


def _of_four(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to (..., H, M, S), as one that does to (B, H, M, S)."""
    if len(shape) == 4 or mask.ndim < 4:
        return mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    return mask.expand(shape).reshape(math.prod(shape[:-3]), *shape[-3:])


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, **how)


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` in differentiable steps, for transforms that torch's fused kernels have no rule for."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(query, key.mT) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    scores = scores if attn_mask is None else scores + attn_mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:  # a row that is masked whole has weights 0, as in torch, and gradients 0
        whole = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(whole, 0.0).softmax(-1).masked_fill(whole, 0.0)
    return torch.matmul(F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights, value)


def _check(q: Any, k: Any, v: Any, mask: Any, gqa: bool) -> None:
    tensors = {"query": q, "key": k, "value": v}
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"attention: {name} is {getattr(t, 'dtype', type(t).__name__)}; a float tensor is needed")
        if t.dtype != q.dtype:
            raise TypeError(f"attention: query is {q.dtype} and {name} {t.dtype}; one dtype is needed, such as {name}.to({q.dtype})")
        if t.device != q.device:
            raise ValueError(f"attention: query is on {q.device} and {name} on {t.device}; one device is needed")
    _check_shapes(q, k, v, gqa)
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], k.shape[-2]), q.device)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> None:
    if min(q.ndim, k.ndim, v.ndim) < 3 or not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(f"attention: {_shapes(q, k, v)} do not fit; (..., heads, tokens, width) with the same (...) are needed")
    if k.shape[-3:-1] != v.shape[-3:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"attention: {_shapes(q, k, v)} do not fit; key and value need the same heads and tokens, query and key the same width"
        )
    heads, shared = q.shape[-3], k.shape[-3]
    if heads != shared and not (gqa and shared and heads % shared == 0):
        fix = "a divisor of them is needed" if gqa else "the same number is needed, or enable_gqa=True"
        raise ValueError(f"attention: {_shapes(q, k, v)}: {heads} heads share {shared} heads of keys; {fix}")


def _check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if mask.device != device:
        raise ValueError(f"attention: attn_mask is on {mask.device} and query on {device}; one device is needed")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: attn_mask is {mask.dtype}; bool or floats are needed")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(a not in (1, b) for a, b in sizes):
        raise ValueError(f"attention: attn_mask has shape {tuple(mask.shape)}; one that broadcasts to {shape} is needed")
