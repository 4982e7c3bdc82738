"""Measure the tiles of matmuls on this GPU, and keep the fastest."""

import warnings

import torch

from teint8.ops import registry
from teint8.ops.cuda import cublas
from teint8.ops.cuda_reasons import cublas_why_not, why_not_triton
from teint8.ops.registry import Problem


def tune(sizes: list[tuple[int, int, int]]) -> str:
    """Measure the tiles of matmuls (M, N, K) on this GPU, print their times, keep the fastest; returns the path of the file.

    Raises:
        RuntimeError: there is no GPU, or no Triton.

    """
    reason = "there is no GPU" if not torch.cuda.is_available() else why_not_triton()
    if reason is not None:
        raise RuntimeError(f"tune: {reason}; there is nothing to measure")
    from teint8.kernels import tuned

    for m, n, k in sizes:
        problem = Problem("cuda", torch.bfloat16, 1, m, n, k)
        tuned.tune(m, n, k, None if cublas_why_not(problem) else cublas)
    registry.choose_anew()
    return str(tuned.path(torch.cuda.current_device()))


def tune_new(sizes: list[tuple[int, int, int]], device: torch.device) -> None:
    """Measure the tiles of those matmuls that were not measured on this GPU before, silently; nothing where no Triton runs.

    Warns where one cannot be measured (there is no memory left, say): the tiles of the table serve then.
    """
    if why_not_triton() is not None:
        return
    from teint8.kernels import tuned

    with torch.cuda.device(device):
        new = [size for size in sizes if tuned.found("triton", torch.cuda.current_device(), *size) is None]
        for m, n, k in new:
            problem = Problem("cuda", torch.bfloat16, 1, m, n, k)
            try:
                tuned.tune(m, n, k, None if cublas_why_not(problem) else cublas, report=lambda line: None)
            except RuntimeError as error:
                warnings.warn(f"teint8: the tiles of a matmul M, N, K = {m}, {n}, {k} were not measured: {error}", stacklevel=2)
    if new:
        registry.choose_anew()
