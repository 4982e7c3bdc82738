"""GPU implementations: Triton, imported when first called. The same kernels run in Triton's interpreter on the CPU for tests."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from teint8.ops.registry import Problem, register


def _quantize(x: Tensor, seed: Tensor | None, scale: Tensor | None) -> Any:
    from teint8.kernels import quantize

    return quantize.quantize(x, seed, scale)


def _int8_mm(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from teint8.kernels import int8_mm

    return int8_mm.int8_mm(xq, xs, wq, ws, bias, dtype)


def _linear(x: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One kernel after the other, without what the dispatcher costs in between."""
    from teint8.kernels import int8_mm, quantize

    xq, xs = quantize.quantize(x, None, None)
    b = None if bias is None else bias.detach().unsqueeze(0)
    return int8_mm.int8_mm(xq.unsqueeze(0), xs.unsqueeze(0), wq.unsqueeze(0), ws.unsqueeze(0), b, dtype).squeeze(0)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return "TRITON_INTERPRET=1 makes Triton run on the CPU" if _interpreting() else None


def _interpreter_why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None if _interpreting() else "TRITON_INTERPRET=1 is not set"


def register_all() -> None:
    """Register Triton for GPUs, and its interpreter, which runs only when asked for by name."""
    register("quantize", "triton", _quantize, device="cuda", priority=20, why_not=_why_not)
    register("int8_mm", "triton", _int8_mm, device="cuda", priority=20, why_not=_why_not)
    register("linear", "triton", _linear, device="cuda", priority=20, why_not=_why_not)
    register("quantize", "triton-interpreter", _quantize, device="cpu", priority=-1, why_not=_interpreter_why_not)
    register("int8_mm", "triton-interpreter", _int8_mm, device="cpu", priority=-1, why_not=_interpreter_why_not)
