"""Contractions that are a product by a weight, written otherwise: einsum, tensordot and inner."""

from typing import Any, NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """A product by a weight.

    Attributes:
        x: (..., K).
        axis: the dimension of the weight that is contracted, -1 or -2.
        order: how the dimensions of the result (..., N) are permuted, or None.

    """

    x: Tensor
    axis: int
    order: tuple[int, ...] | None


def einsum(equation: str, x: Tensor, w: Tensor, weight_first: bool) -> Product | str:
    """What ``torch.einsum`` of x and a weight of two dimensions comes to, or the reason why it is no product by it.

    Examples:
        >>> import torch
        >>> x, axis, order = einsum("bsd,de->bes", torch.ones(2, 3, 4), torch.ones(4, 5), False)
        >>> x.shape, axis, order
        (torch.Size([2, 3, 4]), -2, (0, 2, 1))

    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    first, comma, second = inputs.partition(",")
    letters, of_weight = (second, first) if weight_first else (first, second)
    if not comma or "," in second or "." in equation or len(of_weight) != 2 or w.ndim != 2 or len(letters) != x.ndim:
        return "einsum of an activation and a weight of two dimensions, without an ellipsis, is taken over"
    if not arrow:  # the letters that are there once, in order
        out = "".join(sorted(c for c in set(inputs) - {","} if inputs.count(c) == 1))
    contracted = [c for c in of_weight if c in letters and c not in out]
    kept = [c for c in of_weight if c not in letters and c in out]
    distinct = len(set(letters)) == len(letters) and len(set(out)) == len(out)
    if len(contracted) != 1 or len(kept) != 1 or not distinct or set(out) != (set(letters) | set(kept)) - set(contracted):
        return "einsum that contracts one dimension of a weight and keeps all others is taken over"
    made = letters.replace(contracted[0], "") + kept[0]
    order = tuple(made.index(c) for c in out)
    return Product(x.movedim(letters.index(contracted[0]), -1), of_weight.index(contracted[0]) - 2, order)


def tensordot(x: Tensor, w: Tensor, ours: list[int], theirs: list[int]) -> Product | str:
    """The same for ``torch.tensordot`` over these dimensions."""
    if w.ndim != 2 or x.ndim < 1 or len(ours) != 1 or len(theirs) != 1:
        return "tensordot over one dimension of a weight of two is taken over"
    return Product(x.movedim(ours[0], -1), theirs[0] % 2 - 2, None)


def inner(x: Tensor, w: Tensor) -> Product | str:
    """The same for ``torch.inner``."""
    return Product(x, -1, None) if w.ndim == 2 and x.ndim > 0 else "inner with a weight of two dimensions is taken over"


def dims_of(a: Tensor, dims: Any) -> tuple[list[int], list[int]]:
    """The dimensions of ``torch.tensordot``: the last of a and the first of b for a number, else as they are given."""
    dims = dims.tolist() if isinstance(dims, Tensor) else dims
    if isinstance(dims, int):
        return list(range(a.ndim - dims, a.ndim)), list(range(dims))
    ours, theirs = ([d] if isinstance(d, int) else list(d) for d in dims)
    return ours, theirs
