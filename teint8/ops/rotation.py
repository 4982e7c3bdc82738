"""``hadamard``: blocks of channels times a Hadamard matrix, additions in a fixed order; linear, and its own adjoint."""

from typing import Any

import torch
from torch import Tensor

from teint8.ops.raw import front

_library = torch.library.Library("teint8", "FRAGMENT")
# an op of its own: Inductor would write each sum out to its leaves, block of them, and compile for minutes
_library.define("hadamard(Tensor x, int block) -> Tensor")


def _hadamard(x: Tensor, block: int) -> Tensor:
    y = x.detach().clone(memory_format=torch.contiguous_format)
    span = 1
    while span < block:
        pairs = y.view(*y.shape[:-1], y.shape[-1] // (2 * span), 2, span)
        a, b = pairs.unbind(-2)
        total = a + b
        torch.sub(a, b, out=b)
        a.copy_(total)
        span *= 2
    return y


_library.impl("hadamard", _hadamard, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::hadamard", lib=_library)  # type: ignore[untyped-decorator]
def _hadamard_fake(x: Tensor, block: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_vmap("teint8::hadamard", lib=_library)  # type: ignore[untyped-decorator]
def _hadamard_vmap(info: Any, in_dims: Any, x: Tensor, block: int) -> Any:
    return torch.ops.teint8.hadamard(front(x, in_dims[0], info.batch_size), block), 0


class _Hadamard(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, block: int) -> Tensor:
        y: Tensor = torch.ops.teint8.hadamard(x, block)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.block = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return hadamard(g, ctx.block), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        y: Tensor = hadamard(dx, ctx.block)
        return y


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as for the linear: Dynamo must not trace the Function
def hadamard(x: Tensor, block: int) -> Tensor:
    """x (..., K), each block of channels multiplied by a Hadamard matrix of +1 and -1 (Sylvester's); twice it is ``block`` times x.

    Sums go pairwise, in a fixed order: the same bits on every device and for every batch.

    Args:
        x: (..., K), any float dtype.
        block: a power of two that divides K.

    Examples:
        >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]), 4)
        tensor([10., -2., -4.,  0.])

    """
    y: Tensor = _Hadamard.apply(x, block)
    return y
