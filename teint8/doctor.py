"""The doctor: versions, devices, which implementations are usable and why others are not, a self-test of the contract."""

import platform
from typing import Any

import torch

import teint8
from teint8 import ops
from teint8.ops import registry


def run() -> int:
    """Print the report; returns 0 if every usable implementation gives the contract's bits."""
    print(f"teint8 {teint8.__version__}, torch {torch.__version__}, triton {_version('triton')}, Python {platform.python_version()}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
        print(f"\n{device}: {name}")
        failed = [_report(op, implementation, device) for op in registry.OPS for implementation in registry.implementations(op)]
        if any(failed):
            return 1
    return 0


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _report(op: str, implementation: registry.Implementation, device: str) -> bool:
    """Print one line; whether the implementation broke the contract."""
    if implementation.device not in ("", device):
        return False
    problem = registry.Problem(device, torch.float32, 1, 33, 17, 65)
    reason = registry.why_not(implementation, problem)
    wrong = 0 if reason else _different(op, implementation, device)
    verdict = f"not usable: {reason}" if reason else f"{wrong} bits wrong" if wrong else "ok, the contract's bits"
    chosen = registry.best(op, problem) is implementation
    print(f"  {op:9s} {implementation.name:20s} {'* ' if chosen else '  '}{verdict}")
    return bool(wrong)


def _different(op: str, implementation: registry.Implementation, device: str) -> int:
    """Elements that differ from the reference on values with zeros, outliers and a NaN."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 65, generator=generator).to(device) for rows in (33, 17))
    x[3, 5], x[4], x[5, 6] = float("nan"), 0, 1e6
    bias = torch.randn(17, generator=generator).to(device)
    (xq, xs), (wq, ws) = ops.quantize(x, impl="reference"), ops.quantize(w, impl="reference")
    want = ops.int8_mm(xq, xs, wq, ws, bias, x.dtype, "reference")
    got: Any
    if op == "quantize":
        got, want = implementation.run(x, None, None)[0], xq
    elif op == "int8_mm":
        got = implementation.run(xq[None], xs[None], wq[None], ws[None], bias[None], x.dtype)[0]
    else:
        got = implementation.run(x, wq, ws, bias, x.dtype)
    return int(((got != want) & ~(got.isnan() & want.isnan())).sum()) if got.is_floating_point() else int((got != want).sum())
