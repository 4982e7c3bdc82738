"""Tiles that were measured on this machine: optional, kept on disk, and asked for before the tables that are shipped.

A tile never changes a result, so that a file of another machine could only cost time; the file's name holds the GPU and Triton's
version all the same. Nothing is measured while a model runs: ``tune`` is called for problems that are named to it.
"""

import functools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from teint8.kernels import hopper, int8_mm

CUBLAS = "cublas"
"""The kernel whose entries say that cuBLAS is faster than every tile."""

# more than the table has, for chips that nobody has measured; what does not fit a chip is passed over
_CONFIGS = tuple(
    int8_mm.Config(*c)
    for c in ((16, 64, 256, 4, 4), (32, 64, 256, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (64, 128, 128, 8, 3),
              (128, 64, 128, 4, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 128, 4, 3), (128, 128, 128, 8, 3),
              (128, 256, 64, 8, 3), (256, 128, 64, 8, 3))
)  # fmt: skip


def path(device: int) -> pathlib.Path:
    """The file for a GPU."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "teint8"
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device))
    return cache / f"tiles-1-{name}-triton-{triton.__version__}.json"  # 1: of the fields of Tile and Config


@functools.cache
def _table(device: int) -> dict[str, Any]:
    file = path(device)
    try:
        table = json.loads(file.read_text())
        wrong = ["the whole"] if not isinstance(table, dict) else [key for key, fields in table.items() if not _fits(key, fields)]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what teint8 writes")
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.warn(f"teint8: tiles that were tuned cannot be read, those of the table run: {error}", stacklevel=2)
        return {}
    except ValueError as error:
        raise ValueError(f"{file} does not hold tiles that teint8 measured ({error}); delete it") from error
    return table


def _fits(key: str, fields: Any) -> bool:
    """Whether an entry has the fields of its kernel's tile, all of them numbers."""
    kernel = key.partition(" ")[0]
    if kernel == CUBLAS:
        return bool(fields == [CUBLAS])
    kinds = {"hopper": hopper.Tile, "triton": int8_mm.Config}
    known = kernel in kinds and isinstance(fields, list) and len(fields) == len(kinds[kernel]._fields)
    return known and all(isinstance(field, int) for field in fields)


def _key(kernel: str, m: int, n: int, k: int, plain: bool) -> str:
    """Rows count by powers of two, rounded up."""
    return f"{kernel} {1 << max(m - 1, 0).bit_length()}x{n}x{k}{'' if plain else ' added'}"


def found(kernel: str, device: int | None, m: int, n: int, k: int, plain: bool = True) -> list[Any] | None:
    """The fields of the tile that was the fastest, or None; for the interpreter always None."""
    return None if device is None else _table(device).get(_key(kernel, m, n, k, plain))


def tune(m: int, n: int, k: int, cublas: Callable[..., Tensor] | None = None, report: Callable[[str], Any] = print) -> list[str]:
    """Measure every tile for x (M, K) by w (N, K), without and with a bias, and keep the fastest; returns the new keys.

    Args:
        m, n, k: sizes of the problem.
        cublas: an int8_mm of operands with their batch dimension, to be measured too, or None.
        report: called with a line for each tile.

    Raises:
        RuntimeError: a tile gives other bits than the default one (a bug: please report it).

    """
    device = torch.cuda.current_device()
    x, w = (torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8) for rows in (m, n))
    xs, ws, bias = torch.rand(m, device="cuda"), torch.rand(n, device="cuda"), torch.randn(n, device="cuda").bfloat16()
    chosen: dict[str, list[Any] | None] = {}
    best = float("inf")
    kernels: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = []
    if hopper.why_not("cuda", k) is None:
        tiles = {name: t for name, t in hopper.TILES.items() if m > 64 or t.consumers == 1}
        kernels.append(("hopper", tiles, lambda t, b: hopper.int8_mm(x, xs, w, ws, b, torch.bfloat16, tile=t)))
    configs = {str(tuple(c)): c for c in _CONFIGS}
    one = (x[None], xs[None], w[None], ws[None])
    kernels.append(("triton", configs, lambda c, b: int8_mm.int8_mm(*one, None if b is None else b[None], torch.bfloat16, c)[0]))
    for kernel, candidates, run in kernels:
        for b in (None, bias):
            key = _key(kernel, m, n, k, b is None)
            fit = {name: c for name, c in candidates.items() if b is None or c is not hopper.HUGE}
            times = _measured(key, {name: functools.partial(run, c, b) for name, c in fit.items()}, run(None, b), report)
            chosen[key] = list(candidates[min(times, key=times.__getitem__)])
            best = min(best, *times.values()) if b is None else best
    if cublas is not None:
        key, want = _key(CUBLAS, m, n, k, True), int8_mm.int8_mm(*one, None, torch.bfloat16)[0]
        took = _measured(key, {CUBLAS: lambda: cublas(*one, None, torch.bfloat16)[0]}, want, report)[CUBLAS]
        chosen[key] = [CUBLAS] if took < best else None
    _keep(device, chosen)
    return list(chosen)


def _measured(key: str, runs: dict[str, Callable[[], Tensor]], want: Tensor, report: Callable[[str], Any]) -> dict[str, float]:
    times = {}
    for name, run in runs.items():
        try:
            got = run()
        except triton.runtime.errors.OutOfResources as error:
            report(f"{key}  {name}: does not fit this chip ({error})")
            continue
        if not torch.equal(got, want):
            raise RuntimeError(f"tune: {name} gives other bits than the default tile for {key}")
        times[name] = triton.testing.do_bench(run, return_mode="median")
        report(f"{key}  {name}: {times[name] * 1e3:.1f} us")
    return times


def _keep(device: int, chosen: dict[str, list[Any] | None]) -> None:
    """Write what was chosen; None takes an entry away."""
    _table.cache_clear()
    table = {key: value for key, value in {**_table(device), **chosen}.items() if value is not None}
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")  # renamed when whole: several processes may tune
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(file)
    _table.cache_clear()
    hopper.forget_plans()
    int8_mm.chosen.cache_clear()
