"""``hadamard``: blocks of channels times a Hadamard matrix, additions in a fixed order; linear, and its own adjoint."""

from typing import Any

import torch
from torch import Tensor

from teint8.ops import registry
from teint8.ops.raw import front, quantize
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
# an op of its own: Inductor would write each sum out to its leaves, block of them, and compile for minutes
_library.define("hadamard(Tensor x, int block) -> Tensor")


def _hadamard(x: Tensor, block: int) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16) or x.numel() == 0 or block == 1:
        return _butterflies(x, block)
    rows = x.detach().reshape(-1, x.shape[-1])
    out: list[Tensor] = registry.select("rotate", _problem(rows, block)).run(rows, None, block, False, None)
    return out[0].view(x.shape)


def _butterflies(x: Tensor, block: int) -> Tensor:
    """Sums and differences of neighbours, of neighbouring pairs, and so on, in the dtype of x."""
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


def _problem(x: Tensor, block: int) -> Problem:
    return Problem(x.device.type, x.dtype, 1, x.shape[0], 0, x.shape[1], (block,))


def divided(x: Tensor, smoothing: Tensor) -> Tensor:
    """x (..., K) by powers of two (K,): in its dtype, but halves in float32, which hold what a half would round."""
    x = x.float() if x.dtype == torch.float16 else x
    return x * smoothing.detach().reciprocal().to(x.dtype)


def conditioned_codes(x: Tensor, smoothing: Tensor | None, block: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of x (..., K) divided by ``smoothing`` and rotated, in one kernel where there is one; no gradient flows.

    The bits of ``quantize`` of what was divided and rotated before. For real tensors only: nothing that is traced or transformed.

    Args:
        x: any float dtype, not empty.
        smoothing: float32 powers of two (K,), or None.
        block: as for ``hadamard``; 0 for no rotation.
        scale: float32, one number, for static quantization.

    Returns:
        int8 codes (..., K) and float32 scales (...).

    Examples:
        >>> codes, scale = conditioned_codes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None, 4)
        >>> codes.tolist(), scale * 127
        ([[127, -25, -51, 0]], tensor([10.]))

    """
    rows = x.detach().reshape(-1, x.shape[-1])
    run = registry.select("rotate", _problem(rows, block)).run
    powers, given = None if smoothing is None else smoothing.detach(), None if scale is None else scale.detach().expand(len(rows))
    codes, scales = run(rows, powers, block, True, given)
    return codes.view(x.shape), scales.view(x.shape[:-1])


def _by(quantize: Any) -> Any:
    """The op ``rotate`` in plain torch, its codes by ``quantize``."""

    def run(x: Tensor, smoothing: Tensor | None, block: int, codes: bool, scale: Tensor | None) -> list[Tensor]:
        y = x if smoothing is None else divided(x, smoothing)
        y = _butterflies(y if y.dtype == torch.float64 else y.float(), block) if block else y
        return list(quantize(y, scale)) if codes else [y]

    return run


registry.register("rotate", "reference", _by(lambda y, scale: quantize(y, scale=scale, impl="reference")))
registry.register("rotate", "composed", _by(lambda y, scale: quantize(y, scale=scale)), priority=5)
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
