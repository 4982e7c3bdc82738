"""GPU implementations: Triton, imported when first called. The same kernels run in Triton's interpreter on the CPU for tests."""

import functools
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from teint8.numerics import MAX_INT32_K
from teint8.ops import registry
from teint8.ops.registry import Problem, register

FEW_ROWS = 4
"""Up to this many rows a matmul is bound by reading its weight."""
_WIDEST_NORM = 16384
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
) -> list[Tensor]:
    """Both orientations take two reads; rows and values take one, in a kernel of their own."""
    from teint8.kernels.activation_rows import activation_rows
    from teint8.kernels.quantize_both import quantize_both

    inner = g.dtype
    args: Any = [t.float() if t is not None and t.dtype == torch.float64 else t for t in (g, u, d)]
    both = quantize_both(*args, kind=kind, seed=seed, value=value_columns) if columns or value_columns else []
    if columns and rows and not values:
        return both
    one = activation_rows(*args, kind=kind, codes=rows and not columns, values=values, seed=seed) if values or not columns else None
    out: list[Any] = []
    for i in range(2 if u is not None and d is not None else 1):
        if values:
            out.append(one[i].value.to(inner))  # type: ignore[index,union-attr]
        if rows:
            out += both[4 * i : 4 * i + 2] if columns else [one[i].codes, one[i].scale]  # type: ignore[index]
        if columns:
            out += both[4 * i + 2 : 4 * i + 4]
    return out + both[-2:] if value_columns else out


def _norm(*args: Any) -> list[Tensor]:
    from teint8.kernels import norm

    return norm.norm(*args)


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


def _describe_block(problem: Problem) -> str:
    from teint8.kernels import block_mm

    c = block_mm.config_of(problem.m)
    return f"{c.block_m}x{c.block_n}x{problem.extra[0]}, {c.warps} warps, {c.stages} stages"


def _attention(*args: Any) -> Tensor:
    from teint8.kernels import attention

    return attention.attention(*args)


_WIDEST_HEAD = 256
_MOST_KEYS = 65536  # 254 * 127 * 65536 < 2**31


def _attention_why_not(problem: Problem) -> str | None:
    widest = max(problem.k, *problem.extra)
    if widest > _WIDEST_HEAD:
        return f"a head is {widest} wide; up to {_WIDEST_HEAD} are held in registers"
    if problem.n > _MOST_KEYS:
        return f"there are {problem.n} keys; its int32 sums hold up to {_MOST_KEYS}"
    return _why_not(problem)


def _conv_why_not(problem: Problem) -> str | None:
    if problem.k > MAX_INT32_K:
        return f"K is {problem.k}; its int32 sums hold K up to {MAX_INT32_K}"
    return _why_not(problem)


