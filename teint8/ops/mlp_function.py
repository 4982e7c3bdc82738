"""The autograd function of the fused MLPs, and their values alone: which kernels run, in which order, on which codes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8.ops import registry
from teint8.ops.linear import weight_codes_of
from teint8.ops.raw import dequantize, direct, int8_mm, int8_mm_add, quantize
from teint8.ops.raw_both import activation, keeps_scale, quantize_both, quantize_pair, side_by_side
from teint8.ops.registry import Problem
from teint8.ops.straight import no_second_derivative

Codes = Any  # codes and scales


class How(NamedTuple):
    """What is not a tensor. ``gradient``: "", "nearest" or "stochastic"; ``wgrad``: "int8" or "float"."""

    kind: str
    gradient: str
    wgrad: str
    impl: str

    @property
    def columns(self) -> bool:
        """Whether dW is in INT8, so that activations are quantized along the tokens too."""
        return bool(self.gradient) and self.wgrad == "int8"


class Mlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)), or down(act(gate(x))) without an up; x (M, K), weights (N, K), (N, K), (K', N).

    The same kernels in the same order as ``linear``, ``activate`` and ``linear``, without what those write down in between. Gate and
    up are one weight of 2 N channels wherever that changes no bit: one launch quantizes it, one multiplies, one makes its gradient.
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
        how: How,
    ) -> Tensor:
        columns, impl, backward = how.columns, how.impl, bool(how.gradient)
        x_codes: Any = quantize_both(x, impl=impl) if columns else quantize(x, impl=impl)
        first: Any = weight_codes_of(wg, "row", backward, impl) if wu is None else quantize_pair(wg, wu, columns=backward, impl=impl)
        down: Any = weight_codes_of(wd, "row", backward, impl)
        g, u = _first(x_codes, first, (bg, bu), wu is not None, x.dtype, impl)
        h_codes: Any = activation(g, u, kind=how.kind, rows=True, impl=impl)
        y: Tensor = int8_mm(h_codes[0], h_codes[1], down[0], down[1], bd, x.dtype, impl)
        # a backward in INT8 wants weights by input channel, and activations along the tokens where dW is in INT8 too; those of h it
        # makes again from g and u, which it reads anyway, and one in float their values, given the scales
        weights = [codes[2:] if backward else codes for codes in (first, down)]
        h_kept = (None, None) if columns else (None, h_codes[1]) if not backward and keeps_scale(g, u, impl) else h_codes
        activations = [x_codes[2:] if columns else x_codes, h_kept]
        ctx.how = how
        ctx.save_for_backward(g, u, *(t for pair in (*weights, *activations) for t in pair))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        how: How = ctx.how
        need_x, need_g, need_u, need_d, *need_bias = ctx.needs_input_grad[:7]
        g, u, *saved = ctx.saved_tensors
        first, down, x_codes, h_codes = (saved[i : i + 2] for i in range(0, 8, 2))
        back = _Back(how, dy.device, dy.dtype)
        dy_rows, dy_columns = back.codes(dy, need_d)
        dh = back.dgrad(dy, dy_rows, down)
        grads: list[Any] = [None] * 7
        grads[6] = dy.sum(0) if need_bias[2] else None
        values = not how.columns or any(need_bias[:2])
        again = how.columns and need_d
        scale = h_codes[1] if h_codes[0] is None and need_d else None
        out = activation(
            g, u, dh, kind=how.kind, rows=bool(how.gradient), columns=how.columns, values=values, value_columns=again,
            seed=back.seed(), scale=scale, impl=how.impl,
        )  # fmt: skip
        del dh
        if need_d:
            grads[3] = back.wgrad_of_down(dy, dy_columns, h_codes, out, again)
        parts = list(_parts(out, values, bool(how.gradient), how.columns))
        if need_x:
            grads[0] = back.through(parts, first)
        if need_g or need_u:
            grads[1:3] = back.wgrads(parts, x_codes, (need_g, need_u))
        for i, part in enumerate(parts):
            if need_bias[i]:
                grads[4 + i] = part.value.sum(0)
        if torch.is_grad_enabled():
            grads = [None if d is None else no_second_derivative(d) for d in grads]
        return (*grads, None)


def _first(
    x_codes: Codes, weights: Codes, biases: tuple[Tensor | None, Tensor | None], gated: bool, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor | None]:
    """gate(x) and up(x), halves of one result where both have a bias or none has."""
    q, s = weights[:2]
    if not gated:
        return int8_mm(x_codes[0], x_codes[1], q, s, biases[0], dtype, impl), None
    n = q.shape[0] // 2
    bg, bu = biases
    if bg is None and bu is None:
        bias = None
    elif bg is not None and bu is not None and bg.dtype == bu.dtype:
        bias = torch.cat((bg, bu))
    else:  # adding a bias of zeros would change the sign of a zero
        g, u = (int8_mm(x_codes[0], x_codes[1], *half, b, dtype, impl) for half, b in (((q[:n], s[:n]), bg), ((q[n:], s[n:]), bu)))
        return g, u
    gu = int8_mm(x_codes[0], x_codes[1], q, s, bias, dtype, impl)
    return gu[:, :n], gu[:, n:]


class _Part(NamedTuple):
    """What is made of one gradient: values (M, N), codes and scales by token, and along the tokens (N, M)."""

    value: Any
    rows: Codes | None
    columns: Codes | None


def _parts(out: list[Tensor], values: bool, rows: bool, columns: bool) -> Any:
    """The parts of each result, from the list of ``activation``."""
    each = values + 2 * rows + 2 * columns
    for i in range(0, len(out), each):
        part = out[i : i + each]
        value = part.pop(0) if values else None
        row_codes = (part.pop(0), part.pop(0)) if rows else None
        yield _Part(value, row_codes, tuple(part) if columns else None)


class _Back(NamedTuple):
    """The matmuls of a backward."""

    how: How
    device: torch.device
    dtype: torch.dtype

    def seed(self) -> Tensor | None:
        return torch.randint(2**62, (), device=self.device) if self.how.gradient == "stochastic" else None

    def codes(self, g: Tensor, need_w: bool) -> tuple[Codes | None, Codes | None]:
        """The gradient by token and, where dW is in INT8, by channel."""
        if not self.how.gradient:
            return None, None
        if self.how.columns and need_w:
            codes = quantize_both(g, seed=self.seed(), impl=self.how.impl)
            return codes[:2], codes[2:]
        return quantize(g, seed=self.seed(), impl=self.how.impl), None

    def dgrad(self, g: Tensor, rows: Codes | None, weight: Codes, other: Tensor | None = None) -> Tensor:
        """G W_hat, in INT8 added to another gradient."""
        if rows is None:
            return g @ dequantize(weight[0], weight[1], g.dtype)
        if other is not None:
            return int8_mm_add(rows[0], rows[1], weight[0], weight[1], other, self.dtype, self.how.impl)
        return int8_mm(rows[0], rows[1], weight[0], weight[1], None, self.dtype, self.how.impl)

    def through(self, parts: list[_Part], weights: Codes) -> Tensor:
        """dX of gate and up: in float one matmul over the channels of both, in INT8 the sum of two, whose scales differ."""
        q, s = weights
        if len(parts) == 1:
            return self.dgrad(parts[0].value, parts[0].rows, weights)
        if not self.how.gradient:
            return self.dgrad(side_by_side(parts[0].value, parts[1].value, 1), None, weights)
        dx = self.dgrad(parts[0].value, parts[0].rows, (q[0], s[0]))
        return self.dgrad(parts[1].value, parts[1].rows, (q[1], s[1]), dx)

    def wgrad(self, g: Tensor, columns: Codes | None, activations: Codes) -> Tensor:
        """G^T X_hat."""
        if columns is None:
            return g.mT @ dequantize(activations[0], activations[1], g.dtype)
        return int8_mm(columns[0], columns[1], activations[0], activations[1], None, self.dtype, self.how.impl)

    def wgrad_of_down(self, dy: Tensor, columns: Codes | None, h: Codes, out: list[Tensor], again: bool) -> Tensor:
        """dW of down, whose activations are kept, or the last of what was made with the gradients, and taken off that."""
        if again:
            h = [out.pop(-2), out.pop()]
        elif h[0] is None:
            return dy.mT @ out.pop()
        return self.wgrad(dy, columns, h)

    def wgrads(self, parts: list[_Part], x: Codes, needed: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """dW of gate and up: halves of one matmul, and so of one storage, where both are needed."""
        if all(needed) and len(parts) == 2:
            g, u = parts
            if self.how.columns:
                both: Codes = [side_by_side(g.columns[i], u.columns[i], 0) for i in range(2)]  # type: ignore[index]
                dw = self.wgrad(g.value, both, x)
            else:
                dw = self.wgrad(side_by_side(g.value, u.value, 1), None, x)
            n = dw.shape[0] // 2
            return dw[:n], dw[n:]
        alone = [self.wgrad(p.value, p.columns, x) if need else None for p, need in zip(parts, needed, strict=False)]
        return alone[0], alone[1] if len(alone) == 2 else None


def infer(x: Tensor, gate: Codes, up: Codes | None, down: Codes, biases: tuple[Tensor | None, ...], how: How) -> Tensor:
    """The values alone, from codes of weights."""
    if not how.impl and x.numel() > 0 and direct(x, *gate, *(up or ()), *down, *biases):
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
