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


def cdiv(a: int, b: int) -> int:
    """How many times b covers a. Triton's own may be called in kernels, too, and takes the host longer than some launches.

    Examples:
        >>> cdiv(5, 4), cdiv(8, 4)
        (2, 2)

    """
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n, at least 1.

    Examples:
        >>> power_of_two(1), power_of_two(5), power_of_two(8)
        (1, 8, 8)

    """
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: in groups of GROUP rows of tiles, so that what they read is still in the L2 cache."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inner = tile % (GROUP * tiles_n)
    return first + inner % height, inner // height
