"""GPU implementations: Triton, imported when first called. The same kernels run in Triton's interpreter on the CPU for tests."""

from typing import Any

import torch
from torch import Tensor

from teint8 import numerics
from teint8.ops import cuda_reasons as reasons
from teint8.ops import cuda_tiles as tiles
from teint8.ops import registry
from teint8.ops.registry import Problem, register

_FEW_LONG = 512
"""So few rows that are longer than a program holds do not fill a card with one program each."""


def _quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None, pair: Tensor | None = None) -> Any:
    from teint8.kernels import quantize, quantize_long

    if seed is scale is pair is None and x.shape[0] <= _FEW_LONG and quantize.MAX_BLOCK < x.shape[1] < 2**31 - 2**16:
        return quantize_long.quantize_long(x)
    return quantize.quantize(x, seed, scale, pair)


def _quantize_both(x: Tensor, seed: Tensor | None, pair: Tensor | None = None) -> Any:
    from teint8.kernels import quantize_both

    return quantize_both.quantize_both(x, seed=seed, pair=pair)


def _activation(
    g: Tensor,
    u: Tensor | None,
    d: Tensor | None,
    kind: str,
    rows: bool,
    columns: bool,
    values: bool,
    value_columns: bool,
    seed: Tensor | None,
    scale: Tensor | None,
) -> list[Tensor]:
    """Both orientations take two reads; rows and values take one, in a kernel of their own."""
    from teint8.kernels.activation_rows import activation_rows
    from teint8.kernels.quantize_both import quantize_both

    if scale is not None and not (numerics.tells_absmax(g.dtype) and d is not None and values and not rows):  # no kernel does all of it
        made = _activation(g, u, d, kind, rows, columns, values, value_columns, seed, None)
        codes_of_value, its_scale = _activation(g, u, None, kind, True, False, False, False, None, None)
        return [*made, dequantize(codes_of_value, its_scale, g.dtype)]

    inner = g.dtype
    args: Any = [t.float() if t is not None and t.dtype == torch.float64 else t for t in (g, u, d)]
    both = quantize_both(*args, kind=kind, seed=seed, value=value_columns) if columns or value_columns else []
    if columns and rows and not values:
        return both
    codes = rows and not columns
    one: Any = activation_rows(*args, kind=kind, codes=codes, values=values, seed=seed, scale=scale) if values or not columns else None
    out: list[Any] = []
    for i in range(2 if u is not None and d is not None else 1):
        if values:
            out.append(one[i].value.to(inner))
        if rows:
            out += both[4 * i : 4 * i + 2] if columns else [one[i].codes, one[i].scale]
        if columns:
            out += both[4 * i + 2 : 4 * i + 4]
    out += both[-2:] if value_columns else []
    return out if scale is None else [*out, one[-1].value]


def _norm(*args: Any) -> list[Tensor]:
    from teint8.kernels import norm

    return norm.norm(*args)


def _channel_norm(*args: Any) -> list[Tensor]:
    from teint8.kernels import channel_norm

    return channel_norm.channel_norm(*args)


