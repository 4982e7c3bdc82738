"""What a receipt says of the tiles with which an implementation of ``cuda.py`` runs a problem."""

from typing import Any

import torch

from teint8.ops.registry import Problem


def block_matmul(problem: Problem) -> str:
    """Of a matmul by blocks."""
    from teint8.kernels import block_mm

    c = block_mm.config_of(problem.m)
    return f"{c.block_m}x{c.block_n}x{problem.extra[0]}, {c.warps} warps, {c.stages} stages"


def matmul(problem: Problem) -> str:
    """Of the matmul for every chip."""
    from teint8.kernels import int8_mm

    device = torch.cuda.current_device() if problem.device == "cuda" else None
    return _tile(int8_mm.chosen(device, problem.batch, problem.m, problem.n, problem.k, True))


def hopper_matmul(problem: Problem) -> str:
    """Of Hopper's matmul."""
    from teint8.kernels import hopper

    tile = hopper.tile_of(problem.m, problem.n, problem.batch, hopper.programs(torch.cuda.current_device()))
    name = next(name for name, known in hopper.TILES.items() if known == tile)
    return f"{name} {64 * tile.consumers}x{tile.block_n}, ring of {tile.stages}"


def convolution(problem: Problem) -> str:
    """Of a convolution."""
    from teint8.kernels import conv
    from teint8.kernels.int8_mm import major_of

    major = major_of(torch.cuda.current_device() if problem.device == "cuda" else None)
    c = problem.extra[1]
    if problem.n == c == 1 and problem.batch > 1:
        return "depthwise"
    by_row = problem.batch == 1 and c < 16
    return _tile(conv.tile_of(problem.m, problem.n, problem.k, by_row, major)) + (", by rows of a window" if by_row else "")


def attention(problem: Problem) -> str:
    """Of attention."""
    from teint8.kernels import attention
    from teint8.kernels.int8_mm import major_of

    major = major_of(torch.cuda.current_device() if problem.device == "cuda" else None)
    c = attention.config_of(max(problem.k, *problem.extra), False, major)
    return f"{c.block_m}x{c.block_n}, {c.warps} warps, {c.stages} stages (without a mask)"


def _tile(c: Any) -> str:
    return f"{c.block_m}x{c.block_n}x{c.block_k}, {c.warps} warps, {c.stages} stages"
