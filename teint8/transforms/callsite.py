"""Where a call comes from: the path of a weight through the modules on the Python stack, or a file and a line."""

import pathlib
import sys

import torch
from torch import Tensor, nn

from teint8 import _torch
from teint8.policy import Policy

_HERE = str(pathlib.Path(__file__).parent.parent)
_TORCH = str(pathlib.Path(torch.__file__).parent)
_MODULE = nn.Module.__call__.__code__.co_filename
_CALL = ("_wrapped_call_impl", "_call_impl")


def path_of(weight: Tensor) -> str:
    """The weight's path from the outermost module on the stack, as ``named_parameters`` of that module would give it.

    Falls back to the call site where no module on the stack owns the weight.
    """
    root = root_module()
    if root is not None:
        for name, parameter in root.named_parameters(remove_duplicate=False):
            if parameter is weight:
                return name
    return line_of_call()


def line_of_call() -> str:
    """``file.py:line`` of the nearest frame outside of teint8 and of torch."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH)):
            return f"{pathlib.Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def line_or_none(policy: Policy, op: str) -> str:
    """``line_of_call``; in compiled code "?", where there is no stack to read.

    Raises:
        RuntimeError: in compiled code, where a rule for the op has a path: it could not be obeyed.

    """
    if not _torch.is_compiling():
        return line_of_call()
    paths = [rule.path for rule in policy.rules if op in rule.ops]
    if paths and paths[0] != "*":
        raise RuntimeError(
            f"teint8: a rule for {op} has the path {paths[0]!r}, which names a line of code, and compiled code has none. Give the rule "
            "the path '*', or run this part in eager mode"
        )
    return "?"


def compiled_module() -> nn.Module | None:
    """The innermost module that torch.compile was given; the outermost that is running, where it was given a function."""
    modules = _running()
    for module in modules:
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return getattr(module, "_orig_mod", module)  # type: ignore[no-any-return]
    return modules[-1] if modules else None


def root_module() -> nn.Module | None:
    """The outermost module whose method is running."""
    modules = _running()
    found = modules[-1] if modules else None
    return getattr(found, "_orig_mod", found)  # what torch.compile wraps


def _running() -> list[nn.Module]:
    """The modules whose methods are running, the innermost first."""
    found: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        # only the frames of nn.Module.__call__: reading the locals of a user's frame would keep them alive as long as it runs
        if frame.f_code.co_name in _CALL and frame.f_code.co_filename == _MODULE:
            module = frame.f_locals.get("self")
            found += [module] if isinstance(module, nn.Module) else []
        frame = frame.f_back  # type: ignore[assignment]
    return found
