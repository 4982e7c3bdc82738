"""CPU implementations: AMX tiles, AVX-512 VNNI, AVX2, oneDNN; rows and epilogues in C where a compiler is at hand, else in torch."""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.kernels import cpu_rows
from teint8.ops.registry import Problem, register

_CHUNK = 128  # rows whose int32 sums are held at once: they stay in the L2 cache
_CODES = 1 << 23  # bytes of codes that are multiplied in one call in C
_VNNI_ROWS = 16
_KEEP = 1 << 28  # bytes of scratch that a thread keeps, and of results
_LEAST = 1 << 17  # bytes from which the C library asks the system for fresh pages


class _Scratch(threading.local):
    """Buffers of a thread, kept: on a CPU fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[Any, tuple[Tensor, ...]] = {}

    def get(self, **wanted: tuple[torch.dtype, int, int]) -> tuple[Tensor, ...]:
        """Matrices of unspecified content, valid until the next call: names with dtype, rows and columns of each."""
        key = tuple(wanted.items())
        views = self.views.get(key)
        if views is None:
            views = tuple(self._view(name, *matrix) for name, matrix in wanted.items())
            if sum(view.nbytes for view in views) <= _KEEP:
                self.views[key] = views
        return views

    def _view(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        size = rows * columns
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or len(self.views) > 256:
            self.views.clear()  # so that the old buffers go
            with torch.inference_mode(False):
                buffer = torch.empty(size + 64 // dtype.itemsize, dtype=dtype, device="cpu")
            start = -buffer.data_ptr() % 64 // dtype.itemsize  # a cache line is not shared
            buffer = buffer[start : start + size]
            if buffer.nbytes <= _KEEP:
                self.buffers[name] = buffer
        return buffer[:size].view(rows, columns)


class _Results(threading.local):
    """Memory for large results, used again when nobody holds the tensor that it was given out for, nor a view of it.

    Fresh memory comes from the system page by page: for a result of a megabyte that takes as long as the matmul. Memory that was
    shared with another process is not used again: nobody here knows who reads it.
    """

    def __init__(self) -> None:
        self.held: list[torch.UntypedStorage] = []

    def empty(self, m: int, n: int, dtype: torch.dtype) -> Tensor:
        """(m, n) of unspecified content."""
        size = m * n * dtype.itemsize
        if not _LEAST <= size <= _KEEP:
            return torch.empty(m, n, dtype=dtype, device="cpu")
        for i in reversed(range(len(self.held))):  # the latest is still in the cache
            storage = self.held.pop(i)  # out of the list, so that this is its one holder if it is free
            alone = sys.getrefcount(storage) == _ALONE and _torch.storage_uses(storage) == 1
            free = alone and storage.nbytes() == size and not storage.is_shared()
            self.held.insert(len(self.held) if free else i, storage)
            if free:
                return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (m, n))  # type: ignore[call-overload,no-any-return]
        y = torch.empty(m, n, dtype=dtype, device="cpu")
        self.held.append(y.untyped_storage())
        while sum(storage.nbytes() for storage in self.held) > _KEEP:
            self.held.pop(0)
        return y


def _references_of_one() -> int:
    """What ``sys.getrefcount`` says of a storage that one local variable holds."""
    storage = torch.empty(1, device="cpu").untyped_storage()
    return sys.getrefcount(storage)


_ALONE = _references_of_one()
_scratch = _Scratch()
_results = _Results()


def results(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result (m, n), of unspecified content: this thread's own again, where nobody holds it any more."""
    return _results.empty(m, n, dtype)


def release() -> None:
    """Give back the scratch and the results' memory that this thread keeps."""
    _scratch.buffers.clear()
    _scratch.views.clear()
    _results.held.clear()


