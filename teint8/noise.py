"""The noise of stochastic rounding: made from a seed and an element's place, the same on every device."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix32(h: Tensor) -> Tensor:
    """A bijective 32-bit integer hash on int64 tensors that hold values in [0, 2^32) (lowbias32, C. Wellons, 2018).

    Args:
        h: int64, any shape.

    Returns:
        int64 of that shape, in [0, 2^32).

    Examples:
        >>> mix32(torch.arange(3)).tolist()
        [0, 1753845952, 3507691905]

    """
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def noise(rows: int, columns: int, seed: Tensor) -> Tensor:
    """Counter-based noise for stochastic rounding, uniform in [1, 2) on a grid of 2^-23, float32 (rows, columns).

    An element depends on its seed, its row within the rows of that seed and its column alone, so that noise does not
    change with tiling and replays when a forward is run again. Rows and columns have odd keys, whose product modulo 2^32 makes
    the element (multiplicative hashing: Dietzfelbinger et al., 1997). ``seed ^ 1`` gives the transpose, so that a tensor that is
    quantized by row and by column takes one noise for both: seeds 2 i and 2 i + 1 are partners, and independent draws take others.
    ``tests/test_contract.py`` holds the correlations down.

    Args:
        rows, columns: the shape.
        seed: int64 (S,), with rows a multiple of S.

    Returns:
        float32 (rows, columns).

    Examples:
        >>> seed = torch.tensor([5])
        >>> bool((noise(3, 4, seed) == noise(4, 3, seed ^ 1).mT).all())
        True

    """
    groups = max(seed.numel(), 1)
    of_rows = _key(seed.reshape(-1, 1), torch.arange(max(rows // groups, 1), device=seed.device))
    of_columns = _key(seed.reshape(-1, 1) ^ 1, torch.arange(columns, device=seed.device))
    h = (of_rows.unsqueeze(-1) * of_columns.unsqueeze(-2)) & _MASK
    return (1.0 + (h >> 9).float() * 2.0**-23).reshape(h.shape[0] * h.shape[1], columns)[:rows]


def _key(seed: Tensor, index: Tensor) -> Tensor:
    base = mix32(mix32(seed & _MASK) ^ ((seed >> 32) & _MASK))
    h = ((base + index) * 0x9E3779B1) & _MASK
    return (h ^ (h >> 15)) | 1
