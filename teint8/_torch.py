"""Every private torch API that teint8 leans on, each with the versions it was seen on (2.11, 2.13) and a test."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_transform() -> bool:
    """Whether any torch.func transform (grad, vmap, jvp, functionalize) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def needs_math_attention() -> bool:
    """Whether a transform is running that torch's fused attention has no rule for: jvp, or two derivatives."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = [level.key() for level in stack]
    transform = torch._C._functorch.TransformType
    return transform.Jvp in kinds or kinds.count(transform.Grad) > 1 or forward_ad_level() >= 0


def forward_ad_level() -> int:
    """Level of torch.autograd.forward_ad outside of torch.func; -1 when none is entered."""
    return torch.autograd.forward_ad._current_level


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a real, unwrapped tensor: no subclass (fake, functional, DTensor), no torch.func wrapper."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def no_dispatch_modes() -> bool:
    """Whether no TorchDispatchMode is active, so that a raw op may be called past the dispatcher."""
    return torch._C._len_torch_dispatch_stack() == 0


def storage_ref(x: Tensor) -> Any:
    """A weak reference to the storage of ``x``: it tells a replaced storage from one that got the same address."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(x.untyped_storage())