def _int8_mm(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from teint8.kernels import int8_mm

    return int8_mm.int8_mm(xq, xs, wq, ws, bias, dtype)


def _grouped_mm(*args: Any) -> Tensor:
    from teint8.kernels import grouped_mm

    return grouped_mm.grouped_mm(*args)


def _conv(*args: Any) -> Tensor:
    from teint8.kernels import conv

    return conv.conv(*args)


def _block_mm(*args: Any) -> Tensor:
    from teint8.kernels import block_mm

    return block_mm.block_mm(*args)


def _attention(*args: Any) -> Tensor:
    from teint8.kernels import attention

    return attention.attention(*args)


def _rotate(*args: Any) -> list[Tensor]:
    from teint8.kernels import rotate

    return rotate.rotate(*args)


def _hopper(
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    into: bool = False,
) -> Tensor:
    from teint8.kernels import hopper

    return hopper.int8_mm(xq, xs, wq, ws, bias, dtype, residual=residual, into=into)


def cublas(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """cuBLAS's exact int32 sums, and the contract's epilogue in torch."""
    acc = torch._int_mm(xq[0].contiguous(), wq[0].contiguous().t())
    y = (acc.float() * ws) * xs.mT
    return (y if bias is None else y + bias.float()).to(dtype).unsqueeze(0)


def _linear(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One kernel after the other, without what the dispatcher costs in between."""
    m, k = x.shape
    xq, xs = _quantize(x, None, None)
    b = None if bias is None else bias.detach().unsqueeze(0)
    run = registry.select("int8_mm", Problem("cuda", dtype, 1, m, wq.shape[0], k)).run
    y: Tensor = run(xq.unsqueeze(0), xs.unsqueeze(0), wq.unsqueeze(0), ws.unsqueeze(0), b, dtype).squeeze(0)
    return y


def _few(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One to four rows."""
    from teint8.kernels import gemv

    if not gemv.usable(wq):
        return _linear(x, wq, ws, bias, dtype)
    return gemv.gemv(x, None, wq, ws, bias, dtype)


def _few_mm(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes of one to four rows by those of a weight."""
    from teint8.kernels import gemv

    if xq.ndim == 3:
        return _few_mm(xq[0], xs[0], wq[0], ws[0], None if bias is None else bias[0], dtype).unsqueeze(0)
    xq, wq = (q if gemv.usable(q) else q.clone(memory_format=torch.contiguous_format) for q in (xq, wq))
    return gemv.gemv(xq, xs, wq, ws, bias, dtype)


def _few_mlp(x: Tensor, gate: Any, up: Any, down: Any, biases: Any, kind: str) -> Tensor | None:
    """An MLP of one to four rows; None where codes cannot be read as words."""
    from teint8.kernels import gemv
    from teint8.kernels.quantize_long import quantize_known

    if not all(gemv.usable(w[0]) for w in (gate, down, *(() if up is None else (up,)))):
        return None
    tops = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    both: Any = None if up is None else (*up, biases[1])
    codes: Any = (x, None) if x.shape[0] == 1 else _quantize(x, None, None)
    h = gemv.gemv(codes[0], codes[1], gate[0], gate[1], biases[0], x.dtype, up=both, kind=kind, tops=tops)
    h_codes = quantize_known(h, tops)
    return gemv.gemv(h_codes[0], h_codes[1], down[0], down[1], biases[2], x.dtype)


def _hopper_mlp(x: Tensor, gate: Any, up: Any, down: Any, biases: Any, kind: str) -> Tensor:
    """An MLP of up to 64 rows on Hopper: gate and up in one launch, where their scales and biases are alike."""
    from teint8.kernels import hopper
    from teint8.kernels.activation_rows import activation_rows

    bg, bu, bd = (None if t is None else t.detach() for t in biases)
    xq, xs = _quantize(x, None, None)
    if up is not None and hopper.fit_for_one(gate[1], up[1], bg, bu):
        g, u = hopper.int8_mm(xq, xs, gate[0], gate[1], bg, x.dtype, up=(*up, bu))
    else:
        g = hopper.int8_mm(xq, xs, gate[0], gate[1], bg, x.dtype)
        u = None if up is None else hopper.int8_mm(xq, xs, up[0], up[1], bu, x.dtype)
    h: Any = activation_rows(g, u, None, kind=kind, codes=True, values=False)[0]
    return hopper.int8_mm(h.codes, h.scale, down[0], down[1], bd, x.dtype)


def weight_only(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x (M, K) in its own dtype by codes (N, K), where a few rows make reading the weight the cost; None elsewhere."""
    from teint8.kernels import weight_only as kernel

    if x.shape[0] > kernel.MAX_ROWS or x.dtype not in (torch.bfloat16, torch.float16) or 0 in x.shape:
        return None
    return kernel.weight_only(x, wq, ws, bias, dtype)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., K) on a GPU, scales (...), as floats."""
    from teint8.kernels import dequantize

    k = codes.shape[-1]
    inner = torch.float32 if dtype == torch.float64 else dtype
    return dequantize.dequantize(codes.reshape(-1, k), scale.reshape(-1), inner).to(dtype).view(codes.shape)


def register_all() -> None:
    """Register Triton for GPUs, and its interpreter, which runs only when asked for by name."""
    register("int8_mm", "triton-hopper", _hopper, device="cuda", priority=30, why_not=reasons.hopper_why_not, flat=True, adds=True,
             describe=tiles.hopper_matmul)  # fmt: skip
    register("int8_mm", "triton-gemv", _few_mm, device="cuda", priority=35, why_not=reasons.few_mm_why_not, flat=True)
    register("int8_mm", "cublas", cublas, device="cuda", priority=15, why_not=reasons.cublas_why_not)
    register("int8_mm", "cublas-measured", cublas, device="cuda", priority=40, why_not=reasons.measured_why_not)
    for op, run in (
        ("quantize", _quantize), ("int8_mm", _int8_mm), ("quantize_both", _quantize_both), ("activation", _activation),
    ):  # fmt: skip
        pairs = op in ("quantize", "quantize_both")
        why_not = reasons.both_why_not if op in ("quantize_both", "activation") else reasons.kernel_why_not
        describe = tiles.matmul if op == "int8_mm" else None
        hats = op == "activation"
        register(op, "triton", run, device="cuda", priority=20, why_not=why_not, pairs=pairs, hats=hats, describe=describe)
        register(op, "triton-interpreter", run, device="cpu", priority=-1, why_not=why_not, pairs=pairs, hats=hats)
    register("grouped_mm", "triton", _grouped_mm, device="cuda", priority=20, why_not=reasons.kernel_why_not)
    register("grouped_mm", "triton-interpreter", _grouped_mm, device="cpu", priority=-1, why_not=reasons.kernel_why_not)
    register("conv", "triton", _conv, device="cuda", priority=20, why_not=reasons.conv_why_not, describe=tiles.convolution)
    register("conv", "triton-interpreter", _conv, device="cpu", priority=-1, why_not=reasons.conv_why_not)
    register("attention", "triton", _attention, device="cuda", priority=20, why_not=reasons.attention_why_not, describe=tiles.attention)
    register("attention", "triton-interpreter", _attention, device="cpu", priority=-1, why_not=reasons.attention_why_not)
    register("block_mm", "triton", _block_mm, device="cuda", priority=20, why_not=reasons.kernel_why_not, describe=tiles.block_matmul)
    register("block_mm", "triton-interpreter", _block_mm, device="cpu", priority=-1, why_not=reasons.kernel_why_not)
    register("norm", "triton", _norm, device="cuda", priority=20, why_not=reasons.norm_why_not)
    register("norm", "triton-interpreter", _norm, device="cpu", priority=-1, why_not=reasons.norm_why_not)
    register("channel_norm", "triton", _channel_norm, device="cuda", priority=20, why_not=reasons.channel_norm_why_not)
    register("channel_norm", "triton-interpreter", _channel_norm, device="cpu", priority=-1, why_not=reasons.channel_norm_why_not)
    register("rotate", "triton", _rotate, device="cuda", priority=20, why_not=reasons.rotate_why_not)
    register("rotate", "triton-interpreter", _rotate, device="cpu", priority=-1, why_not=reasons.rotate_why_not)
    register("linear", "triton", _linear, device="cuda", priority=20, why_not=reasons.kernel_why_not)
    register("linear", "triton-gemv", _few, device="cuda", priority=30, why_not=reasons.few_why_not)
    register("mlp", "triton-hopper", _hopper_mlp, device="cuda", priority=25, why_not=reasons.hopper_mlp_why_not)
    register("mlp", "triton-gemv", _few_mlp, device="cuda", priority=30, why_not=reasons.few_mlp_why_not)
