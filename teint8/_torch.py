"""Every private torch API that teint8 leans on, each with the versions it was seen on (2.11, 2.13) and a test."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch import eager_transforms
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


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


def replay_in_checkpoint(route: Any) -> None:
    """Make a checkpoint that is being recorded recompute under ``route``, also after its context has ended.

    torch.utils.checkpoint restores torch.autocast and the random state when it recomputes, but no other mode. What it will
    call again is found where each variant keeps it: without reentry, in the frame of the innermost saved-tensors hook; with
    reentry, in the autograd context of the running ``CheckpointFunction.forward``. Where neither is found nothing is done,
    and torch raises a CheckpointError for the tensors that then differ.
    """
    recording = torch.is_grad_enabled()
    if not (recording or route.replays_reentrant) or torch.compiler.is_compiling() or in_transform():
        return
    if recording:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        cells = getattr(hooks[0], "__closure__", None) if hooks else None
        for cell in cells or ():
            _replay(cell.cell_contents, "recompute_fn", route)
    else:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is torch.utils.checkpoint.CheckpointFunction.forward.__code__:
                _replay(frame.f_locals["ctx"], "run_function", route)
            frame = frame.f_back  # type: ignore[assignment]


def _replay(holder: Any, name: str, route: Any) -> None:
    function: Callable[..., Any] | None = getattr(holder, name, None)
    if function is not None and not hasattr(function, "teint8_replays"):
        replay = route.replaying(function)
        replay.teint8_replays = True
        setattr(holder, name, replay)


def to_fake(tree: Any) -> Any:
    """The tree with every tensor fake, all of one FakeTensorMode: shapes, dtypes and devices, no data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return torch_pytree.tree_map_only(Tensor, mode.from_tensor, tree)


def fake_mode_of(*trees: Any) -> Any:
    """The FakeTensorMode of a tree that ``to_fake`` made."""
    fakes = [leaf for leaf in torch_pytree.tree_leaves(trees) if isinstance(leaf, FakeTensor)]
    return fakes[0].fake_mode


def marks_differentiable() -> bool:
    """Whether the pytree being flattened is what torch.func.grad, vjp or jacrev is about to differentiate by.

    They go over that tree, and no other, with ``tree_map_``; torch's own error for INT8 leaves names neither them nor a fix.
    """
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    for _ in range(8):
        caller = frame.f_back
        if caller is None:
            return False
        if frame.f_code is torch_pytree.tree_map_.__code__:
            return caller.f_code.co_filename == eager_transforms.__file__
        frame = caller
    return False


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors, views and handles share the memory of a storage; 1 where this handle is all that is left."""
    return int(torch._C._storage_Use_Count(storage._cdata))
