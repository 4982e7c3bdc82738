"""The calls that routing takes over, each brought to one form: x by a weight, contracted along one of its dimensions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teint8 import _torch
from teint8.ops.attention import math_attention
from teint8.qtensor import QTensor
from teint8.transforms import attend, attention, convolutions, norms, products, recurrent, shapes, tables
from teint8.transforms.operands import Operand
from teint8.transforms.recurrent import CELLS

if TYPE_CHECKING:
    from teint8.transforms.route import Route


def _linear(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    x, w, bias = shapes.bind(("input", "weight", "bias"), args, kwargs)
    weight = route.operand(w) or Operand(w)
    return route.multiply("linear", x, weight, -1, bias, lambda: torch.ops.aten.linear(*route.plain((x, w, bias))))


def _matmul(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 2 or not kwargs.keys() <= {"self", "other", "input", "mat2"}:
        return products.stays_float("matmul", "out= and out_dtype= are not supported")(route, func, args, kwargs)
    return _product(route, func, args, kwargs, *shapes.bind(("self", "other"), args, kwargs, also=("input", "mat2")))


def _operator(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``a @ b``, seen as ``a.matmul(b)``, which takes a TypeError for "not implemented", and loses its message."""
    if torch.compiler.is_dynamo_compiling():  # no graph is left within a try
        return _matmul(route, func, args, kwargs)
    try:
        return _matmul(route, func, args, kwargs)
    except TypeError as error:
        if not all(isinstance(a, Tensor) for a in args):
            raise
        raise ValueError(str(error)) from error


