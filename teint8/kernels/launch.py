"""Launching a Triton kernel again at little host cost: the compiled kernel is held, and the JIT's binder is left out.

A call through the JIT costs the host 40 to 100 us, most of it to find the kernel that is compiled already. What is held here is found
by a key that the caller makes: it must contain everything that the JIT specializes on (dtypes, integers, whether pointers and
strides are multiples of 16, constants, options). Seen on Triton 3.6; with another version each call goes through the JIT, which is
slower and never wrong. ``tests/test_launch.py`` compares both.
"""

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

HOLDS = triton.__version__.split(".")[:2] == ["3", "6"]
"""Whether kernels are held: the launcher's arguments are an internal of Triton, and were looked at in these versions alone."""

_LIMIT = 4096  # keys held for one kernel: problems of a program are few, those of a stream of sentences are not


def on(device: torch.device) -> Any:
    """A context that makes a GPU current; nothing where it is."""
    return _NOTHING if device.type != "cuda" or device.index == torch.cuda.current_device() else torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


class Descriptor:
    """What a launch reads of a TMA descriptor, and nothing else: making Triton's own takes longer than the launch."""

    __slots__ = ("base", "padding", "shape", "strides")

    def __init__(self, x: Tensor) -> None:
        self.base, self.shape, self.strides, self.padding = x, x.shape, x.stride(), "zero"


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
        self.held[key] = (launcher.launch, (*before, None, None, None), constants)

    def again(self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        """Launch what ``first`` held under ``key``, on the current stream of the current device."""
        launch, before, constants = self.held[key]
        # an address is taken as it is, while the driver is asked about a tensor's
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        launch(*grid, _current_stream(), *before, *addresses, *constants)

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], constants: tuple[Any, ...], **options: Any
    ) -> None:
        """Launch: held if it can be."""
        if key in self.held:
            self.again(key, grid, args)
        else:
            self.first(key, grid, args, constants, **options)


def _current_stream() -> int:
    stream: int = triton.runtime.driver.active.get_current_stream(torch.cuda.current_device())
    return stream
