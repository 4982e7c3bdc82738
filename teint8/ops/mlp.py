"""MLPs in one call, forward and backward: what lies between two matmuls is quantized where it is made, and each tensor once."""

import math
from typing import Any

import torch
from torch import Tensor

from teint8.activations import KINDS
from teint8.ops.activate import activate
from teint8.ops.linear import differentiates, keeps, linear
from teint8.ops.mlp_function import Codes, How, Mlp, infer
from teint8.ops.raw import quantize
from teint8.ops.shared import Shared
from teint8.qtensor import QTensor


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as ops/linear.py says
def _mlp(x: Tensor, weights: tuple[Any, ...], biases: tuple[Tensor | None, ...], how: How) -> Tensor:
    y: Tensor = Mlp.apply(x, *weights, *biases, how)
    return y


def _run(x: Tensor, weights: tuple[Any, ...], biases: tuple[Tensor | None, ...], how: How) -> Tensor:
    _check(x, weights, biases, how)
    packed = any(isinstance(w, QTensor) for w in weights)
    wanted = differentiates(x, *biases, *(w for w in weights if isinstance(w, Tensor)))
    if wanted and (packed or keeps()):  # second derivatives, forward derivatives, vmap, frozen weights
        options: dict[str, Any] = {"gradient": how.gradient or None, "wgrad": how.wgrad, "impl": how.impl}
        g = linear(x, weights[0], biases[0], **options)
        u = None if weights[1] is None else linear(x, weights[1], biases[1], **options)
        return linear(activate(how.kind, g, u, impl=how.impl), weights[2], biases[2], **options)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if wanted:
        y = _mlp(flat, weights, biases, how)
    else:
        gate, up, down = (None if w is None else _rows(w, how.impl) for w in weights)
        y = infer(flat, gate, up, down, biases, how)  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rows(weight: Tensor | QTensor, impl: str) -> Codes:
    return weight.rows() if isinstance(weight, QTensor) else quantize(weight.detach(), impl=impl)


def _check(x: Tensor, weights: tuple[Any, ...], biases: tuple[Tensor | None, ...], how: How) -> None:
    gate, up, down = weights
    if how.gradient not in ("", "nearest", "stochastic"):
        raise ValueError(f"mlp: gradient is {how.gradient!r}; it must be None, 'nearest' or 'stochastic'")
    if how.wgrad not in ("int8", "float"):
        raise ValueError(f"mlp: wgrad is {how.wgrad!r}; it must be 'int8' or 'float'")
    for name, w, b in zip(("gate", "up", "down"), weights, biases, strict=True):
        _check_weight(x, name, w, b)
    fits = x.shape[-1:] == gate.shape[1:] and gate.shape[0] == down.shape[1] and (up is None or up.shape == gate.shape)
    if not x.is_floating_point() or not fits:
        shapes = ", ".join(str(tuple(w.shape)) for w in weights if w is not None)
        raise ValueError(
            f"mlp: x is {x.dtype} {tuple(x.shape)} and the weights are {shapes}; "
            "floats x (..., K), gate and up (N, K), down (K', N) are needed"
        )


def _check_weight(x: Tensor, name: str, w: Any, bias: Tensor | None) -> None:
    if bias is not None and (w is None or bias.shape != w.shape[:1]):
        raise ValueError(f"mlp: a bias has shape {tuple(bias.shape)}; its weight has {None if w is None else tuple(w.shape)}")
    if w is None:
        return
    if not isinstance(w, (Tensor, QTensor)) or w.ndim != 2:
        raise TypeError(f"mlp: {name} is {w!r:.80}; a weight of two dimensions is needed, or its QTensor")
    if w.dtype != x.dtype or w.device != x.device:
        raise TypeError(f"mlp: x is {x.dtype} on {x.device} but {name} is {w.dtype} on {w.device}; both must be alike")


def gated_mlp(
    x: Tensor,
    gate: Tensor | QTensor,
    up: Tensor | QTensor,
    down: Tensor | QTensor,
    *,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    kind: str = "silu",
    gradient: str | None = None,
    wgrad: str = "int8",
    impl: str = "",
) -> Tensor:
    """``linear(act(linear(x, gate)) * linear(x, up), down)`` in one call: SwiGLU for "silu", GeGLU for "gelu" (Shazeer, 2020).

    The same bits as ``linear``, ``activate``, ``linear``, forward and backward. The activation is quantized where it is made, x once
    for gate and up, and the backward keeps g and u in their dtype and everything else as INT8 codes.

    Args:
        x: (..., K), any float dtype.
        gate, up: (N, K), floats of that dtype or QTensors.
        down: (K', N), likewise.
        biases: of gate (N), up (N) and down (K'), or None.
        kind: "silu", "gelu" or "gelu_tanh".
        gradient: None for a float backward (QAT), "nearest" or "stochastic" for an INT8 one.
        wgrad: "int8" or "float" (SwitchBack) for the weights' gradients, where gradient is given.
        impl: name of an implementation, "" for the best.

    Returns:
        (..., K').

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes or devices that differ.

    Examples:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
        >>> gated_mlp(x, w, w, torch.ones(3, 4))[0]
        tensor([34.2927, 34.2927, 34.2927])

    """
    return _run(x, (gate, up, down), tuple(biases), How(_kind(kind), gradient or "", wgrad, impl))


def mlp(
    x: Tensor,
    up: Tensor | QTensor,
    down: Tensor | QTensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    kind: str = "gelu",
    gradient: str | None = None,
    wgrad: str = "int8",
    impl: str = "",
) -> Tensor:
    """``linear(act(linear(x, up, up_bias)), down, down_bias)`` in one call; see ``gated_mlp``.

    Args:
        x: (..., K).
        up: (N, K).
        down: (K', N).
        up_bias: (N) or None.
        down_bias: (K') or None.
        kind: "gelu" (erf), "gelu_tanh" or "silu".
        gradient, wgrad, impl: as for ``gated_mlp``.

    Returns:
        (..., K').

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes or devices that differ.

    Examples:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
        >>> mlp(x, w, torch.ones(3, 4))[0]
        tensor([11.9838, 11.9838, 11.9838])

    """
    return _run(x, (up, None, down), (up_bias, None, down_bias), How(_kind(kind), gradient or "", wgrad, impl))


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"mlp: kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    return kind


def merged_linear(
    x: Tensor, weights: Any, biases: Any = None, *, gradient: str | None = None, wgrad: str = "int8", impl: str = ""
) -> tuple[Tensor, ...]:
    """``linear(x, w, b)`` for several weights that share an input (q, k and v): x is quantized once, rows and columns.

    Args:
        x: (..., K).
        weights: a sequence of weights (N_i, K), floats or QTensors.
        biases: as many, each (N_i) or None; or None.
        gradient, wgrad, impl: as for ``gated_mlp``.

    Returns:
        A tuple of (..., N_i), with the bits of ``linear``.

    Raises:
        ValueError: not as many biases as weights, or shapes that do not fit.
        TypeError: dtypes or devices that differ.

    Examples:
        >>> q, k = merged_linear(torch.ones(2, 3), [torch.ones(4, 3), torch.ones(5, 3)])
        >>> q.shape, k.shape
        (torch.Size([2, 4]), torch.Size([2, 5]))

    """
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    if len(biases) != len(weights):
        raise ValueError(f"merged_linear: {len(weights)} weights but {len(biases)} biases; give one for each, or None")
    shared = Shared()
    return tuple(
        linear(x, w, b, gradient=gradient, wgrad=wgrad, impl=impl, shared=shared) for w, b in zip(weights, biases, strict=True)
    )
