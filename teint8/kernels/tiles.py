"""What kernels that go by tiles share: their sizes, and the order in which programs take them."""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Rows and columns of a tile, and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: in groups of GROUP rows of tiles, so that what they read is still in the L2 cache."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inner = tile % (GROUP * tiles_n)
    return first + inner % height, inner // height
