"""Where a call comes from: the path of a weight through the modules on the Python stack, or a file and a line."""

import pathlib
import sys

import torch
from torch import Tensor, nn

_HERE = str(pathlib.Path(__file__).parent)
_TORCH = str(pathlib.Path(torch.__file__).parent)


def path_of(weight: Tensor) -> str:
    """The weight's path from the outermost module on the stack, as ``named_parameters`` of that module would give it.

    Falls back to the call site where no module on the stack owns the weight.
    """
    modules = _modules_on_stack()
    if modules:
        root = modules[0]
        for name, parameter in root.named_parameters(remove_duplicate=False):
            if parameter is weight:
                return name
    return line_of_call()


def line_of_call() -> str:
    """``file.py:line`` of the nearest frame outside of teint8's transforms and of torch."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH)):
            return f"{pathlib.Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def _modules_on_stack() -> list[nn.Module]:
    """Modules whose methods are running, the outermost first."""
    found: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(module, nn.Module) and (not found or found[-1] is not module):
            found.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    return found[::-1]
