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
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_SOURCE = pathlib.Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
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


def quantize(x: Tensor, codes: Tensor, scales: Tensor, seed: Tensor | None, scale: Tensor | None) -> None:
    """Fill codes (M, K or wider, filled with zeros) and scales (M,) from x (M, K), whose rows are contiguous.

    Args:
        seed: (S,) as in the registry. scale: (M,) as in the registry.
    """
    m, k = x.shape
    scale = None if scale is None else scale.contiguous()
    seed = None if seed is None else seed.contiguous()
    _function(f"quantize_{DTYPES[x.dtype]}")(
        x.data_ptr(),
        x.stride(0),
        codes.data_ptr(),
        codes.stride(0),
        scales.data_ptr(),
        m,
        k,
        None if seed is None else seed.data_ptr(),
        1 if seed is None else m // seed.numel(),
        None if scale is None else scale.data_ptr(),
        _threads(m * k),
    )


def amx_pack(w: Tensor, panels: Tensor) -> None:
    """Fill panels (N rounded up to 32, K rounded up to 64) from contiguous codes w (N, K), in the order that tiles want."""
    n, k = w.shape
    _function("amx_pack")(w.data_ptr(), n, k, panels.data_ptr(), panels.shape[1], _threads(n * k))


def amx_mm(codes: Tensor, x_scale: Tensor, panels: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y (M, N) from codes (M rounded up to 32, K rounded up to 64), panels of ``amx_pack``, float32 scales and bias."""
    m, n = y.shape
    k = codes.shape[1]
    _function(f"amx_mm_{DTYPES[y.dtype]}")(
        codes.data_ptr(),
        x_scale.data_ptr(),
        panels.data_ptr(),
        w_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
        _threads(m * n * k // 64),
    )


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
        "quantize": [pointer, size, pointer, size, pointer, size, size, pointer, size, pointer, number],
        "epilogue": [*[pointer] * 5, size, size, number],
        "amx_pack": [pointer, size, size, pointer, size, number],
        "amx_mm": [*[pointer] * 6, size, size, size, number],
    }[name.rpartition("_")[0] if name != "amx_pack" else name]
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
    source = _SOURCE.read_bytes()
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
