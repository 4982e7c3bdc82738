"""The raw ops ``quantize_both`` and ``activation``, which make operands for the backward's matmuls; they have no derivative."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, numerics
from teint8.ops import raw, registry
from teint8.ops.registry import Problem

_library = torch.library.Library("teint8", "FRAGMENT")
_library.define("quantize_both(Tensor x, Tensor? seed, str impl) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "activation(Tensor g, Tensor? u, Tensor? d, Tensor? seed, Tensor? scale, str kind, bool rows, bool columns, bool values, "
    "bool value_columns, str impl) -> Tensor[]"
)

Codes = tuple[Tensor, Tensor, Tensor, Tensor]


def quantize_both(x: Tensor, *, seed: Tensor | None = None, impl: str = "") -> Codes:
    """Codes and scales of the rows of ``x`` and of the rows of its transpose, by the numerics contract; no gradient flows.

    Args:
        x: (M, K) or (B, M, K), any float dtype, any strides.
        seed: int64 () for stochastic rounding; the transpose takes seed ^ 1, so that an element has one noise in both.
        impl: name of an implementation, "" for the best.

    Returns:
        int8 codes (..., M, K), float32 scales (..., M), int8 codes (..., K, M), float32 scales (..., K). Rows of codes begin at
        multiples of 16 bytes.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: an unknown implementation.

    Examples:
        >>> codes, scale, tcodes, tscale = quantize_both(torch.tensor([[1.0, -2.0], [4.0, 0.0]]))
        >>> codes.tolist(), tcodes.tolist()
        ([[64, -127], [127, 0]], [[32, 127], [-127, 0]])

    """
    if not x.is_floating_point():
        raise TypeError(f"quantize_both: x is {x.dtype}; a float tensor is needed, such as x.float()")
    if seed is not None and x.ndim > 2 and x.shape[0] > 1:  # one seed for a batch: rows are counted through all of it
        return (*raw.quantize(x, seed=seed, impl=impl), *raw.quantize(x.mT, seed=seed ^ 1, impl=impl))
    op = _quantize_both if raw.direct(x, seed) else torch.ops.teint8.quantize_both
    codes: Codes = op(x, seed, impl)
    return codes


def quantize_pair(a: Tensor, b: Tensor, *, columns: bool, impl: str = "") -> tuple[Tensor, ...]:
    """Codes and scales of two weights that share an input, as those of one with the channels of both; no gradient flows.

    Args:
        a, b: (N, K), alike in shape, dtype and device.
        columns: quantize by column, too.
        impl: name of an implementation, "" for the best.

    Returns:
        int8 codes (2 N, K), float32 scales (2 N); with columns transposed int8 codes (2, K, N), float32 scales (2, K), too.

    Examples:
        >>> codes, scale = quantize_pair(torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), columns=False)
        >>> codes.tolist()
        [[127, 127], [127, 42]]

    """
    if a.numel() > 0 and raw.direct(a, b):
        op = "quantize_both" if columns else "quantize"
        implementation = registry.select(op, Problem(a.device.type, a.dtype, 2, a.shape[0], 0, a.shape[1]), impl)
        if implementation.pairs:
            a, b = a.detach(), b.detach()
            made = implementation.run(a, None, pair=b) if columns else implementation.run(a, None, None, pair=b)
            return (made[0].flatten(0, 1), made[1].flatten(), *made[2:]) if columns else tuple(made)
    each = [quantize_both(w, impl=impl) if columns else raw.quantize(w.detach(), impl=impl) for w in (a, b)]
    joined = [torch.cat(parts) if i < 2 else torch.stack(parts) for i, parts in enumerate(zip(*each, strict=True))]
    return tuple(_aligned(t) if t.dtype == torch.int8 else t for t in joined)


def side_by_side(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Two tensors alike as one along a dimension: without a copy where the kernels left them side by side.

    Examples:
        >>> x = torch.arange(6).view(2, 3)
        >>> side_by_side(x[:, :1], x[:, 1:2], 1)
        tensor([[0, 1],
                [3, 4]])

    """
    return _whole(a, b, dim) if raw.direct(a, b) and _are_neighbours(a, b, dim) else torch.cat((a, b), dim)


