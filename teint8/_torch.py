"""Every private torch API that teint8 leans on, each with the versions it was seen on (2.11, 2.13) and a test."""

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch import eager_transforms
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_transform() -> bool:
    """Whether any torch.func transform (grad, vmap, jvp, functionalize) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def needs_math_attention(device: str) -> bool:
    """Whether a transform is running that torch's fused attention has no rule for: jvp, two derivatives, on the CPU vmap."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = [level.key() for level in stack]
    transform = torch._C._functorch.TransformType
    if device == "cpu" and transform.Vmap in kinds:
        return True
    return transform.Jvp in kinds or kinds.count(transform.Grad) > 1 or forward_ad_level() >= 0


def forward_ad_level() -> int:
    """Level of torch.autograd.forward_ad outside of torch.func; -1 when none is entered."""
    return torch.autograd.forward_ad._current_level


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a real, strided tensor: no subclass (fake, functional, DTensor), torch.func wrapper or lazy sign."""
    if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.layout is torch.strided and not x.is_neg()


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether no transform and no TorchDispatchMode is active and each tensor is plain; quicker than to ask ``is_plain`` of each."""
    if torch._C._len_torch_dispatch_stack() != 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for t in tensors:  # noqa: SIM110  # a generator would take twice the time
        if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided or t.is_neg()):
            return False
    return True


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def unwrapped(x: Tensor) -> Tensor:
    """What torch.func's transforms wrap in ``x``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


class _Dispatched(threading.local):
    """By thread, whether an op of ours is being run by the dispatcher."""

    active = False


dispatched = _Dispatched()


@contextlib.contextmanager
def by_dispatcher() -> Iterator[None]:
    """What runs an op of ours that the dispatcher called: from compiled code perhaps, whose memory may be that of a CUDA graph."""
    before, dispatched.active = dispatched.active, True
    try:
        yield
    finally:
        dispatched.active = before


def is_capturing(t: Tensor) -> bool:
    """Whether what is done with this tensor now becomes part of a CUDA graph."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The handle of the current stream of a GPU, 0 for other devices. Seen on torch 2.11 and 2.13."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))


def no_dispatch_modes() -> bool:
    """Whether no TorchDispatchMode is active, so that a raw op may be called past the dispatcher."""
    return torch._C._len_torch_dispatch_stack() == 0


def storage_ref(x: Tensor) -> Any:
    """A weak reference to the storage of ``x``: it tells a replaced storage from one that got the same address."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(x.untyped_storage())


def replay_in_checkpoints(route: Any, entered: int) -> None:
    """Make the checkpoints that are being recorded recompute under ``route``, also after its context has ended.

    torch.utils.checkpoint restores torch.autocast and the random state when it recomputes, but no other mode. The checkpoints are
    found on the Python stack, where each variant keeps what it will call again: with reentry the autograd context of
    ``CheckpointFunction.forward``, without it the object that the generator of ``checkpoint`` holds. Only those inside of the
    frame that entered the route count: others enter it again themselves.

    Args:
        entered: id of the frame that entered the route.

    """
    if is_compiling() or in_transform():
        return
    frame = sys._getframe(1)
    while frame is not None and id(frame) != entered:
        if frame.f_code is _REENTRANT:
            _replay(frame.f_locals["ctx"], "run_function", route)
        elif frame.f_code is _NON_REENTRANT and "gen" in frame.f_locals:
            generator = frame.f_locals["gen"].gi_frame
            if generator is not None:
                _replay(generator.f_locals.get("new_frame"), "recompute_fn", route)
        frame = frame.f_back  # type: ignore[assignment]


_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__
_NON_REENTRANT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__


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


@contextlib.contextmanager
def abstract_run(name: str, *trees: Any) -> Iterator[None]:
    """A run on trees that ``to_fake`` made, without gradients.

    Raises:
        ValueError: the program reads a value.

    """
    try:
        with fake_mode_of(*trees), torch.no_grad():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        hint = "; without inputs it goes by the types of a module's layers" if name == "pack" else ""
        raise ValueError(
            f"{name}: the program reads values of tensors ({error.func}: .item(), a boolean mask, the lengths of a PackedSequence), "
            f"and an abstract run has shapes alone; give inputs for which it reads none, such as padded sequences{hint}"
        ) from error


def marks_differentiable() -> bool:
    """Whether the pytree being flattened is what torch.func.grad, vjp or jacrev is about to differentiate by.

    They go over that tree, and no other, with ``tree_map_``; torch's own error for INT8 leaves names neither them nor a fix.
    """
    if is_compiling():
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


def members(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """Parameters, and buffers (True), by path, also those that are tied: in one walk of dicts, a tenth of the time of torch's own."""
    for held, is_buffer in ((module._parameters, False), (module._buffers, True)):
        for name, tensor in held.items():
            if tensor is not None:
                yield prefix + name, tensor, is_buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from members(child, f"{prefix}{name}.")


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and views share the memory of a storage, and one for its handle in Python."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def is_compiling() -> bool:
    """Whether this thread traces for a compiler. torch.compiler's flag is one for all threads, as long as any of them compiles."""
    if not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def number(size: Any) -> int:
    """A size as a number, where it is symbolic the one that it was traced with; nothing is guarded.

    A size that depends on data (``x[mask]``) was traced with none: it counts as ``UNKNOWN``.
    """
    if type(size) is int:
        return size
    hint = size.node.hint
    return UNKNOWN if hint is None else int(hint)


UNKNOWN = 4096
"""What a size that depends on data is taken for, where an implementation is chosen for it."""


class Writes(TorchDispatchMode):
    """Notes the memory that calls write to; what takes functions or kernels may write to all that it is given."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None or schema.is_mutable:
            written = [*args, *kwargs.values()]
            if schema is not None:
                named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
                written = [named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            self.storages |= {memory_of(t) for t in torch_pytree.tree_leaves(written) if isinstance(t, Tensor)}
        return func(*args, **kwargs)


def memory_of(t: Tensor) -> int:
    """What tells the memory of one tensor, also of one without data, from that of another, while both live."""
    return int(t.untyped_storage()._cdata) if t.layout is torch.strided else id(t)
