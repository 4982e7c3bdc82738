"""The raw op ``int8_mm_add_``: a matmul that is added to what another has left, as compiled training wants it.

Nothing but ``transforms/sums.py`` calls it, in graphs that were traced: it has no derivative and no vmap rule.
"""

import torch
from torch import Tensor

from teint8.ops import raw, registry
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define("int8_mm_add_(Tensor x_codes, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor(a!) total) -> ()")


def int8_mm_add_(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, total: Tensor) -> None:
    """``total += int8_mm(...)`` in place, the product rounded to the dtype of the total first; one kernel where one adds.

    Args:
        x_codes, w_codes: int8 (M, K) and (N, K).
        x_scale, w_scale: float32 (M,) and (N,).
        total: (M, N), any float dtype.

    Raises:
        ValueError: a total of another shape.

    Examples:
        >>> codes, scale = raw.quantize(torch.tensor([[1.0, 2.0]]))
        >>> total = torch.ones(1, 1)
        >>> int8_mm_add_(codes, scale, codes, scale, total)
        >>> total
        tensor([[6.0158]])

    """
    shape = (x_codes.shape[0], w_codes.shape[0])
    if total.shape != shape:
        raise ValueError(f"int8_mm_add_: the total has shape {tuple(total.shape)}, the product {shape}; they must be the same")
    y = raw.int8_mm_add(x_codes, x_scale, w_codes, w_scale, total, total.dtype)
    if y.data_ptr() != total.data_ptr():
        total.copy_(y)


def adds(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether the matmul that runs there adds to a total in its own kernel."""
    best = registry.best("int8_mm", Problem(device, dtype, 1, m, n, k))
    return best is not None and best.adds


_library.impl("int8_mm_add_", int8_mm_add_, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::int8_mm_add_", lib=_library)  # type: ignore[untyped-decorator]
def _int8_mm_add_fake(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, total: Tensor) -> None:
    return None
