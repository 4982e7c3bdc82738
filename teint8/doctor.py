"""The doctor: versions, devices, which implementations are usable and why others are not, a self-test of the contract."""

import platform
from typing import Any, cast

import torch

import teint8
from teint8 import activations, ops
from teint8.ops import registry
from teint8.ops.raw_conv import Window


def run() -> int:
    """Print the report; returns 0 if every usable implementation gives the contract's bits."""
    print(f"teint8 {teint8.__version__}, torch {torch.__version__}, triton {_version('triton')}, Python {platform.python_version()}")
    print("* is what the samples here take: 33 rows of 65 float32 values by 17 channels; larger ones may take another")
    failed: list[bool] = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
        print(f"\n{device}: {name}")
        failed += [_report(op, implementation, device) for op in registry.OPS for implementation in registry.implementations(op)]
    return int(any(failed))


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
    extra = {"conv": (1, 65), "attention": (33,), "block_mm": (32,), "rotate": (1,)}.get(op, ())
    problem = registry.Problem(device, torch.float32, 1, 2 if op == "mlp" else 33, 17, 65, extra)
    reason = registry.why_not(implementation, problem)
    wrong = 0 if reason else _different(op, implementation, device)
    verdict = f"not usable: {reason}" if reason else f"{wrong} bits wrong" if wrong else "ok, the contract's bits"
    chosen = registry.best(op, problem) is implementation
    print(f"  {op:17s} {implementation.name:20s} {'* ' if chosen else '  '}{verdict}")
    return bool(wrong)


def _different(op: str, implementation: registry.Implementation, device: str) -> int:
    """Elements that differ from the reference, over all results of the op, on values with zeros, outliers and a NaN."""
    arguments = _arguments(op, device)
    reference = next((i for i in registry.implementations(op) if i.name == "reference"), None)
    want = _composed(op, arguments) if reference is None else reference.run(*arguments)
    got = implementation.run(*arguments)
    if got is None:  # an optional op that leaves this problem to others
        return 0
    pairs = zip(_tensors(got), _tensors(want), strict=True)
    return sum(int(((a != b) & ~((a != a) & (b != b))).sum()) for a, b in pairs)


def _arguments(op: str, device: str) -> tuple[Any, ...]:
    """What ``teint8.ops.registry`` says that an implementation of the op is called with."""
    generator = torch.Generator().manual_seed(0)
    x, w, u = (torch.randn(rows, 65, generator=generator).to(device) for rows in (33, 17, 33))
    x[3, 5], x[4], x[5, 6] = float("nan"), 0, 1e6
    bias, seed = torch.randn(17, generator=generator).to(device), torch.tensor([5], device=device)
    (xq, xs), (wq, ws) = ops.quantize(x, impl="reference"), ops.quantize(w, impl="reference")
    down = ops.quantize(w.mT, impl="reference")
    hs = ops.quantize(activations.value("silu", x, u), impl="reference")[1]
    return {
        "quantize": (x, seed, None),
        "int8_mm": (xq[None], xs[None], wq[None], ws[None], bias[None], x.dtype),
        "linear": (x, wq, ws, bias, x.dtype),
        "quantize_both": (x, seed),
        "activation": (x, u, u, "silu", True, True, True, True, seed, hs),
        "mlp": (x[:2], (wq, ws), (wq, ws), down, (None, None, None), "silu"),
        "grouped_mm": (xq, xs, wq.expand(2, -1, -1), ws.expand(2, -1), torch.tensor([8, 30], device=device), x.dtype),
        "conv": (xq.view(1, 33, 65), xs[:1, None], wq.view(17, 1, 65), ws, bias, Window((1,), (0, 0), (1,)), x.dtype),
        "quantize_channels": (x[None],),
        "attention": (*(t[None, None] for t in (xq, xs, wq, ws, *ops.quantize(u[:, :17], impl="reference"))), None, True, 0.1, x.dtype),
        "block_mm": (xq, xs[:, None].expand(-1, 3), wq, ws[:, None].expand(-1, 3), bias, 32, x.dtype),
        "rotate": (x, torch.exp2(torch.arange(65, device=device) % 5 - 2.0), 1, True, None),
        "norm": (x, u, u[0], None, "rms", 1e-5, True, True),
        "channel_norm": (x.view(3, 11, 65), w[0, :11], None, None, None, 11, 1e-5, True, True),
    }[op]


def _composed(op: str, arguments: tuple[Any, ...]) -> Any:
    """What the optional ops are one after the other, by the reference."""
    x, multiply = arguments[0], cast(Any, ops.int8_mm)
    if op == "linear":
        return multiply(*ops.quantize(x, impl="reference"), *arguments[1:], impl="reference")
    (gate, up, down), kind = arguments[1:4], arguments[5]
    codes = ops.quantize(x, impl="reference")
    g, u = (multiply(*codes, *weight, None, x.dtype, "reference") for weight in (gate, up))
    h = ops.quantize(ops.activate(kind, g, u, impl="reference"), impl="reference")
    return multiply(*h, *down, None, x.dtype, "reference")


def _tensors(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)
