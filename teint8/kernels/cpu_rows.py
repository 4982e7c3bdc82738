"""Compiles ``cpu_rows.c`` with the machine's C compiler when first used (a fraction of a second, then cached) and calls it."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

BLOCK_ROWS = {"amx": 32, "vnni": 12, "avx2": 2}
"""Rows of codes that the matmul reads at a time, by instruction set."""

_SOURCE = pathlib.Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_HELD = 1 << 18  # bytes of packed weights: they stay in the L2 cache beside as many of codes
_ALONE = 1 << 14  # elements below which threads cost more than they bring


def why_not() -> str | None:
    """The reason why the C kernels cannot be used here, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def has_amx() -> bool:
    """Whether the CPU has AMX tiles for INT8 and the kernel lets this process use them."""
    return why_not() is None and _has_amx()


@functools.cache
def _has_amx() -> bool:
    library = _load()
    return hasattr(library, "amx_enable") and bool(library.amx_enable())  # type: ignore[union-attr]


def has_vnni() -> bool:
    """Whether the CPU has AVX-512 VNNI."""
    return why_not() is None and hasattr(_load(), "vnni_linear_f32")


def has_avx2() -> bool:
    """Whether the CPU has AVX2 and no AVX-512."""
    return why_not() is None and hasattr(_load(), "avx2_linear_f32")


def quantize(x: Tensor, codes: Tensor, scales: Tensor, seed: Tensor | None, scale: Tensor | None) -> None:
    """Fill codes (M, K) and scales (M,) from x (M, K), whose rows are contiguous; seed (S,) and scale (M,) as in the registry."""
    m, k = x.shape
    scale = None if scale is None else scale.contiguous()
    seed = None if seed is None else seed.contiguous()
    _function(f"quantize_{DTYPES[x.dtype]}")(
        x.data_ptr(),
        x.stride(0),
        codes.data_ptr(),
        scales.data_ptr(),
        m,
        k,
        None if seed is None else seed.data_ptr(),
        1 if seed is None else m // seed.numel(),
        None if scale is None else scale.data_ptr(),
        _threads(m * k),
    )


class Weight(NamedTuple):
    """A weight that codes of an activation are multiplied by, and what becomes of it.

    Attributes:
        codes: contiguous int8 (N, K).
        scale: contiguous float32 (N,).
        bias: the same, or None.
        y: (M, N), the result.

    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    y: Tensor


def linear(isa: str, x: Tensor, codes: Tensor, scales: Tensor, weights: Sequence[Weight], scratch: Tensor) -> None:
    """Fill the results of one or more weights from x (M, K): floats, whose scales are written, or int8 codes, whose scales are given.

    Args:
        isa: "amx", "vnni" or "avx2".
        x: rows contiguous, in the dtype of the results or int8.
        codes: scratch, int8 (M rounded up to ``BLOCK_ROWS``, K rounded up to 64).
        scales: float32 (M,).
        weights: of one K, their results of one dtype.
        scratch: int8 (threads, the most ``scratch_bytes`` of a weight), aligned to 64 bytes; as many threads run at most.

    """
    m, k = x.shape
    kp = codes.shape[1]
    given = x.dtype == torch.int8
    fields: list[int] = []
    for w, scale, bias, y in weights:
        n = w.shape[0]
        fields += (w.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), n, _panels(n, kp))
    work = m * k * sum(w.codes.shape[0] for w in weights)
    _function(f"{isa}_linear_{DTYPES[weights[0].y.dtype]}")(
        None if given else x.data_ptr(),
        x.data_ptr() if given else None,
        x.stride(0),
        codes.data_ptr(),
        scales.data_ptr(),
        (ctypes.c_int64 * len(fields))(*fields),  # struct weight of cpu_rows.c: six numbers of eight bytes
        len(weights),
        scratch.data_ptr(),
        m,
        k,
        kp,
        min(_threads(work // 64), scratch.shape[0]),
    )


def _panels(n: int, kp: int) -> int:
    """Pairs of panels (32 channels) that a thread packs at once, for N channels: as many as ``_HELD`` holds, or one."""
    return max(1, min(-(-n // 32), _HELD // (32 * kp)))


def scratch_bytes(n: int, kp: int) -> int:
    """What a thread of ``linear`` needs, for N channels of K rounded up to 64: PANEL of cpu_rows.c for each panel, and one to read."""
    return 32 * kp + _panels(n, kp) * (32 * kp + 128)


def epilogue(sums: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y (M, N) from int32 sums (M, N), float32 scales (M,) and (N,) and float32 bias (N,), all contiguous."""
    m, n = sums.shape
    _function(f"epilogue_{DTYPES[y.dtype]}")(
        sums.data_ptr(),
        x_scale.data_ptr(),
        w_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        _threads(m * n),
    )


