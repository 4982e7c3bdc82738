"""MLPs in one call, forward and backward: what lies between two matmuls is quantized where it is made, and each tensor once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8.activations import KINDS
from teint8.ops import registry
from teint8.ops.activate import activate
from teint8.ops.linear import differentiates, keeps, linear, weight_codes_of
from teint8.ops.raw import dequantize, direct, int8_mm, int8_mm_add, quantize
from teint8.ops.raw_both import activation, quantize_both
from teint8.ops.registry import Problem
from teint8.ops.shared import Shared
from teint8.ops.straight import no_second_derivative
from teint8.qtensor import QTensor


class _How(NamedTuple):
    """What is not a tensor. ``gradient``: "", "nearest" or "stochastic"; ``wgrad``: "int8" or "float"."""

    kind: str
    gradient: str
    wgrad: str
    impl: str

    @property
    def columns(self) -> bool:
        """Whether dW is in INT8, so that activations are quantized along the tokens too."""
        return bool(self.gradient) and self.wgrad == "int8"


class _Mlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)), or down(act(gate(x))) without an up; x (M, K), weights (N, K), (N, K), (K', N).

    The same kernels in the same order as ``linear``, ``activate`` and ``linear``, without what those write down in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wg: Tensor,
        wu: Tensor | None,
        wd: Tensor,
        bg: Tensor | None,
        bu: Tensor | None,
        bd: Tensor | None,
        how: _How,
    ) -> Tensor:
        columns, impl = how.columns, how.impl
        x_codes: Any = quantize_both(x, impl=impl) if columns else quantize(x, impl=impl)
        gate: Any
        up: Any
        down: Any
        gate, up, down = (None if w is None else weight_codes_of(w, "row", bool(how.gradient), impl) for w in (wg, wu, wd))
        g = int8_mm(x_codes[0], x_codes[1], gate[0], gate[1], bg, x.dtype, impl)
        u = None if up is None else int8_mm(x_codes[0], x_codes[1], up[0], up[1], bu, x.dtype, impl)
        h_codes: Any = activation(g, u, kind=how.kind, rows=True, impl=impl)
        y: Tensor = int8_mm(h_codes[0], h_codes[1], down[0], down[1], bd, x.dtype, impl)
        # a backward in INT8 wants weights by input channel, and activations along the tokens where dW is in INT8 too; those of h it
        # makes again from g and u, which it reads anyway
        weights = [None if codes is None else codes[2:] if how.gradient else codes for codes in (gate, up, down)]
        activations = [x_codes[2:] if columns else x_codes, None if columns else h_codes]
        ctx.how, ctx.gated = how, wu is not None
        ctx.save_for_backward(g, u, *(t for pair in (*weights, *activations) for t in (pair or (None, None))))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        how: _How = ctx.how
        need_x, need_g, need_u, need_d, *need_bias = ctx.needs_input_grad[:7]
        g, u, *saved = ctx.saved_tensors
        gate, up, down, x_codes, h_codes = (None if saved[i] is None else saved[i : i + 2] for i in range(0, 10, 2))
        back = _Back(how, dy.device, dy.dtype)
        dy_rows, dy_columns = back.codes(dy, need_d)
        dh = back.dgrad(dy, dy_rows, down)
        grads: list[Any] = [None] * 7
        grads[6] = dy.sum(0) if need_bias[2] else None
        values = not how.columns or any(need_bias[:2])
        again = how.columns and need_d
        out = activation(
            g, u, dh, kind=how.kind, rows=bool(how.gradient), columns=how.columns, values=values, value_columns=again,
            seed=back.seed(), impl=how.impl,
        )  # fmt: skip
        if again:
            h_codes, out = out[-2:], out[:-2]
        if need_d:
            grads[3] = back.wgrad(dy, dy_columns, h_codes)
        parts = list(_parts(out, values, bool(how.gradient), how.columns))
        del dh
        for i, ((value, rows, columns), codes) in enumerate(zip(parts, (gate, up) if ctx.gated else (gate,), strict=True)):
            if need_x:
                grads[0] = back.dgrad(value, rows, codes, grads[0])
            if (need_g, need_u)[i]:
                grads[1 + i] = back.wgrad(value, columns, x_codes)
            if need_bias[i]:
                grads[4 + i] = value.sum(0)
        if torch.is_grad_enabled():
            grads = [None if d is None else no_second_derivative(d) for d in grads]
        return (*grads, None)


Codes = Any  # codes and scales


def _parts(out: list[Tensor], values: bool, rows: bool, columns: bool) -> Any:
    """Value, row codes and column codes of each result, from the list of ``activation``."""
    each = values + 2 * rows + 2 * columns
    for i in range(0, len(out), each):
        part = out[i : i + each]
        value = part.pop(0) if values else None
        row_codes = (part.pop(0), part.pop(0)) if rows else None
        yield value, row_codes, tuple(part) if columns else None


class _Back(NamedTuple):
    """The matmuls of a backward."""

    how: _How
    device: torch.device
    dtype: torch.dtype

    def seed(self) -> Tensor | None:
        return torch.randint(2**62, (), device=self.device) if self.how.gradient == "stochastic" else None

    def codes(self, g: Tensor, need_w: bool) -> tuple[Codes | None, Codes | None]:
        """The gradient by token and, where dW is in INT8, by channel."""
        if not self.how.gradient:
            return None, None
        if self.how.columns:
            codes = quantize_both(g, seed=self.seed(), impl=self.how.impl)
            return codes[:2], codes[2:]
        return quantize(g, seed=self.seed(), impl=self.how.impl), None

    def dgrad(self, g: Tensor | None, rows: Codes | None, weight: Any, other: Tensor | None = None) -> Tensor:
        """G W_hat, added to another gradient."""
        if rows is None:
            assert g is not None
            dx = g @ dequantize(weight[0], weight[1], g.dtype)
            return dx if other is None else other + dx
        if other is not None:
            return int8_mm_add(rows[0], rows[1], weight[0], weight[1], other, self.dtype, self.how.impl)
        return int8_mm(rows[0], rows[1], weight[0], weight[1], None, self.dtype, self.how.impl)

    def wgrad(self, g: Tensor | None, columns: Codes | None, activations: Any) -> Tensor:
        """G^T X_hat."""
        if columns is None:
            assert g is not None
            return g.mT @ dequantize(activations[0], activations[1], g.dtype)
        return int8_mm(columns[0], columns[1], activations[0], activations[1], None, self.dtype, self.how.impl)


def _infer(x: Tensor, gate: Codes, up: Codes | None, down: Codes, biases: tuple[Tensor | None, ...], how: _How) -> Tensor:
    """The values alone, from codes of weights."""
    if not how.impl and x.numel() > 0 and direct(x, *gate, *down, *biases):
        n, k = gate[0].shape
        whole = registry.best("mlp", Problem(x.device.type, x.dtype, 1, x.shape[0], n, k))
        y: Tensor | None = None if whole is None else whole.run(x, gate, up, down, biases, how.kind)
        if y is not None:
            return y
    codes = quantize(x, impl=how.impl)
    g = int8_mm(codes[0], codes[1], gate[0], gate[1], biases[0], x.dtype, how.impl)
    u = None if up is None else int8_mm(codes[0], codes[1], up[0], up[1], biases[1], x.dtype, how.impl)
    q, s = activation(g, u, kind=how.kind, rows=True, impl=how.impl)
    return int8_mm(q, s, down[0], down[1], biases[2], x.dtype, how.impl)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # as ops/linear.py says
def _mlp(x: Tensor, weights: tuple[Any, ...], biases: tuple[Tensor | None, ...], how: _How) -> Tensor:
    y: Tensor = _Mlp.apply(x, *weights, *biases, how)
    return y


def _run(x: Tensor, weights: tuple[Any, ...], biases: tuple[Tensor | None, ...], how: _How) -> Tensor:
    _check(x, weights, biases, how)
    packed = any(isinstance(w, QTensor) for w in weights)
    wanted = differentiates(x, *biases, *(w for w in weights if isinstance(w, Tensor)))
    if wanted and (packed or keeps()):  # second derivatives, forward derivatives, vmap, frozen weights
        options: dict[str, Any] = {"gradient": how.gradient or None, "wgrad": how.wgrad, "impl": how.impl}
        g = linear(x, weights[0], biases[0], **options)
        u = None if weights[1] is None else linear(x, weights[1], biases[1], **options)
        return linear(activate(how.kind, g, u, impl=how.impl), weights[2], biases[2], **options)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if wanted:
        y = _mlp(flat, weights, biases, how)
    else:
        gate, up, down = (None if w is None else _rows(w, how.impl) for w in weights)
        y = _infer(flat, gate, up, down, biases, how)  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rows(weight: Tensor | QTensor, impl: str) -> Codes:
    return weight.rows() if isinstance(weight, QTensor) else quantize(weight.detach(), impl=impl)


def _check(x: Tensor, weights: tuple[Any, ...], biases: tuple[Tensor | None, ...], how: _How) -> None:
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
        ValueError: shapes that do not fit. TypeError: dtypes or devices that differ.

    Example:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
        >>> gated_mlp(x, w, w, torch.ones(3, 4))[0]
        tensor([34.2927, 34.2927, 34.2927])

    """
    return _run(x, (gate, up, down), tuple(biases), _How(_kind(kind), gradient or "", wgrad, impl))


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
        x: (..., K). up: (N, K). down: (K', N). up_bias: (N) or None. down_bias: (K') or None.
        kind: "gelu" (erf), "gelu_tanh" or "silu".
        gradient, wgrad, impl: as for ``gated_mlp``.

    Returns:
        (..., K').

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes or devices that differ.

    Example:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
        >>> mlp(x, w, torch.ones(3, 4))[0]
        tensor([11.9838, 11.9838, 11.9838])

    """
    return _run(x, (up, None, down), (up_bias, None, down_bias), _How(_kind(kind), gradient or "", wgrad, impl))


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"mlp: kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    return kind


def merged_linear(
    x: Tensor, weights: Any, biases: Any = None, *, gradient: str | None = None, wgrad: str = "int8", impl: str = ""
) -> tuple[Tensor, ...]:
    """``linear(x, w, b)`` for several weights that share an input (q, k and v): x is quantized once, rows and columns.

    Args:
        x: (..., K). weights: a sequence of weights (N_i, K), floats or QTensors. biases: as many, each (N_i) or None; or None.
        gradient, wgrad, impl: as for ``gated_mlp``.

    Returns:
        A tuple of (..., N_i), with the bits of ``linear``.

    Raises:
        ValueError: not as many biases as weights, or shapes that do not fit. TypeError: dtypes or devices that differ.

    Example:
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
