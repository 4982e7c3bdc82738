"""``F.multi_head_attention_forward`` taken apart, so that its projections are calls of their own.

To a routing mode that function is one call: what it calls inside is not seen. Here every projection goes through a function
that the caller gives, and the rest is torch's float attention with every option of the original.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8 import _torch
from teint8.ops.attention import math_attention
from teint8.transforms import attend

Project = Callable[[Tensor, Tensor, Tensor | None, slice | None], Tensor]
"""(x, weight, bias, rows): ``F.linear(x, weight[rows], bias)``; rows None is the whole weight."""


def multi_head_attention_forward(
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    route: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention (Vaswani et al., 2017); arguments and results as in ``torch.nn.functional``, after ``project``.

    ``route`` decides whether the products of activations run in INT8.

    Raises:
        ValueError: shapes that do not fit; the message names them.

    """
    _check(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight, is_causal, attn_mask)
    unbatched = query.ndim == 2
    if unbatched:
        query, key, value = _map_shared(lambda t: t.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    if key_padding_mask is not None and key_padding_mask.shape != (batch, key.shape[0]):
        raise ValueError(
            f"attention: key_padding_mask has shape {tuple(key_padding_mask.shape)}; ({batch}, {key.shape[0]}) is needed: (batch, keys)"
        )
    key_padding_mask = _additive(key_padding_mask, query.dtype)
    hinted = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if hinted else _additive(attn_mask, query.dtype)
    attn_mask = _three_dimensional(attn_mask, length, key.shape[0], batch * num_heads)

    if use_separate_proj_weight:
        weights = [(w, None) for w in (q_proj_weight, k_proj_weight, v_proj_weight)]
    else:
        weights = [(in_proj_weight, slice(i * width, (i + 1) * width)) for i in range(3)]
    q, k, v = _in_projections(project, (query, key, value), weights, in_proj_bias, width)
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.repeat(1, batch, 1)]), torch.cat([v, bias_v.repeat(1, batch, 1)])

    def heads(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], batch * num_heads, width // num_heads).transpose(0, 1)

    q = heads(q)
    k = heads(k) if static_k is None else static_k
    v = heads(v) if static_v is None else static_v
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(t.shape[0], 1, t.shape[2])], dim=1) for t in (k, v))
    appended = int(bias_k is not None) + int(add_zero_attn)
    mask = _merged(_padded(attn_mask, appended), _padded(key_padding_mask, appended), batch, num_heads)

    out, attention = _attend(q, k, v, mask, dropout_p if training else 0.0, need_weights, hinted, batch, route)
    out = project(out.transpose(0, 1).reshape(length * batch, width), out_proj_weight, out_proj_bias, None)
    out = out.reshape(length, batch, out.shape[-1])
    out = out.squeeze(1) if unbatched else out
    if attention is None:
        return out, None
    attention = attention.reshape(batch, num_heads, length, -1)
    attention = attention.mean(1) if average_attn_weights else attention
    return out, attention.squeeze(0) if unbatched else attention


def _in_projections(
    project: Project, xs: Any, weights: list[tuple[Any, Any]], bias: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; what shares an input and a weight is one matmul."""
    query, key, value = xs
    (whole, rows), *_ = weights
    if rows is not None and query is key and key is value:
        q, k, v = project(query, whole, bias, None).split(width, dim=-1)
        return q.contiguous(), k.contiguous(), v.contiguous()
    biases = [None] * 3 if bias is None else [bias[i * width : (i + 1) * width] for i in range(3)]
    q = project(query, *_weight_and_bias(weights[0], biases[0]))
    if rows is not None and key is value:
        both = project(key, whole, None if bias is None else bias[width:], slice(width, 3 * width))
        k, v = both.split(width, dim=-1)
        return q, k.contiguous(), v.contiguous()
    k = project(key, *_weight_and_bias(weights[1], biases[1]))
    return q, k, project(value, *_weight_and_bias(weights[2], biases[2]))


def _weight_and_bias(weight: tuple[Any, Any], bias: Tensor | None) -> tuple[Any, Tensor | None, Any]:
    return weight[0], bias, weight[1]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, need_weights: bool, causal: bool, batch: int, route: Any
) -> tuple[Tensor, Tensor | None]:
    """(B * heads, length, width of a head), and the weights where they are wanted."""
    if need_weights:
        if route is not None:
            attend.stays_float(route, "its weights are asked for (need_weights)", q, k, v)
        q = q * math.sqrt(1.0 / q.shape[-1])
        scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
        weights = F.dropout(scores.softmax(-1), dropout_p) if dropout_p > 0.0 else scores.softmax(-1)
        return torch.bmm(weights, v), weights
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.reshape(batch, -1, *mask.shape[1:])
    q, k, v = (t.reshape(batch, -1, *t.shape[1:]) for t in (q, k, v))
    form = math_attention if _torch.needs_math_attention(q.device.type) else F.scaled_dot_product_attention

    def in_float() -> Any:
        return form(q, k, v, mask, dropout_p, causal)

    out: Tensor = in_float() if route is None else attend.attend(route, in_float, q, k, v, mask, dropout_p, causal)
    return out.flatten(0, 1), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True masks) as 0 and -inf; a float mask as it is."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"attention: a mask has dtype {mask.dtype}; bool or float is needed")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _three_dimensional(mask: Tensor | None, length: int, keys: int, heads: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.ndim == 2 and mask.shape == (length, keys):
        return mask.unsqueeze(0)
    if mask.ndim == 3 and mask.shape == (heads, length, keys):
        return mask
    raise ValueError(f"attention: attn_mask has shape {tuple(mask.shape)}; ({length}, {keys}) or ({heads}, {length}, {keys}) is needed")


def _padded(mask: Tensor | None, appended: int) -> Tensor | None:
    """More keys at the end, seen by all."""
    return mask if mask is None or appended == 0 else F.pad(mask, (0, appended))


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """The attention mask and the key padding mask (B, keys) as one."""
    if padding is None:
        return mask
    padding = padding.reshape(batch, 1, 1, -1).expand(-1, heads, -1, -1).reshape(batch * heads, 1, -1)
    return padding if mask is None else mask + padding


def _map_shared(f: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f of each; what was one tensor stays one, so that it is projected once."""
    fq = f(q)
    fk = fq if k is q else f(k)
    return fq, fk, fk if v is k else f(v)


def _check(q: Tensor, k: Tensor, v: Tensor, width: int, heads: int, separate: bool, is_causal: bool, mask: Any) -> None:
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if q.ndim not in (2, 3) or k.ndim != q.ndim or v.ndim != q.ndim:
        raise ValueError(f"attention: {shapes}; all need 3 dimensions (length, batch, width), or all 2 without a batch")
    if q.shape[-1] != width or width % heads:
        raise ValueError(f"attention: {shapes}; the width must be {width} and divisible by {heads} heads")
    if k.shape[:-1] != v.shape[:-1] or (not separate and k.shape != v.shape):
        raise ValueError(f"attention: {shapes}; key and value must have the same length, batch and width")
    if is_causal and mask is None:
        raise ValueError("attention: is_causal=True is a hint about attn_mask; give the mask too")
