"""The raw op ``int8_mm_add_``: a matmul that is added to what another has left, as compiled training wants it.

Nothing but ``transforms/sums.py`` calls it, in graphs that were traced: it has no derivative and no vmap rule.
"""

import torch
from torch import Tensor

from teint8.ops import raw, registry
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define("int8_mm_add_(Tensor x_codes, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor(a!) total) -> ()")
_FEW = 128


def int8_mm_add_(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, total: Tensor) -> None:
    """``total += int8_mm(...)`` in place, the product rounded to the dtype of the total first; one kernel where one adds.

    Args:
        x_codes, w_codes: int8 (M, K) and (N, K).
        x_scale, w_scale: float32 (M,) and (N,).
        total: (M, N), any float dtype.

    Raises:
        TypeError: a total that is not of floats.
        ValueError: shapes that do not fit.

    Examples:
        >>> codes, scale = raw.quantize(torch.tensor([[1.0, 2.0]]))
        >>> total = torch.ones(1, 1)
        >>> int8_mm_add_(codes, scale, codes, scale, total)
        >>> total
        tensor([[6.0158]])

    """
    _check(x_codes, x_scale, w_codes, w_scale, total)
    y = raw.int8_mm_add(x_codes, x_scale, w_codes, w_scale, total, total.dtype)
    if y.data_ptr() != total.data_ptr():
        total.copy_(y)


def _check(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, total: Tensor) -> None:
    """Raise for what does not fit: a kernel would read past what it is given."""
    if not total.is_floating_point():
        raise TypeError(f"int8_mm_add_: the total is {total.dtype}; a float tensor is needed")
    shapes = [tuple(t.shape) for t in (x_codes, x_scale, w_codes, w_scale, total)]
    if x_codes.ndim != 2 or w_codes.ndim != 2 or x_codes.shape[1] != w_codes.shape[1]:
        raise ValueError(f"int8_mm_add_: codes have shapes {shapes[0]} and {shapes[2]}; (M, K) and (N, K) are needed")
    m, n = x_codes.shape[0], w_codes.shape[0]
    if shapes[1] != (m,) or shapes[3] != (n,) or shapes[4] != (m, n):
        raise ValueError(
            f"int8_mm_add_: scales have shapes {shapes[1]} and {shapes[3]}, the total has {shapes[4]}; "
            f"{(m,)}, {(n,)} and {(m, n)} are needed"
        )


def adds(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether it is worth while: whether the matmul that runs there adds to a total in its own kernel.

    Of few rows it divides K among programs, which saves more, and does not where it adds.
    """
    best = registry.best("int8_mm", Problem(device, dtype, 1, m, n, k))
    return m > _FEW and best is not None and best.adds


_library.impl("int8_mm_add_", int8_mm_add_, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::int8_mm_add_", lib=_library)  # type: ignore[untyped-decorator]
def _int8_mm_add_fake(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, total: Tensor) -> None:
    _check(x_codes, x_scale, w_codes, w_scale, total)
