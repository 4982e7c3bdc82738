"""Launching a Triton kernel again at little host cost: the compiled kernel is held, and the JIT's binder is left out.

A call through the JIT costs the host 40 to 100 us, most of it to find the kernel that is compiled already. What is held here is found
by a key that the caller makes: it must contain everything that the JIT specializes on (dtypes, integers, whether pointers and
strides are multiples of 16, constants, options). Seen on Triton 3.6; with another version each call goes through the JIT, which is
slower and never wrong. ``tests/test_kernels.py`` runs the Hopper tiles both ways.
"""

import contextlib
import inspect
from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

HOLDS = triton.__version__.split(".")[:2] == ["3", "6"]
"""Whether kernels are held: the launcher's arguments are an internal of Triton, and were looked at in these versions alone."""

_NUMBERS = frozenset((int, float))
_LIMIT = 4096  # keys held for one kernel: problems of a program are few, those of a stream of sentences are not


def on(device: torch.device) -> Any:
    """A context that makes a GPU current; nothing where it is."""
    return _NOTHING if device.type != "cuda" or device.index == torch.cuda.current_device() else torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


def alignment(*tensors: Tensor) -> bool | tuple[bool, ...]:
    """What the JIT specializes on of these addresses: which are multiples of 16. A part of a launch's key."""
    addresses = [t.data_ptr() for t in tensors]
    together = 0
    for address in addresses:
        together |= address
    return together % 16 == 0 or tuple(address % 16 == 0 for address in addresses)


class Descriptors:
    """TMA descriptors of a launch's first arguments, made once for each address and row stride that a tensor had.

    Args:
        metas: what the compiled kernel wants to know of each (swizzling, block), as Triton's own launcher reads it.

    """

    def __init__(self, metas: list[dict[str, Any]]) -> None:
        self.metas, self.made = metas, {}  # type: tuple[list[dict[str, Any]], dict[Hashable, list[Any]]]

    def arguments(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        """What the launcher takes for these matrices, whose last strides are 1, and whose shapes are those of the first launch."""
        out: list[Any] = []
        for i, x in enumerate(tensors):
            address = x.data_ptr()
            key = (i, address, x.stride(0))
            known = self.made.get(key)
            if known is None:
                shape, strides = x.shape, x.stride()
                if len(self.made) >= _LIMIT:
                    self.made.clear()
                meta = self.metas[i]
                host = _TMA_TYPES.get(meta["elem_type"], meta["elem_type"])
                fill = triton.runtime.driver.active.utils.fill_tma_descriptor
                made = fill(address, meta["swizzle"], meta["elem_size"], host, meta["block_size"], shape, strides, 0)
                known = self.made[key] = [made, *shape, *strides]
            out += known
        return out


_TMA_TYPES = {8: 10, 9: 8, 10: 9}  # the driver numbers these element types otherwise than the kernels do


class Launch:
    """One kernel and what is compiled of it.

    Args:
        kernel: a function of ``triton.jit`` or ``gluon.jit``, whose constants come after its other arguments.

    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.held: dict[Hashable, tuple[Any, ...]] = {}

    def known(self, key: Hashable) -> bool:
        """Whether ``again`` can run for this key."""
        return key in self.held

    def first(self, key: Hashable, grid: tuple[int, ...], args: tuple[Any, ...], constants: tuple[Any, ...], **options: Any) -> None:
        """Launch through the JIT, compile if need be, and hold what was compiled under ``key``."""
        compiled = self.kernel[grid](*args, *constants, **options)
        if not HOLDS or not hasattr(compiled, "packed_metadata"):
            return
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return
        if len(self.held) >= _LIMIT:
            self.held.clear()
        before = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata)
        launch, metas = launcher.launch, getattr(compiled.metadata, "tensordesc_meta", None)
        if metas:  # the launcher proper, inside of the one that makes descriptors anew for each launch
            launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        self.held[key] = (launch, (*before, None, None, None), Descriptors(metas) if metas else None, constants)

    def again(self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], described: tuple[Tensor, ...] = ()) -> None:
        """Launch what ``first`` held under ``key``, on the current stream of the first argument's device.

        Args:
            described: tensors that the kernel takes by TMA descriptors, before its other arguments.

        """
        launch, before, descriptors, constants = self.held[key]
        first = () if descriptors is None else descriptors.arguments(described)
        # an address is taken as it is, while the driver is asked about a tensor's
        addresses = [a if type(a) in _NUMBERS else a.data_ptr() for a in args]
        launch(*grid, current_stream(args[0].device.index), *before, *first, *addresses, *constants)

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], constants: tuple[Any, ...], **options: Any
    ) -> None:
        """Launch: held if it can be."""
        if key in self.held:
            self.again(key, grid, args)
        else:
            self.first(key, grid, args, constants, **options)


_streams: list[Any] = []  # Triton's own question for the current stream; asked for late, since it wants a driver


def current_stream(device: int) -> int:
    """The handle of the current stream of a GPU."""
    if not _streams:
        _streams.append(triton.runtime.driver.active.get_current_stream)
    stream: int = _streams[0](device)
    return stream