def _rmatmul(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    other, first = args
    return _product(route, torch.matmul, (first, other), kwargs, first, other)


def _product(route: Route, func: Any, args: Any, kwargs: Any, a: Any, b: Any) -> Any:
    """a @ b, with a weight on one side or none."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or min(a.ndim, b.ndim) < 1:
        return func(*route.plain(args), **route.plain(kwargs))

    def in_float() -> Any:
        return _ATEN[func](*route.plain((a, b)))

    right, left = route.operand(b), route.operand(a)
    if right is not None and b.ndim > 1:
        return route.multiply("matmul", a, right, -2, None, in_float)
    if left is not None and a.ndim > 1:
        x = b if b.ndim == 1 else b.mT
        y = route.multiply("matmul", x, left, -1, None, lambda: in_float() if b.ndim == 1 else in_float().mT)
        return y if b.ndim == 1 else y.mT.contiguous()
    if b.ndim > 1:
        return route.multiply("activation_matmul", a, Operand(b), -2, None, in_float)
    return in_float()


def _addmm(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    names = ("self", "mat1", "mat2", "beta", "alpha")
    also = ("input", "batch1", "batch2", "beta", "alpha")
    bias, a, b, beta, alpha = shapes.bind(names, args, kwargs, also=also)[:5]
    beta, alpha = 1 if beta is None else beta, 1 if alpha is None else alpha
    if len(args) > 3 or "out" in kwargs or "out_dtype" in kwargs:
        return products.stays_float("matmul", "out= and out_dtype= are not supported")(route, func, args, kwargs)
    right, left = route.operand(b), route.operand(a)
    op = "matmul" if right is not None or left is not None else "activation_matmul"
    fused = beta == alpha == 1 and bias.ndim == 1 and bias.shape == b.shape[-1:] and a.ndim == 2
    if right is not None or left is None:
        weight = Operand(b) if right is None else right
        y = route.multiply(op, a, weight, -2, bias if fused else None, lambda: None)
    else:
        fused = False
        y = route.multiply(op, b.mT, left, -1, None, lambda: None)
        y = None if y is None else y.mT.contiguous()
    if y is None:  # it stayed float: torch's own op, whose rounding is its own
        aten = torch.ops.aten.baddbmm if func in (torch.baddbmm, Tensor.baddbmm) else torch.ops.aten.addmm
        return aten(*route.plain((bias, a, b)), beta=beta, alpha=alpha)
    if fused:
        return y
    y = y if alpha == 1 else y * alpha
    bias = route.plain(bias)
    if beta == 0:  # its values do not count, NaN or not, and its gradient is zeros
        bias, beta = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool), -0.0), 1
    return (y + (bias if beta == 1 else bias * beta)).to(y.dtype)  # under torch.autocast the bias has another one


_PROJECTIONS = (5, 11)  # where F.multi_head_attention_forward has in_proj_weight and out_proj_weight


def _attention(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    def project(x: Tensor, w: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
        weight = route.operand(w) or Operand(w)

        def in_float() -> Any:
            (whole,) = route.plain((w,))
            return torch.ops.aten.linear(x, whole if rows is None else whole[rows], bias)

        y: Tensor = route.multiply("linear", x, weight, -1, bias, in_float, rows)
        return y

    args = [t if i in _PROJECTIONS else route.plain(t) for i, t in enumerate(args)]
    kwargs = {name: t if name.endswith("proj_weight") else route.plain(t) for name, t in kwargs.items()}
    return attention.multi_head_attention_forward(project, *args, **kwargs, route=route)


def _native_attention(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """What nn.MultiheadAttention calls in inference, batch first; in eager mode a route keeps it from being called."""
    query, key, value, width, heads, w_in, b_in, w_out, b_out, mask, need_weights, average, kind = shapes.bind(
        ("query", "key", "value", "embed_dim", "num_head", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "mask", "need_weights",
         "average_attn_weights", "mask_type"), args, kwargs)  # fmt: skip
    if query.is_nested:
        return _nested(route, func, args, kwargs, (w_in, w_out))
    turned = {id(t): t.transpose(0, 1) for t in (query, key, value)}  # q, k and v that are one tensor stay one
    q, k, v = (turned[id(t)] for t in (query, key, value))
    need_weights, average = need_weights is not False, average is not False
    masks = _masks(mask, kind, heads)
    attend = (q, k, v, width, heads, w_in, b_in, None, None, False, 0.0, w_out, b_out, False)
    y, weights = _attention(route, func, attend, {**masks, "need_weights": need_weights, "average_attn_weights": average})
    return y.transpose(0, 1), weights


def _masks(mask: Tensor | None, kind: int | None, heads: int) -> dict[str, Tensor | None]:
    """A merged mask as the two that attention takes: kind 1 is of keys (B, S), others are (S, S) or (B, heads, S, S)."""
    if mask is None or kind == 1:
        return {"key_padding_mask": mask, "attn_mask": None}
    whole = mask if mask.ndim == 2 else mask.expand(-1, heads, -1, -1).reshape(-1, *mask.shape[-2:])
    return {"key_padding_mask": None, "attn_mask": whole}


def _encoder_layer(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """What nn.TransformerEncoderLayer calls in inference: its parts, each of which may run in INT8."""
    x, width, heads, w_in, b_in, w_out, b_out, gelu, norm_first, eps, *rest = args
    g1, b1, g2, b2, w1, c1, w2, c2, mask, kind = [*rest, None, None][:10]
    if x.is_nested or kwargs:
        return _nested(route, func, args, kwargs, (w_in, w_out, w1, w2))

    def attend(x: Tensor) -> Tensor:
        y, _ = _native_attention(route, func, (x, x, x, width, heads, w_in, b_in, w_out, b_out, mask, False, True, kind), {})
        return y  # type: ignore[no-any-return]

    def feed(x: Tensor) -> Any:
        h = _linear(route, F.linear, (x, w1, c1), {})
        return _linear(route, F.linear, (F.gelu(h) if gelu else F.relu(h), w2, c2), {})

    def norm(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return norms.normalize(route, F.layer_norm, (x, (width,), g, b, eps), {})  # type: ignore[no-any-return]

    if norm_first:
        x = x + attend(norm(x, g1, b1))
        return x + feed(norm(x, g2, b2))
    x = norm(x + attend(x), g1, b1)
    return norm(x + feed(x), g2, b2)


def _nested(route: Route, func: Any, args: Any, kwargs: Any, weights: tuple[Tensor, ...]) -> Any:
    """A fused call of torch on a nested tensor, which stays float."""
    for w in weights:
        route.stays_float(route.operand(w) or Operand(w), "linear", "an operand is nested")
    return func(*route.plain(args), **route.plain(kwargs))


def _scaled_dot_product_attention(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = route.plain(args), route.plain(kwargs)

    def in_float() -> Any:
        if _torch.needs_math_attention(args[0].device.type if args else "cpu"):
            return math_attention(*args, **kwargs)
        return func(*args, **kwargs)

    return attend.attend(route, in_float, *args, **kwargs)


def _grouped(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows (M, K) sorted by expert, by weights (G, K, N) of which each has its own rows: ``F.grouped_mm``."""
    names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
    x, w, ends, bias, dtype = shapes.bind(names, args, kwargs, also=("input", "weight", "offs", "bias", "out_dtype"))
    if w is None:
        w = kwargs.get("mat2")  # torch._grouped_mm
    x = args[0] if args else kwargs.get("self", x)

    def in_float() -> Any:
        (whole,) = route.plain((w,))
        return _FLOAT_GROUPED[func](x, whole, ends, *(() if bias is dtype is None else (bias, dtype)))

    weight = route.operand(w) or Operand(w)
    reason = ""
    if ends is None or x.ndim != 2 or w.ndim != 3:
        reason = f"grouped along another dimension: {tuple(x.shape)} by {tuple(w.shape)}"
    elif bias is not None or dtype not in (None, x.dtype):
        reason = "it has a bias, or a result of another dtype"
    if reason:
        route.stays_float(weight, "matmul", reason)
        return in_float()
    return route.multiply("matmul", x, weight, -2, None, in_float, ends=ends)


def _convolution(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    call = convolutions.read(func, args, kwargs)

    def in_float() -> Any:
        x, w, bias = route.plain((call.x, call.w, call.bias))
        return _FLOAT_CONVOLUTIONS[func](x, w, bias, *call.arguments())

    return route.convolve(call, route.operand(call.w) or Operand(call.w), in_float)


def _table(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    table = args[1] if len(args) > 1 else kwargs["weight"]
    return tables.look_up(route, func, args, kwargs, route.operand(table) or Operand(table))


def _cell(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """One step of a recurrent network: two linears and its gates."""

    def project(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _linear(route, F.linear, (x, w, bias), {})
        return y

    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    x, state, w_ih, w_hh, b_ih, b_hh = shapes.bind(names, args, kwargs)
    plain = route.plain((x, state, b_ih, b_hh))
    return CELLS[func](project, plain[0], plain[1], w_ih, w_hh, *plain[2:])


def _layout(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """Weights of a recurrent layer are laid out for cuDNN, no use of them; codes, and what torch.func wraps, stay as they are."""
    packed = any(isinstance((route.operand(w) or Operand(w)).value, QTensor) for w in args[0])
    return None if packed or _torch.in_transform() else func(*args, **kwargs)


def _data(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """``x.data``: it is an alias whose edits leave no version."""
    route.aliased(args[0])
    return route.other(func, args, kwargs)


def _recurrent(route: Route, func: Any, args: Any, kwargs: Any) -> Any:
    """A whole recurrent layer: step by step where a rule names "recurrent", else torch's own call."""
    if kwargs:
        return products.stays_float("recurrent", "it is called with arguments by name")(route, func, args, kwargs)
    weights = [route.operand(w) or Operand(w) for w in recurrent.weights_of(args) if w.ndim == 2]
    rules = [route.rule(route.path(w), "recurrent") for w in weights]
    if all(rule is None or rule.weight is None for rule in rules):
        for weight in weights:
            route.stays_float(weight, "recurrent", "recurrent layers go step by step in INT8 where a rule names 'recurrent'")
        return func(*route.plain(args))

    def project(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        weight = route.operand(w) or Operand(w)
        y: Tensor = route.multiply("recurrent", x, weight, -1, bias, lambda: torch.ops.aten.linear(*route.plain((x, w, bias))))
        return y

    plain = [a if isinstance(a, (list, tuple)) and i > 1 else route.plain(a) for i, a in enumerate(args)]
    return recurrent.layers(func, project, plain)


_ATEN = {
    torch.matmul: torch.ops.aten.matmul,
    Tensor.matmul: torch.ops.aten.matmul,
    Tensor.__matmul__: torch.ops.aten.matmul,
    torch.mm: torch.ops.aten.mm,
    Tensor.mm: torch.ops.aten.mm,
    torch.linalg.matmul: torch.ops.aten.matmul,
    torch.bmm: torch.ops.aten.bmm,
    Tensor.bmm: torch.ops.aten.bmm,
}
"""What a call that stays float runs: its aten op, which a surrounding route does not take over a second time."""

_FLOAT_GROUPED: dict[Any, Callable[..., Any]] = {
    F.grouped_mm: torch.ops.aten._grouped_mm,
    torch._grouped_mm: torch.ops.aten._grouped_mm,
}

_FLOAT_CONVOLUTIONS = {
    F.conv1d: torch.ops.aten.conv1d,
    F.conv2d: torch.ops.aten.conv2d,
    F.conv3d: torch.ops.aten.conv3d,
    F.conv_transpose1d: torch.ops.aten.conv_transpose1d,
    F.conv_transpose2d: torch.ops.aten.conv_transpose2d,
    F.conv_transpose3d: torch.ops.aten.conv_transpose3d,
}

_PRODUCTS = (
    torch.mv, Tensor.mv, torch.addmv, Tensor.addmv, torch.addbmm,
    Tensor.addbmm, torch.linalg.multi_dot, torch.chain_matmul,
)  # fmt: skip
FLOAT_ONLY: dict[Any, Callable[[Route, Any, Any, Any], Any]] = {
    torch.convolution: products.stays_float("conv", "torch.convolution is not taken over; write it as F.conv2d"),
    **{f: products.stays_float("matmul", f"{f.__name__} is not taken over; write it as a matmul or F.linear") for f in _PRODUCTS},
}
"""Calls that may meet a weight and stay float."""

HANDLERS: dict[Any, Callable[[Route, Any, Any, Any], Any]] = {
    **dict.fromkeys(_ATEN, _matmul),
    Tensor.matmul: _operator,
    Tensor.__matmul__: _operator,
    F.linear: _linear,
    Tensor.__rmatmul__: _rmatmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _addmm,
    Tensor.baddbmm: _addmm,
    F.multi_head_attention_forward: _attention,
    torch._native_multi_head_attention: _native_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    **dict.fromkeys(_FLOAT_GROUPED, _grouped),
    torch.einsum: products.einsum,
    torch.tensordot: products.tensordot,
    torch.inner: products.inner,
    Tensor.inner: products.inner,
    **dict.fromkeys(CELLS, _cell),
    **dict.fromkeys(recurrent.LAYERS, _recurrent),
    **dict.fromkeys((F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm), norms.normalize),
    **dict.fromkeys(norms.OF_CHANNELS, norms.normalize_channels),
    F.bilinear: products.bilinear,
    **dict.fromkeys(_FLOAT_CONVOLUTIONS, _convolution),
    **dict.fromkeys(tables.FUNCTIONS, _table),
    **FLOAT_ONLY,
    torch._cudnn_rnn_flatten_weight: _layout,
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]
}


def know_transformers() -> None:
    """Take over the op by which transformers multiplies experts where torch's own cannot be compiled; once it is there."""
    if "transformers.integrations.moe" not in sys.modules:
        return
    packet = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if packet is not None and packet not in HANDLERS:
        for op in (packet, packet.default):
            _FLOAT_GROUPED[op] = packet.default
            HANDLERS[op] = _grouped