def _hopper(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    from teint8.kernels import hopper

    return hopper.int8_mm(xq, xs, wq, ws, bias, dtype, residual=residual)


def _cublas(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
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


def tune(sizes: list[tuple[int, int, int]]) -> str:
    """Measure the tiles of matmuls (M, N, K) on this GPU, print their times, keep the fastest; returns the path of the file.

    Raises:
        RuntimeError: there is no GPU, or no Triton.

    """
    reason = "there is no GPU" if not torch.cuda.is_available() else why_not_triton()
    if reason is not None:
        raise RuntimeError(f"tune: {reason}; there is nothing to measure")
    from teint8.kernels import tuned

    for m, n, k in sizes:
        problem = Problem("cuda", torch.bfloat16, 1, m, n, k)
        tuned.tune(m, n, k, None if _cublas_why_not(problem) else _cublas)
    registry.choose_anew()
    return str(tuned.path(torch.cuda.current_device()))


def tune_new(sizes: list[tuple[int, int, int]], device: torch.device) -> None:
    """Measure the tiles of those matmuls that were not measured on this GPU before, silently; nothing where no Triton runs.

    Warns where one cannot be measured (there is no memory left, say): the tiles of the table serve then.
    """
    if why_not_triton() is not None:
        return
    from teint8.kernels import tuned

    with torch.cuda.device(device):
        new = [size for size in sizes if tuned.found("triton", torch.cuda.current_device(), *size) is None]
        for m, n, k in new:
            problem = Problem("cuda", torch.bfloat16, 1, m, n, k)
            try:
                tuned.tune(m, n, k, None if _cublas_why_not(problem) else _cublas, report=lambda line: None)
            except RuntimeError as error:
                warnings.warn(f"teint8: the tiles of a matmul M, N, K = {m}, {n}, {k} were not measured: {error}", stacklevel=2)
    if new:
        registry.choose_anew()


def _norm_why_not(problem: Problem) -> str | None:
    reason = _why_not(problem)
    return reason or (f"K is {problem.k}; a row of up to {_WIDEST_NORM} is held in registers" if problem.k > _WIDEST_NORM else None)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not_triton() -> str | None:
    """The reason why Triton cannot run on this GPU, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return "TRITON_INTERPRET=1 makes Triton run on the CPU" if _interpreting() else None


def _why_not(problem: Problem) -> str | None:
    """Triton on GPUs, its interpreter on the CPU."""
    if problem.device == "cuda":
        return why_not_triton()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None if _interpreting() else "TRITON_INTERPRET=1 is not set"


def _hopper_why_not(problem: Problem) -> str | None:
    reason = why_not_triton()
    if reason is not None:
        return reason
    from teint8.kernels import hopper

    reason = hopper.why_not(problem.device, problem.k)
    if reason is None and problem.n <= 64 and problem.k <= 256 and problem.m > 64:
        return f"K is {problem.k} and N {problem.n}: that is bound by writing the result, which the other kernel does faster"
    return reason


def _hopper_mlp_why_not(problem: Problem) -> str | None:
    return f"M is {problem.m}; it is for up to 64 rows" if problem.m > 64 else _mlp_why_not(problem) or _hopper_why_not(problem)


def _few_mlp_why_not(problem: Problem) -> str | None:
    return _mlp_why_not(problem) or _fewest_why_not(problem)


def _mlp_why_not(problem: Problem) -> str | None:
    """An MLP's features in between, which are contracted too."""
    if not 0 < problem.n <= MAX_INT32_K:
        return f"N is {problem.n}; its int32 sums hold 1 to {MAX_INT32_K} features in between"
    return None


_MOST_TILES = 65535  # of the second and third dimension of a grid


def _both_why_not(problem: Problem) -> str | None:
    """Beyond what a grid holds, each orientation is quantized on its own."""
    if problem.m > 32 * _MOST_TILES or problem.batch > _MOST_TILES:
        return f"M is {problem.m}, in a batch of {problem.batch}; a grid holds {32 * _MOST_TILES} rows, and a batch of {_MOST_TILES}"
    return _why_not(problem)


def _few_mm_why_not(problem: Problem) -> str | None:
    if problem.batch != 1 or problem.k % 4:
        return "one matmul and K a multiple of 4 are needed"
    return _fewest_why_not(problem)


def _fewest_why_not(problem: Problem) -> str | None:
    if problem.m > 2 and _hopper_why_not(problem) is None:
        return f"M is {problem.m}; tensor cores are faster for more than 2 rows"
    return _few_why_not(problem)


def _few_why_not(problem: Problem) -> str | None:
    reason = why_not_triton()
    if reason is None and problem.m > FEW_ROWS:
        reason = f"M is {problem.m}; it is for up to {FEW_ROWS} rows"
    if reason is None and problem.k > MAX_INT32_K:
        reason = f"K is {problem.k}; its int32 sums hold K up to {MAX_INT32_K}"
    return reason


def _cublas_why_not(problem: Problem) -> str | None:
    if torch.version.cuda is None:
        return "torch._int_mm runs cuBLAS on CUDA devices alone"
    if problem.batch != 1 or problem.m <= 16 or problem.k % 8 or problem.n % 8 or problem.k > MAX_INT32_K:
        return "torch._int_mm needs one matmul, M above 16, K and N multiples of 8"
    return None


def _measured_why_not(problem: Problem) -> str | None:
    """cuBLAS goes before every kernel of ours where it was measured to be faster on this machine."""
    reason = _cublas_why_not(problem) or why_not_triton()
    if reason is not None:
        return reason
    from teint8.kernels import tuned

    wins = tuned.found(tuned.CUBLAS, torch.cuda.current_device(), problem.m, problem.n, problem.k) is not None
    return None if wins else "it was not measured to be the fastest here: python -m teint8 tune M,N,K"


def _describe_mm(problem: Problem) -> str:
    from teint8.kernels import int8_mm

    device = torch.cuda.current_device() if problem.device == "cuda" else None
    return _tile(int8_mm.chosen(device, problem.batch, problem.m, problem.n, problem.k, True))


def _describe_hopper(problem: Problem) -> str:
    from teint8.kernels import hopper

    tile = hopper.tile_of(problem.m, problem.n, problem.batch, hopper.programs(torch.cuda.current_device()))
    name = next(name for name, known in hopper.TILES.items() if known == tile)
    return f"{name} {64 * tile.consumers}x{tile.block_n}, ring of {tile.stages}"


def _describe_conv(problem: Problem) -> str:
    from teint8.kernels import conv
    from teint8.kernels.int8_mm import major_of

    major = major_of(torch.cuda.current_device() if problem.device == "cuda" else None)
    c = problem.extra[1]
    if problem.n == c == 1 and problem.batch > 1:
        return "depthwise"
    by_row = problem.batch == 1 and c < 16
    return _tile(conv.tile_of(problem.m, problem.n, problem.k, by_row, major)) + (", by rows of a window" if by_row else "")


def _describe_attention(problem: Problem) -> str:
    from teint8.kernels import attention
    from teint8.kernels.int8_mm import major_of

    major = major_of(torch.cuda.current_device() if problem.device == "cuda" else None)
    c = attention.config_of(max(problem.k, *problem.extra), False, major)
    return f"{c.block_m}x{c.block_n}, {c.warps} warps, {c.stages} stages (without a mask)"


def _tile(c: Any) -> str:
    return f"{c.block_m}x{c.block_n}x{c.block_k}, {c.warps} warps, {c.stages} stages"


def register_all() -> None:
    """Register Triton for GPUs, and its interpreter, which runs only when asked for by name."""
    register("int8_mm", "triton-hopper", _hopper, device="cuda", priority=30, why_not=_hopper_why_not, flat=True, adds=True,
             describe=_describe_hopper)  # fmt: skip
    register("int8_mm", "triton-gemv", _few_mm, device="cuda", priority=35, why_not=_few_mm_why_not, flat=True)
    register("int8_mm", "cublas", _cublas, device="cuda", priority=15, why_not=_cublas_why_not)
    register("int8_mm", "cublas-measured", _cublas, device="cuda", priority=40, why_not=_measured_why_not)
    for op, run in (
        ("quantize", _quantize), ("int8_mm", _int8_mm), ("quantize_both", _quantize_both), ("activation", _activation),
    ):  # fmt: skip
        pairs = op in ("quantize", "quantize_both")
        why_not = _both_why_not if op in ("quantize_both", "activation") else _why_not
        describe = _describe_mm if op == "int8_mm" else None
        register(op, "triton", run, device="cuda", priority=20, why_not=why_not, pairs=pairs, describe=describe)
        register(op, "triton-interpreter", run, device="cpu", priority=-1, why_not=why_not, pairs=pairs)
    register("grouped_mm", "triton", _grouped_mm, device="cuda", priority=20, why_not=_why_not)
    register("grouped_mm", "triton-interpreter", _grouped_mm, device="cpu", priority=-1, why_not=_why_not)
    register("conv", "triton", _conv, device="cuda", priority=20, why_not=_conv_why_not, describe=_describe_conv)
    register("conv", "triton-interpreter", _conv, device="cpu", priority=-1, why_not=_conv_why_not)
    register("attention", "triton", _attention, device="cuda", priority=20, why_not=_attention_why_not, describe=_describe_attention)
    register("attention", "triton-interpreter", _attention, device="cpu", priority=-1, why_not=_attention_why_not)
    register("block_mm", "triton", _block_mm, device="cuda", priority=20, why_not=_why_not, describe=_describe_block)
    register("block_mm", "triton-interpreter", _block_mm, device="cpu", priority=-1, why_not=_why_not)
    register("norm", "triton", _norm, device="cuda", priority=20, why_not=_norm_why_not)
    register("norm", "triton-interpreter", _norm, device="cpu", priority=-1, why_not=_norm_why_not)
    register("linear", "triton", _linear, device="cuda", priority=20, why_not=_why_not)
    register("linear", "triton-gemv", _few, device="cuda", priority=30, why_not=_few_why_not)
    register("mlp", "triton-hopper", _hopper_mlp, device="cuda", priority=25, why_not=_hopper_mlp_why_not)
    register("mlp", "triton-gemv", _few_mlp, device="cuda", priority=30, why_not=_few_mlp_why_not)
