"""Programmatic dependent launch (Hopper and newer): a kernel's programs begin as those of the kernel before it end.

Without it the card is drained between any two kernels of a stream: about a microsecond, which counts where a kernel takes ten. Each
kernel of ours waits first of all, before it reads or writes anything, until the kernel before it is done and what it wrote can be seen;
so nothing changes but when programs get their place on the card. (CUDA C++ Programming Guide, "Programmatic Dependent Launch".)
"""

import functools

import torch
import triton
import triton.language as tl

from teint8.kernels.activation import INTERPRETING


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Wait for the kernel before this one, and let the programs of the next one come as soon as there is place for them."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def dependent() -> bool:
    """Whether kernels on the current GPU are launched so."""
    return not INTERPRETING and _able(torch.cuda.current_device())


@functools.cache
def _able(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9