def _are_neighbours(a: Tensor, b: Tensor, dim: int) -> bool:
    """Whether b begins where a ends, in one storage; along the last dimension a row of both must end before the next one begins."""
    step = a.shape[dim] * a.stride(dim)
    if a.stride() != b.stride() or step <= 0 or a.data_ptr() + step * a.itemsize != b.data_ptr():
        return False
    fits = dim == 0 or a.stride(0) >= 2 * step
    return fits and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _whole(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return a.as_strided([2 * n if i == dim else n for i, n in enumerate(a.shape)], a.stride())


def activation(
    g: Tensor,
    u: Tensor | None = None,
    d: Tensor | None = None,
    *,
    kind: str,
    rows: bool = False,
    columns: bool = False,
    values: bool = False,
    value_columns: bool = False,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
    impl: str = "",
) -> list[Tensor]:
    """An activation (gated by u), or given d the gradients of one: values, row codes, transposed column codes; no gradient flows.

    Args:
        g: (M, N) or (B, M, N), any float dtype.
        u, d: as g, or None.
        kind: one of ``teint8.activations.KINDS``.
        rows, columns, values: what is wanted of each result.
        value_columns: with d, transposed column codes of the activation's value, too: a backward needs no codes kept by the forward.
        seed: int64 () for stochastic rounding.
        scale: with d, float32 (..., M), the scales that ``rows`` gives for the activation's value: the value of its codes is wanted,
            too, so that a backward in float needs none kept by the forward.
        impl: name of an implementation, "" for the best.

    Returns:
        For each result ``[values]``, ``[codes, scale]``, ``[tcodes, tscale]``, of these what is wanted, in one list; last those of the
        value, ``[tcodes, tscale]`` and ``[dequantized]``.

    Examples:
        >>> (h,) = activation(torch.tensor([[1.0, 0.0]]), kind="silu", values=True)
        >>> h
        tensor([[0.7311, 0.0000]])

    """
    op = _activation if raw.direct(g, u, d, seed, scale) else torch.ops.teint8.activation
    out: list[Tensor] = op(g, u, d, seed, scale, kind, rows, columns, values, value_columns, impl)
    return out


def keeps_scale(g: Tensor, u: Tensor | None, impl: str = "") -> bool:
    """Whether a backward makes the activation's value again from its scales with less to read than its codes are.

    Examples:
        >>> keeps_scale(torch.ones(2, 2), None)
        False

    """
    if g.numel() == 0 or not raw.direct(g, u):
        return False
    return numerics.tells_absmax(g.dtype) and registry.select("activation", _problem(g), impl).hats


def _seeds(seed: Tensor | None) -> Tensor | None:
    return None if seed is None else seed.reshape(-1)


def _aligned(codes: Tensor) -> Tensor:
    """Codes whose rows begin at multiples of 16 bytes, as the fake tensors have them."""
    k = codes.shape[-1]
    width = -(-k // 16) * 16
    if codes.stride(-1) == 1 and codes.stride(-2) == width:
        return codes
    padded = codes.new_empty((*codes.shape[:-1], width))[..., :k]
    return padded.copy_(codes)


def _quantize_both(x: Tensor, seed: Tensor | None, impl: str) -> Codes:
    codes: Codes
    if x.numel() == 0:
        codes = (*raw.quantize(x), *raw.quantize(x.mT))
        return _aligned(codes[0]), codes[1], _aligned(codes[2]), codes[3]
    problem = _problem(x)
    q, s, tq, ts = registry.select("quantize_both", problem, impl).run(x.detach(), _seeds(seed))
    return _aligned(q), s, _aligned(tq), ts


def _problem(x: Tensor) -> Problem:
    return Problem(x.device.type, x.dtype, x.shape[0] if x.ndim > 2 else 1, x.shape[-2], 0, x.shape[-1])


def _activation(
    g: Tensor,
    u: Tensor | None,
    d: Tensor | None,
    seed: Tensor | None,
    scale: Tensor | None,
    kind: str,
    rows: bool,
    columns: bool,
    values: bool,
    value_columns: bool,
    impl: str,
) -> list[Tensor]:
    results = 2 if u is not None and d is not None else 1
    if g.numel() == 0:
        one = [torch.empty_like(g)] * values
        one += list(raw.quantize(g)) * rows
        one += list(raw.quantize(g.mT)) * columns
        one = one * results + list(raw.quantize(g.mT)) * value_columns + [torch.empty_like(g)] * (scale is not None)
        return [_aligned(t) if t.dtype == torch.int8 else t.clone() for t in one]
    sources = [None if t is None else t.detach() for t in (g, u, d)]
    implementation = registry.select("activation", _problem(g), impl)
    out = implementation.run(*sources, kind, rows, columns, values, value_columns, _seeds(seed), scale)
    return [_aligned(t) if t.dtype == torch.int8 else t for t in out]


def _of_their_own(results: Iterable[Tensor]) -> list[Tensor]:
    """Results of an op as compiled code expects them: at multiples of 16 bytes, and none in the memory of another."""
    seen: set[int] = set()
    out = []
    for t in results:
        memory = _torch.memory_of(t)
        if memory in seen or t.data_ptr() % 16:
            t = _aligned(t.clone()) if t.dtype == torch.int8 else t.clone()
        out.append(t)
        seen.add(memory)
    return out


def _quantize_both_op(x: Tensor, seed: Tensor | None, impl: str) -> Codes:
    with _torch.by_dispatcher():
        codes: Any = tuple(_of_their_own(_quantize_both(x, seed, impl)))
    return codes  # type: ignore[no-any-return]


def _activation_op(*args: Any) -> list[Tensor]:
    with _torch.by_dispatcher():
        out = _activation(*args)
    return _of_their_own(t if t.dtype == torch.int8 else t.contiguous() for t in out)


_library.impl("quantize_both", _quantize_both_op, "CompositeExplicitAutograd")
_library.impl("activation", _activation_op, "CompositeExplicitAutograd")


def _fake_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    codes = x.new_empty((*x.shape[:-1], (k + 15) // 16 * 16), dtype=torch.int8)[..., :k]
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("teint8::quantize_both", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_both_fake(x: Tensor, seed: Tensor | None, impl: str) -> Codes:
    return (*_fake_codes(x), *_fake_codes(x.mT))


@torch.library.register_fake("teint8::activation", lib=_library)  # type: ignore[untyped-decorator]
def _activation_fake(
    g: Tensor, u: Any, d: Any, seed: Any, scale: Any, kind: str, rows: bool, columns: bool, values: bool, value_columns: bool, impl: str
) -> list[Tensor]:
    out: list[Tensor] = []
    for _ in range(2 if u is not None and d is not None else 1):
        if values:
            out.append(g.new_empty(g.shape))
        if rows:
            out += _fake_codes(g)
        if columns:
            out += _fake_codes(g.mT)
    return out + list(_fake_codes(g.mT)) * value_columns + [g.new_empty(g.shape)] * (scale is not None)


@torch.library.register_vmap("teint8::quantize_both", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_both_vmap(info: Any, in_dims: Any, x: Tensor, seed: Tensor | None, impl: str) -> Any:
    x = raw.front(x, in_dims[0], info.batch_size)
    if seed is not None:
        seed = raw.front(seed, in_dims[1], info.batch_size)
    if x.ndim == 3:
        return torch.ops.teint8.quantize_both(x, seed, impl), (0, 0, 0, 0)
    # a batch of batches: one for the kernel, with a seed for each of the inner ones
    inner = x.shape[1]
    seed = None if seed is None else seed.reshape(-1, 1).expand(x.shape[0], inner).reshape(-1)
    out = torch.ops.teint8.quantize_both(x.flatten(0, 1), seed, impl)
    return tuple(t.unflatten(0, (x.shape[0], inner)) for t in out), (0, 0, 0, 0)


@torch.library.register_vmap("teint8::activation", lib=_library)  # type: ignore[untyped-decorator]
def _activation_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    tensors = [None if t is None else raw.front(t, dim, info.batch_size) for t, dim in zip(args[:5], in_dims, strict=False)]
    *sources, seed, scale = tensors
    lead = sources[0].shape[:-2]  # type: ignore[union-attr]
    flat = [None if t is None else t.reshape(-1, *t.shape[-2:]) for t in sources]
    seed = None if seed is None else seed.reshape(-1, *[1] * (len(lead) - 1)).expand(lead).reshape(-1)
    scale = None if scale is None else scale.reshape(-1, scale.shape[-1])
    out = torch.ops.teint8.activation(*flat, seed, scale, *args[5:])
    return [t.unflatten(0, lead) for t in out], [0] * len(out)
