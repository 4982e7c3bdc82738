"""The raw op ``int8_attention``: attention of codes, as ``teint8.attentions`` defines it. Derivatives are in ``ops/attention.py``."""

from typing import Any

import torch
from torch import Tensor

from teint8 import attentions
from teint8.ops import registry
from teint8.ops.raw import DTYPES, NAMES, direct, front
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define(
    "int8_attention(Tensor q_codes, Tensor q_scale, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale, Tensor? mask, "
    "bool causal, float scale, str dtype, str impl) -> Tensor"
)


def int8_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dtype: torch.dtype,
    impl: str = "",
) -> Tensor:
    """Attention of codes (B, H, M, E), arguments as of ``attentions.value``; no gradient flows.

    Args:
        impl: name of an implementation, "" for the best.

    Examples:
        >>> from teint8.ops import quantize
        >>> q, v = quantize(torch.ones(1, 1, 2, 4)), quantize(torch.tensor([[[[3.0, 3.0], [-1.0, -1.0]]]]))
        >>> int8_attention(*q, *q, *v, None, False, 0.5, torch.float32)
        tensor([[[[ 3.0000, -1.0000],
                  [ 3.0000, -1.0000]]]])

    """
    tensors = (q_codes, q_scale, k_codes, k_scale, v_codes, v_scale, mask)
    op = _int8_attention if direct(*tensors) else torch.ops.teint8.int8_attention
    y: Tensor = op(*tensors, causal, scale, NAMES[dtype], impl)
    return y


def _int8_attention(
    q: Tensor, qs: Tensor, k: Tensor, ks: Tensor, v: Tensor, vs: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dtype: str, impl: str,
) -> Tensor:  # fmt: skip
    (b, h, m, d), (e, s) = q.shape, v.shape[2:]
    if 0 in (b, h, m, e) or s == 0:  # no key is seen
        return torch.zeros((b, h, m, e), dtype=DTYPES[dtype], device=q.device)
    problem = problem_of(q.shape, v.shape, q.device.type, DTYPES[dtype])
    run = attentions.value if d == 0 else registry.select("attention", problem, impl).run
    y: Tensor = run(q, qs, k, ks, v, vs, None if mask is None else mask.detach(), causal, scale, DTYPES[dtype])
    return y


def problem_of(q: Any, v: Any, device: str, dtype: torch.dtype) -> Problem:
    """The Problem that attention of q (B, H, M, D) by v (B, G, E, S) poses: n counts keys, batch all heads."""
    return Problem(device, dtype, q[0] * q[1], q[2], v[3], q[3], (v[2],))


_library.impl("int8_attention", _int8_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::int8_attention", lib=_library)  # type: ignore[untyped-decorator]
def _int8_attention_fake(q: Tensor, qs: Any, k: Any, ks: Any, v: Tensor, vs: Any, mask: Any, causal: Any, scale: Any, dtype: str,
                         impl: Any) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:3], v.shape[2]), dtype=DTYPES[dtype])


@torch.library.register_vmap("teint8::int8_attention", lib=_library)  # type: ignore[untyped-decorator]
def _int8_attention_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    """The mapped dimension folds into the batch."""
    *codes, mask, causal, scale, dtype, impl = args
    flat = [front(t, dim, info.batch_size).flatten(0, 1) for t, dim in zip(codes, in_dims, strict=False)]
    if mask is not None:
        shape = codes[0].shape[:-1] if in_dims[0] is None else codes[0].movedim(in_dims[0], 0).shape[1:-1]
        mask = front(mask, in_dims[6], info.batch_size)
        mask = mask.reshape(mask.shape[0], *[1] * (5 - mask.ndim), *mask.shape[1:])
        mask = mask.expand(-1, shape[0], -1, -1, -1).flatten(0, 1)
    y = torch.ops.teint8.int8_attention(*flat, mask, causal, scale, dtype, impl)
    return y.unflatten(0, (info.batch_size, -1)), 0


_ROWS = 1 << 22
"""How many scores are held at once, about."""


def _composed(
    q: Tensor, qs: Tensor, k: Tensor, ks: Tensor, v: Tensor, vs: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Both products by the device's ``int8_mm``, some rows at a time."""
    (b, h, m, d), (g, e, s) = q.shape, v.shape[1:]
    share = h // g
    a = attentions.multiplier(qs, scale)
    # heads that share keys are rows of one matmul, and a mask is looked at by head
    y = torch.empty((b, g, share, m, e), dtype=dtype, device=q.device)
    values = attentions.blocks(v.reshape(b * g, e, s), 0).movedim(2, 0)
    above = 127 * values.sum(-1, dtype=torch.int32).float()
    seen = None if mask is None else mask.expand(b, h, m, s).unflatten(1, (g, share))
    step = max(1, min(m, _ROWS // (b * h * s)))
    for first in range(0, m, step):
        part = slice(first, min(first + step, m))
        size = part.stop - part.start
        codes = q[:, :, part].reshape(b * g, share * size, d)
        t = _multiply(codes, a[:, :, part].reshape(b * g, -1), k.reshape(b * g, s, d), ks.reshape(b * g, s))
        t = t.view(b, g, share, size, s)
        t = attentions.masked(t, None if seen is None else seen[:, :, :, part], False)
        if causal:
            rows, keys = torch.arange(part.start, part.stop, device=q.device), torch.arange(s, device=q.device)
            t = t.masked_fill(keys > rows.unsqueeze(-1), float("-inf"))
        w, top = (u.movedim(4, 0) for u in attentions.weights(t))
        acc = _sums(w.reshape(-1, share * size, attentions.BLOCK), values.flatten(0, 1)).view(-1, b * g, share * size, e)
        acc += above.unsqueeze(2)
        total = (w.sum(-1, dtype=torch.int32) + 127 * attentions.BLOCK).float()
        scales = vs.reshape(b, g, 1, e)
        y[:, :, :, part] = attentions.finish(acc.view(-1, b, g, share, size, e), total, scales, top, dtype)
    return y.flatten(1, 2)


def _multiply(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor) -> Tensor:
    batch, m, k = x.shape
    problem = Problem(x.device.type, torch.float32, batch, m, w.shape[1], k)
    y: Tensor = registry.select("int8_mm", problem).run(x, xs, w, ws, None, torch.float32)
    return y


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """x (B, M, K) by w (B, N, K): their sum is an integer that float32 holds."""
    rows, channels = (torch.ones(t.shape[:2], dtype=torch.float32, device=x.device) for t in (x, w))
    return _multiply(x.contiguous(), rows, w.contiguous(), channels)


registry.register("attention", "reference", attentions.value)
registry.register("attention", "composed", _composed, priority=5)