def channels(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Fill codes (B, P, C), contiguous, and scales (B, C) from x (B, P, C), whose channels are contiguous: a scale for each channel."""
    batch, pixels, count = x.shape
    _function(f"channels_{DTYPES[x.dtype]}")(
        x.data_ptr(), x.stride(0), x.stride(1), codes.data_ptr(), scales.data_ptr(), batch, pixels, count, _threads(x.numel())
    )


def _window(x: Tensor, kernel: tuple[int, int], out: tuple[int, int], *where: tuple[int, int]) -> Any:
    """``window`` of cpu_conv.h: strides, zeros before, dilations are two numbers each."""
    return (ctypes.c_int64 * 14)(*x.shape, *out, *kernel, *(number for pair in where for number in pair))


def depthwise(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor, kernel: tuple[int, int], *where: Any
) -> None:
    """Fill y (B, H', W', C) from codes (B, H, W, C), scales (B, C), taps (kernel, C), scales (C) and bias (C); all contiguous."""
    zeros = torch.zeros(x.shape[-1], dtype=torch.int8, device="cpu")
    taps, channels = w.shape
    pairs = torch.empty(-(-channels // 32) * -(-taps // 2) * 64, dtype=torch.int16, device="cpu")
    _function("taps_i8")(w.data_ptr(), pairs.data_ptr(), taps, channels)
    window = _window(x, kernel, (y.shape[1], y.shape[2]), *where)
    _function(f"depthwise_{DTYPES[y.dtype]}")(
        x.data_ptr(),
        x_scale.data_ptr(),
        pairs.data_ptr(),
        w_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        window,
        zeros.data_ptr(),
        _threads(y.numel()),
    )


def windows(x: Tensor, rows: Tensor, kernel: tuple[int, int], out: tuple[int, int], *where: Any) -> None:
    """Fill rows (B * H' * W', kernel * C) with what each window sees of codes (B, H, W, C), contiguous."""
    _function("windows_i8")(x.data_ptr(), rows.data_ptr(), _window(x, kernel, out, *where), _threads(rows.numel()))


def _threads(elements: int) -> int:
    return 1 if elements < _ALONE else torch.get_num_threads()


@functools.cache
def _function(name: str) -> Callable[..., None]:
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"cpu_rows: {reason}")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = getattr(_load(), name)
    function.argtypes = {
        "quantize": [pointer, size, pointer, pointer, size, size, pointer, size, pointer, number],
        "epilogue": [*[pointer] * 5, size, size, number],
        "channels": [pointer, size, size, pointer, pointer, size, size, size, number],
        "depthwise": [*[pointer] * 8, number],
        "taps": [pointer, pointer, size, size],
        "windows": [*[pointer] * 3, number],
        "linear": [pointer, pointer, size, *[pointer] * 3, size, pointer, size, size, size, number],
    }[name.split("_")[-2]]
    function.restype = None
    callable_: Callable[..., None] = function
    return callable_


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "no C compiler was found (install gcc, or set CC)"
    built = _build(compiler)
    if isinstance(built, str):
        return built
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        return f"{built} does not load: {error}"


def _build(compiler: str) -> pathlib.Path | str:
    source = b"".join(_SOURCE.with_name(name).read_bytes() for name in (_SOURCE.name, "cpu_conv.h", "cpu_avx2.h"))
    key = hashlib.sha256(source + repr((compiler, _FLAGS, platform.machine(), _cpu())).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "teint8"
    library = cache / f"cpu_rows-{key}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed when whole: several processes may build at once
            made = pathlib.Path(folder) / library.name
            subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120)
            made.replace(library)
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile {_SOURCE.name}: {error.stderr.decode(errors='replace').strip()[-400:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{_SOURCE.name} could not be built in {cache}: {error}"
    return library


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
