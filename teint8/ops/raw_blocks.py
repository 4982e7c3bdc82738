"""The raw op ``int8_block_mm``: a matmul whose operands have a scale for each block along K. Derivatives are in ``ops/blocks.py``."""

from typing import Any

import torch
from torch import Tensor

from teint8 import numerics
from teint8.ops import registry
from teint8.ops.raw import DTYPES, NAMES, direct, front, quantize
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define(
    "int8_block_mm(Tensor x_codes, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor? bias, int block, str dtype, str impl) "
    "-> Tensor"
)


def quantize_blocks(x: Tensor, block: int, impl: str = "") -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales (M, ceil(K / block)) of x (M, K); no gradient flows.

    Examples:
        >>> codes, scale = quantize_blocks(torch.ones(2, 40), 32)
        >>> codes.shape, scale.shape
        (torch.Size([2, 40]), torch.Size([2, 2]))

    """
    m, k = x.shape
    codes, scale = quantize(numerics.by_block(x.detach(), block), impl=impl)
    blocks = -(-k // block)
    return codes.reshape(m, blocks * block)[:, :k], scale.reshape(m, blocks)


_library.define("dequantize_blocks(Tensor codes, Tensor scale, int block, str dtype) -> Tensor")


def dequantize_blocks(codes: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``codes * scale`` of (M, K) and (M, ceil(K / block)), in float32, then cast; no gradient flows.

    An op of its own: Inductor (2.13, on CPUs) reads past the scales where the last block is cut, if it sees how they are repeated.
    """
    op = _dequantize_blocks if direct(codes, scale) else torch.ops.teint8.dequantize_blocks
    y: Tensor = op(codes, scale, block, NAMES[dtype])
    return y


def _dequantize_blocks(codes: Tensor, scale: Tensor, block: int, dtype: str) -> Tensor:
    return (codes.float() * scale.repeat_interleave(block, -1)[:, : codes.shape[1]]).to(DTYPES[dtype])


_library.impl("dequantize_blocks", _dequantize_blocks, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::dequantize_blocks", lib=_library)  # type: ignore[untyped-decorator]
def _dequantize_blocks_fake(codes: Tensor, scale: Any, block: Any, dtype: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=DTYPES[dtype])


@torch.library.register_vmap("teint8::dequantize_blocks", lib=_library)  # type: ignore[untyped-decorator]
def _dequantize_blocks_vmap(info: Any, in_dims: Any, codes: Tensor, scale: Tensor, block: int, dtype: str) -> Any:
    codes, scale = front(codes, in_dims[0], info.batch_size), front(scale, in_dims[1], info.batch_size)
    y = torch.ops.teint8.dequantize_blocks(codes.flatten(0, 1), scale.flatten(0, 1), block, dtype)
    return y.unflatten(0, codes.shape[:2]), 0


def int8_block_mm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    block: int,
    dtype: torch.dtype,
    impl: str = "",
) -> Tensor:
    """``numerics.int8_block_mm`` of codes (M, K) and (N, K), scales (M, B) and (N, B), by the best implementation, or the named one.

    Examples:
        >>> x = quantize_blocks(torch.ones(2, 40), 32)
        >>> int8_block_mm(*x, *x, None, 32, torch.float32)
        tensor([[40., 40.],
                [40., 40.]])

    """
    op = _int8_block_mm if direct(x_codes, x_scale, w_codes, w_scale, bias) else torch.ops.teint8.int8_block_mm
    y: Tensor = op(x_codes, x_scale, w_codes, w_scale, bias, block, NAMES[dtype], impl)
    return y


def _int8_block_mm(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, block: int, dtype: str, impl: str) -> Tensor:
    (m, k), n = xq.shape, wq.shape[0]
    b = None if bias is None else bias.detach()
    if 0 in (m, k, n):
        return numerics.int8_block_mm(xq, xs, wq, ws, b, block, DTYPES[dtype])
    problem = Problem(xq.device.type, DTYPES[dtype], 1, m, n, k, (block,))
    y: Tensor = registry.select("block_mm", problem, impl).run(xq, xs, wq, ws, b, block, DTYPES[dtype])
    return y


_library.impl("int8_block_mm", _int8_block_mm, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::int8_block_mm", lib=_library)  # type: ignore[untyped-decorator]
def _int8_block_mm_fake(xq: Tensor, xs: Any, wq: Tensor, ws: Any, bias: Any, block: int, dtype: str, impl: str) -> Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=DTYPES[dtype])


@torch.library.register_vmap("teint8::int8_block_mm", lib=_library)  # type: ignore[untyped-decorator]
def _int8_block_mm_vmap(
    info: Any, in_dims: Any, xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, *rest: Any
) -> Any:
    size = info.batch_size
    if in_dims[2:5] == (None, None, None):  # the mapped dimension folds into the rows
        xq, xs = front(xq, in_dims[0], size), front(xs, in_dims[1], size)
        y = torch.ops.teint8.int8_block_mm(xq.flatten(0, 1), xs.flatten(0, 1), wq, ws, bias, *rest)
        return y.unflatten(0, xq.shape[:2]), 0
    each = [None if t is None else front(t, dim, size) for t, dim in zip((xq, xs, wq, ws, bias), in_dims, strict=False)]
    made = [torch.ops.teint8.int8_block_mm(*(None if t is None else t[i] for t in each), *rest) for i in range(size)]
    return torch.stack(made), 0


def _composed(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    """One ``int8_mm`` of the device after the other."""
    (m, k), n = xq.shape, wq.shape[0]
    y = torch.zeros((m, n), dtype=torch.float32, device=xq.device)
    for b in range(xs.shape[1]):
        part = slice(b * block, min((b + 1) * block, k))
        x, w = xq[:, part].contiguous(), wq[:, part].contiguous()
        run = registry.select("int8_mm", Problem(xq.device.type, torch.float32, 1, m, n, x.shape[1])).run
        scales = xs[:, b].contiguous(), ws[:, b].contiguous()
        y += run(x[None], scales[0][None], w[None], scales[1][None], None, torch.float32)[0]
    return (y if bias is None else y + bias.float()).to(dtype)


registry.register("block_mm", "reference", numerics.int8_block_mm)
registry.register("block_mm", "composed", _composed, priority=5)