def _float32(bias: Tensor | None) -> Tensor | None:
    if bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()):
        return bias
    return bias.detach().float().contiguous()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _linear_c(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A chunk of rows at a time: codes and sums stay in the cache, only the result is fresh memory."""
    (m, k), n = x.shape, wq.shape[0]
    x, ws, w = (x if x.stride(1) == 1 else x.contiguous()), ws.contiguous(), wq.t()
    bias = _float32(bias)
    y = _results.empty(m, n, dtype)
    for i in range(0, m, _CHUNK):
        rows = min(_CHUNK, m - i)
        xi, yi = (x, y) if rows == m else (x[i : i + rows], y[i : i + rows])
        codes, scales, sums = _scratch.get(codes=(torch.int8, rows, k), scales=(torch.float32, 1, rows), sums=(torch.int32, rows, n))
        cpu_rows.quantize(xi, codes, scales, None, None)
        torch._int_mm(codes, w, out=sums)
        cpu_rows.epilogue(sums, scales, ws, bias, yi)
    return y


def _many_on(isa: str) -> Callable[..., list[Tensor]]:
    def run(x: Tensor, weights: Sequence[tuple[Tensor, Tensor, Any]], dtype: torch.dtype) -> list[Tensor]:
        return _in_c(isa, x, None, weights, dtype)

    return run


def _linear_on(isa: str) -> Callable[..., Tensor]:
    def run(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _in_c(isa, x, None, [(wq, ws, bias)], dtype)[0]

    return run


def _mm_on(isa: str) -> Callable[..., Tensor]:
    def run(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if xq.ndim == 2:
            return _in_c(isa, xq, xs.contiguous(), [(wq, ws, bias)], dtype)[0]
        weight = wq[0], ws[0], None if bias is None else bias[0]
        return _in_c(isa, xq[0], xs[0].contiguous(), [weight], dtype)[0].unsqueeze(0)

    return run


def _in_c(isa: str, x: Tensor, xs: Tensor | None, weights: Sequence[tuple[Tensor, Tensor, Any]], dtype: torch.dtype) -> list[Tensor]:
    """x as floats, or as codes with their scales, by weights: codes, scale and bias of each."""
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    kp, block = _up(k, 64), cpu_rows.BLOCK_ROWS[isa]
    chunk = min(m, max(_CODES // kp // block * block, 256 // block * block))
    codes, scales, scratch = _scratch.get(
        codes=(torch.int8, _up(chunk, block), kp),
        scales=(torch.float32, 1, chunk),
        scratch=(torch.int8, torch.get_num_threads(), max(cpu_rows.scratch_bytes(w[0].shape[0], kp) for w in weights)),
    )
    made = [
        cpu_rows.Weight(wq.contiguous(), ws.contiguous(), _float32(bias), _results.empty(m, wq.shape[0], dtype))
        for wq, ws, bias in weights
    ]
    for i in range(0, m, chunk):
        xi, part = (x, made) if chunk == m else (x[i : i + chunk], [w._replace(y=w.y[i : i + chunk]) for w in made])
        cpu_rows.linear(isa, xi, codes, scales if xs is None else xs[i : i + chunk], part, scratch)
    return [w.y for w in made]


def _quantize_c(x: Tensor, seed: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scales = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    cpu_rows.quantize(x if x.stride(1) == 1 else x.contiguous(), codes, scales, seed, scale)
    return codes, scales


def _quantize_c_why_not(problem: Problem) -> str | None:
    if problem.dtype not in cpu_rows.DTYPES:
        return f"it has no {problem.dtype}"
    return cpu_rows.why_not()


def _mm_c(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x, w = xq[0].contiguous(), wq[0].t()
    m, n = x.shape[0], w.shape[1]
    xs, ws = xs[0].contiguous(), ws[0].contiguous()
    bias = None if bias is None else bias[0].float().contiguous()
    y = _results.empty(m, n, dtype)
    for i in range(0, m, _CHUNK):
        rows = min(_CHUNK, m - i)
        (sums,) = _scratch.get(sums=(torch.int32, rows, n))
        torch._int_mm(x[i : i + rows], w, out=sums)
        cpu_rows.epilogue(sums, xs[i : i + rows], ws, bias, y[i : i + rows])
    return y.unsqueeze(0)


def _amx_why_not(problem: Problem) -> str | None:
    reason = _mm_c_why_not(problem)
    if reason is None and problem.m < 8:
        reason = "a few rows do not fill a tile"
    return reason or (None if cpu_rows.has_amx() else "the CPU has no AMX")


def _vnni_why_not(problem: Problem) -> str | None:
    reason = _mm_c_why_not(problem)
    if reason is None and problem.m < _VNNI_ROWS:
        reason = f"M is {problem.m}; for fewer than {_VNNI_ROWS} rows packing the weight costs more than it saves"
    return reason or (None if cpu_rows.has_vnni() else "the CPU has no AVX-512 VNNI")


def _avx2_why_not(problem: Problem) -> str | None:
    reason = _mm_c_why_not(problem)
    return reason or (None if cpu_rows.has_avx2() else "it is for CPUs with AVX2 and without AVX-512")


def _mm_c_why_not(problem: Problem) -> str | None:
    if problem.dtype not in cpu_rows.DTYPES:
        return f"it has no {problem.dtype}"
    return _onednn_why_not(problem) or cpu_rows.why_not()


def _mm_onednn(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x, w = xq[0].contiguous(), wq[0].t()
    y = torch._int_mm(x, w).float().mul_(ws[0]).mul_(xs[0].unsqueeze(1))
    return (y if bias is None else y.add_(bias[0].float())).to(dtype).unsqueeze(0)


def _onednn_why_not(problem: Problem) -> str | None:
    if problem.batch > 1:
        return "oneDNN's INT8 matmul has no batch"
    if problem.k > numerics.MAX_INT32_K:
        return f"K = {problem.k} overflows int32"
    return "torch._int_mm is wrong on the CPU for K = 1" if problem.k == 1 else None


def _mm_float(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Batched: a float32 matmul holds the sums exactly below 2^24, K <= 1040; torch has no batched INT8 matmul on the CPU."""
    sums = (xq.float() @ wq.float().mT).add_(0.0)  # -0.0 + 0.0 is 0.0, as an integer's zero is
    y = sums.mul_(ws.unsqueeze(1)).mul_(xs.unsqueeze(2))
    return (y if bias is None else y.add_(bias.float().unsqueeze(1))).to(dtype)


def _float_why_not(problem: Problem) -> str | None:
    if problem.k * numerics.QMAX**2 > 2**24:
        return f"K = {problem.k}: float32 sums would not be exact"
    return None


def register_all() -> None:
    """Register the CPU's implementations."""
    for isa, priority, why_not in (("amx", 30, _amx_why_not), ("vnni", 25, _vnni_why_not), ("avx2", 22, _avx2_why_not)):
        register("linear", f"cpu-{isa}", _linear_on(isa), device="cpu", priority=priority, why_not=why_not, many=_many_on(isa))
        register("int8_mm", f"cpu-{isa}", _mm_on(isa), device="cpu", priority=priority, why_not=why_not, flat=True)
    register("linear", "cpu-onednn-c", _linear_c, device="cpu", priority=20, why_not=_mm_c_why_not)
    register("quantize", "cpu-c", _quantize_c, device="cpu", priority=20, why_not=_quantize_c_why_not)
    register("int8_mm", "cpu-onednn-c", _mm_c, device="cpu", priority=20, why_not=_mm_c_why_not)
    register("int8_mm", "cpu-onednn", _mm_onednn, device="cpu", priority=10, why_not=_onednn_why_not)
    register("int8_mm", "cpu-exact-float", _mm_float, device="cpu", priority=5, why_not=_float_why_not)
