"""Torch's fused encoder layers are off while a route is entered, so that their matmuls are calls of their own.

In eager mode a TorchFunctionMode turns them off by itself. Dynamo does not ask for modes there, and would put one float call into
the graph in inference.
"""

import threading
import weakref
from typing import Any

import torch

from teint8 import _compilers

_lock = threading.Lock()
_before: list[bool] = []  # for each route that is entered, in any thread: what the switch was before the first
_traced: list[Any] = []  # of routes that are entered in code that is being traced: what undoes it


def enter() -> None:
    """A route is entered in eager mode."""
    with _lock:
        _before.append(_before[0] if _before else torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)


def leave() -> None:
    """It is left."""
    with _lock:
        before = _before.pop()
        torch.backends.mha.set_fastpath_enabled(before and not _before)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def enter_traced() -> bool:
    """A route is entered in code that Dynamo traces: it runs this once, while it traces, and a trace may be given up in between."""
    enter()
    _compilers.let_modes_see(torch._grouped_mm)
    _traced.append(weakref.finalize(_compilers.tracing_context(), leave))
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def leave_traced() -> bool:
    """It is left."""
    if _traced:
        _traced.pop()()
    return True
