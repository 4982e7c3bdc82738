"""The raw op ``linears``: float rows that are quantized once, by one or more weights, as compiled inference on a CPU wants them.

Nothing but ``transforms/merged.py`` calls it, in graphs that were traced: it has no derivative and no vmap rule.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teint8.ops import cpu, registry
from teint8.ops.raw import int8_mm, quantize
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define("linears(Tensor x, Tensor[] w_codes, Tensor[] w_scales, Tensor?[] biases, str activation) -> Tensor[]")

FORMS = {"": "", "gelu": "none", "gelu_tanh": "tanh"}
"""What ``activation`` may be, and which of torch's forms of GELU that is."""


def linears(
    x: Tensor, w_codes: Sequence[Tensor], w_scales: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str = ""
) -> list[Tensor]:
    """``quantize`` of x and its ``int8_mm`` by each weight, with the same bits: one call of the kernel in C, where there is one.

    Args:
        x: (M, K), any float dtype, which is that of the results.
        w_codes: int8 (N, K) of each weight.
        w_scales: float32 (N,) of each.
        biases: (N,) or None of each.
        activation: "gelu" or "gelu_tanh" to take torch's gelu(x) for x, exact or in its tanh form.

    Returns:
        (M, N) for each weight.

    Raises:
        ValueError: shapes that do not fit, or another activation.

    Examples:
        >>> codes, scale = quantize(torch.tensor([[1.0, 2.0]]))
        >>> linears(torch.tensor([[1.0, 2.0]]), [codes], [scale], [None])
        [tensor([[5.0158]])]

    """
    _check(x, w_codes, w_scales, biases)
    if activation not in FORMS:
        raise ValueError(f"linears: activation is {activation!r}; one of {list(FORMS)} is needed")
    if activation and x.numel() > 0:
        memory = cpu.results(x.shape[0], x.shape[1], x.dtype)  # fresh memory would take as long as the activation
        x = torch.ops.aten.gelu.out(x.detach(), approximate=FORMS[activation], out=memory)
    weights = list(zip(w_codes, w_scales, biases, strict=True))
    (m, k), sizes = x.shape, [w.shape[0] for w in w_codes]
    if 0 not in (m, k, *sizes):
        device = x.device.type
        chosen = {registry.best("linear", Problem(device, x.dtype, 1, m, n, k)) for n in sizes}
        implementation = chosen.pop()
        if implementation is not None and implementation.many is not None and not chosen:
            return implementation.many(x, weights, x.dtype)  # type: ignore[no-any-return]
    codes, scale = quantize(x)
    return [int8_mm(codes, scale, w, s, b, x.dtype) for w, s, b in weights]


def _check(x: Tensor, w_codes: Sequence[Tensor], w_scales: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """Raise for shapes that do not fit: the kernel in C would read past what it is given."""
    if x.ndim != 2 or any(w.ndim != 2 or w.shape[1] != x.shape[1] for w in w_codes):
        shapes = [tuple(w.shape) for w in w_codes]
        raise ValueError(f"linears: x has shape {tuple(x.shape)} but the weights {shapes}; x (M, K) needs weights (N, K)")
    for w, *rest in zip(w_codes, w_scales, biases, strict=True):
        wrong = [tuple(t.shape) for t in rest if t is not None and t.shape != w.shape[:1]]
        if wrong:
            raise ValueError(
                f"linears: a weight has shape {tuple(w.shape)} but its scale or bias {wrong[0]}; {tuple(w.shape[:1])} is needed"
            )


_library.impl("linears", linears, "CompositeExplicitAutograd")


@torch.library.register_fake("teint8::linears", lib=_library)  # type: ignore[untyped-decorator]
def _linears_fake(x: Tensor, w_codes: Any, w_scales: Any, biases: Any, activation: str) -> list[Tensor]:
    _check(x, w_codes, w_scales, biases)
    return [x.new_empty(x.shape[0], w.shape[0]) for w in w_codes]
