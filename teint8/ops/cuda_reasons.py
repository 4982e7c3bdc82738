"""Why an implementation of ``cuda.py`` cannot run a problem, or None where it can."""

import functools
import importlib.util
import os

import torch

from teint8.numerics import MAX_INT32_K
from teint8.ops.registry import Problem

FEW_ROWS = 4
"""Up to this many rows a matmul is bound by reading its weight."""
_WIDEST_NORM = 16384
_WIDEST_ROW = 16384
_WIDEST_GROUP = 4096
_WIDEST_HEAD = 256
_MOST_TILES = 65535  # of the second and third dimension of a grid


def attention_why_not(problem: Problem) -> str | None:
    """Attention: heads that registers hold."""
    widest = max(problem.k, *problem.extra)
    if widest > _WIDEST_HEAD:
        return f"a head is {widest} wide; up to {_WIDEST_HEAD} are held in registers"
    return kernel_why_not(problem)


def conv_why_not(problem: Problem) -> str | None:
    """A convolution: sums of int32."""
    if problem.k > MAX_INT32_K:
        return f"K is {problem.k}; its int32 sums hold K up to {MAX_INT32_K}"
    return kernel_why_not(problem)


def norm_why_not(problem: Problem) -> str | None:
    """A norm: rows that registers hold."""
    reason = kernel_why_not(problem)
    return reason or (f"K is {problem.k}; a row of up to {_WIDEST_NORM} is held in registers" if problem.k > _WIDEST_NORM else None)


def channel_norm_why_not(problem: Problem) -> str | None:
    """A norm of channels: a program has those of a group."""
    reason = kernel_why_not(problem)
    width = problem.k // problem.extra[0] if problem.extra else 1
    if reason is None and width > _WIDEST_GROUP:
        reason = f"a group has {width} channels; a program holds up to {_WIDEST_GROUP}"
    if reason is None and max(problem.m, problem.k) > _MOST_TILES:
        reason = f"there are {problem.m} samples of {problem.k} channels; a grid holds {_MOST_TILES}"
    return reason


def rotate_why_not(problem: Problem) -> str | None:
    """Rotation with its codes: rows that registers hold, in float32."""
    if problem.dtype == torch.float64:
        return "x is float64, and is rotated as that"
    if problem.k > _WIDEST_ROW:
        return f"K is {problem.k}; a row of up to {_WIDEST_ROW} is held in registers"
    return kernel_why_not(problem)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not_triton() -> str | None:
    """The reason why Triton cannot run on this GPU, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return "TRITON_INTERPRET=1 makes Triton run on the CPU" if _interpreting() else None


def kernel_why_not(problem: Problem) -> str | None:
    """Triton on GPUs, its interpreter on the CPU."""
    if problem.device == "cuda":
        return why_not_triton()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None if _interpreting() else "TRITON_INTERPRET=1 is not set"


def hopper_why_not(problem: Problem) -> str | None:
    """The Gluon matmul."""
    reason = why_not_triton()
    if reason is not None:
        return reason
    from teint8.kernels import hopper

    reason = hopper.why_not(problem.device, problem.k)
    if reason is None and problem.n <= 64 and problem.k <= 256 and problem.m > 64:
        return f"K is {problem.k} and N {problem.n}: that is bound by writing the result, which the other kernel does faster"
    return reason


def hopper_mlp_why_not(problem: Problem) -> str | None:
    """An MLP of few rows by the Gluon matmul."""
    return f"M is {problem.m}; it is for up to 64 rows" if problem.m > 64 else mlp_why_not(problem) or hopper_why_not(problem)


def few_mlp_why_not(problem: Problem) -> str | None:
    """An MLP by products of a vector."""
    return mlp_why_not(problem) or fewest_why_not(problem)


def mlp_why_not(problem: Problem) -> str | None:
    """An MLP's features in between, which are contracted too."""
    if not 0 < problem.n <= MAX_INT32_K:
        return f"N is {problem.n}; its int32 sums hold 1 to {MAX_INT32_K} features in between"
    return None


def both_why_not(problem: Problem) -> str | None:
    """Beyond what a grid holds, each orientation is quantized on its own."""
    if problem.m > 32 * _MOST_TILES or problem.batch > _MOST_TILES:
        return f"M is {problem.m}, in a batch of {problem.batch}; a grid holds {32 * _MOST_TILES} rows, and a batch of {_MOST_TILES}"
    return kernel_why_not(problem)


def few_mm_why_not(problem: Problem) -> str | None:
    """A matmul of codes by products of a vector."""
    if problem.batch != 1 or problem.k % 4:
        return "one matmul and K a multiple of 4 are needed"
    return fewest_why_not(problem)


def fewest_why_not(problem: Problem) -> str | None:
    """Products of a vector, where they are the fastest."""
    if problem.m > 2 and hopper_why_not(problem) is None:
        return f"M is {problem.m}; tensor cores are faster for more than 2 rows"
    return few_why_not(problem)


def few_why_not(problem: Problem) -> str | None:
    """Products of a vector."""
    reason = why_not_triton()
    if reason is None and problem.m > FEW_ROWS:
        reason = f"M is {problem.m}; it is for up to {FEW_ROWS} rows"
    if reason is None and problem.k > MAX_INT32_K:
        reason = f"K is {problem.k}; its int32 sums hold K up to {MAX_INT32_K}"
    return reason


def cublas_why_not(problem: Problem) -> str | None:
    """``torch._int_mm``."""
    if torch.version.cuda is None:
        return "torch._int_mm runs cuBLAS on CUDA devices alone"
    if problem.batch != 1 or problem.m <= 16 or problem.k % 8 or problem.n % 8 or problem.k > MAX_INT32_K:
        return "torch._int_mm needs one matmul, M above 16, K and N multiples of 8"
    return None


def measured_why_not(problem: Problem) -> str | None:
    """cuBLAS goes before every kernel of ours where it was measured to be faster on this machine."""
    reason = cublas_why_not(problem) or why_not_triton()
    if reason is not None:
        return reason
    from teint8.kernels import tuned

    wins = tuned.found(tuned.CUBLAS, torch.cuda.current_device(), problem.m, problem.n, problem.k) is not None
    return None if wins else "it was not measured to be the fastest here: python -m teint8 tune M,N,K"
