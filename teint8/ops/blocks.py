"""A linear whose operands have a scale for each block along K, with the straight-through derivatives."""

import math
from typing import Any

import torch
from torch import Tensor

from teint8 import numerics
from teint8.ops import raw
from teint8.ops.raw_blocks import dequantize_blocks, int8_block_mm, quantize_blocks
from teint8.ops.straight import finished, moved
from teint8.qtensor import QTensor

Codes = tuple[Tensor, Tensor]


def codes_by(grouping: str, x: Tensor, block: int, impl: str = "") -> Codes:
    """Codes (M, K) and scales (M, ceil(K / block)) of x (M, K); one scale a row, or in all, is repeated for each block."""
    if numerics.block_of(grouping):
        return quantize_blocks(x, block, impl)
    codes, scale = raw.quantize(x.detach(), group_dims=1 if grouping == "row" else 2, impl=impl)
    return codes, scale.unsqueeze(-1).expand(-1, -(-x.shape[1] // block))


class _BlockLinear(torch.autograd.Function):
    """x (M, K) by codes (N, K) of w (N, K), or of a constant weight where w is None."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, bias: Tensor | None, wq: Tensor, ws: Tensor, activation: str, gradient: str, wgrad: str,
        block: int, impl: str, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return int8_block_mm(*codes_by(activation, x, block, impl), wq, ws, bias, block, dtype, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, bias, wq, ws, *ctx.how, ctx.dtype = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, w, wq, ws)
        ctx.save_for_forward(x, w, wq, ws)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w, wq, ws = ctx.saved_tensors
        activation, gradient, wgrad, block, impl = ctx.how
        x_hat, w_hat = _hats(x, w, wq, ws, activation, block, impl)
        dx = _product(g, w_hat.mT, gradient, block, impl)
        dw = None if w is None else _product(g.mT, x_hat.mT, gradient if wgrad == "int8" else "", block, impl)
        grads = [dx, dw, None if ctx.bias is None else g.float().sum(0)]
        dtypes = [x.dtype, None if w is None else w.dtype, ctx.bias]
        return (*finished(grads, dtypes, keep=not gradient), *[None] * 8)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, db: Any, *_: Any) -> Tensor:  # type: ignore[override]
        x, w, wq, ws = ctx.saved_tensors
        activation, _, _, block, impl = ctx.how
        x_hat, w_hat = _hats(x, w, wq, ws, activation, block, impl)
        terms = [] if dx is None else [dx @ w_hat.mT]
        terms += [] if dw is None else [x_hat @ dw.mT]
        terms += [] if db is None else [db.expand(x.shape[0], -1)]
        total: Tensor = sum(terms[1:], terms[0])
        return total.to(ctx.dtype)


def _hats(x: Tensor, w: Tensor | None, wq: Tensor, ws: Tensor, activation: str, block: int, impl: str) -> tuple[Tensor, Tensor]:
    """What was multiplied, which moves with x and w."""
    x_hat = moved(dequantize_blocks(*codes_by(activation, x, block, impl), block, x.dtype), x)
    w_hat = dequantize_blocks(wq, ws, block, x.dtype)
    return x_hat, w_hat if w is None else moved(w_hat, w.to(x.dtype))


def _product(a: Tensor, b: Tensor, gradient: str, block: int, impl: str) -> Tensor:
    """a (M, K) by b (N, K): in float, or quantized along K as the gradient's granularity says."""
    if not gradient:
        return a.to(b.dtype) @ b.mT
    a, b = a.contiguous(), b.detach().contiguous()
    if numerics.block_of(gradient):
        return int8_block_mm(*quantize_blocks(a, block, impl), *quantize_blocks(b, block, impl), None, block, b.dtype, impl)
    return raw.int8_mm(*raw.quantize(a.detach(), impl=impl), *raw.quantize(b, impl=impl), None, b.dtype, impl)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as ops/linear.py says
def _apply(*args: Any) -> Tensor:
    y: Tensor = _BlockLinear.apply(*args)
    return y


def has_blocks(weight: Any, weight_granularity: str, activation: str | None) -> bool:
    """Whether an operand of a linear is quantized by block."""
    packed = isinstance(weight, QTensor) and isinstance(weight.axis, int) and weight.block
    return bool(packed or numerics.block_of(weight_granularity) or numerics.block_of(activation or ""))


def block_linear(
    x: Tensor,
    weight: Tensor | QTensor,
    bias: Tensor | None,
    weight_granularity: str,
    activation: str | None,
    gradient: str,
    wgrad: str,
    impl: str,
    dtype: torch.dtype,
    weight_codes: Any = None,
) -> Tensor:
    """The linear of ``ops.linear``, which has checked these, where an operand is quantized by block.

    Args:
        x: (..., K).
        weight: (N, K), or its QTensor.
        weight_granularity, activation: "row", "tensor", or "block64" and the like; an
            activation of None is float.
        gradient: "" for a float backward, else the granularity of the gradient.
        weight_codes: of a float weight, if made before.

    """
    packed = weight if isinstance(weight, QTensor) else None
    if weight.ndim != 2:
        raise ValueError(f"linear: the weight has shape {tuple(weight.shape)}; blocks are for weights (N, K)")
    found = numerics.block_of(weight_granularity) or numerics.block_of(activation or "")
    block = packed.block if packed is not None and packed.block else found
    blocks = {b for b in (block, found, numerics.block_of(activation or ""), numerics.block_of(gradient)) if b}
    if len(blocks) > 1:
        raise ValueError(f"linear: blocks of {' and '.join(map(str, sorted(blocks)))} values; one size is needed for all operands")
    w: Any = None
    codes: Any
    if packed is not None:
        rows = packed if packed.axis == -1 else QTensor(packed.codes.mT, packed.scale.mT, None, packed.dtype, checked=False)
        codes = rows.codes, rows.scale.expand(-1, -(-rows.shape[1] // block)) if not packed.block else rows.scale
    else:
        w = weight
        codes = weight_codes or codes_by(weight_granularity, w, block, impl)
    if activation is None:
        w_hat = dequantize_blocks(codes[0], codes[1], block, dtype)
        w_hat = w_hat if w is None else moved(w_hat, w.to(dtype))
        y: Tensor = torch.nn.functional.linear(x.to(dtype), w_hat, None if bias is None else bias.to(dtype))
        return y
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _apply(flat, w, bias, *codes, activation, gradient, wgrad, block, impl, dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])
