"""Which implementation runs an op. A new device or kernel is one call of ``register``; nothing else is edited.

Ops and what their implementations are called with (always these shapes; broadcast dimensions have stride 0):

``quantize``  ``run(x (M, K) float, seed int64 (S,) | None, scale float32 (M,) | None) -> codes int8 (M, K), scale float32 (M,)``
              as ``numerics.quantize``, or ``numerics.quantize_static`` where a scale is given, to nearest.
              An implementation of this or of ``quantize_both`` whose ``pairs`` is true takes a ``pair`` like x, too: the codes of both
              come in one tensor, one after the other (quantize: (2 M, K)) or as a batch of two (quantize_both: (2, M, K)).
``int8_mm``   ``run(x_codes (B, M, K), x_scale (B, M), w_codes (B, N, K), w_scale (B, N), bias (B, N) | None, dtype) -> (B, M, N)``
              as ``numerics.int8_mm``.
              An implementation whose ``flat`` is true takes the same without the batch dimension, too; one whose ``adds`` is true
              a ``residual`` like its result, which is added to that in the same kernel, and ``into``: in the residual's memory, if it
              can be.
``linear``    ``run(x (M, K) float, w_codes (N, K), w_scale (N,), bias (N,) | None, dtype) -> (M, N)``
              optional: both in one, for inference, where a device has something better than one after the other.
              ``many(x, [(w_codes, w_scale, bias), ...], dtype) -> [(M, N), ...]``: the same for several weights, quantized once.
``quantize_both``  ``run(x (..., M, K) float, seed int64 (B,) | None) -> codes, scale, tcodes (..., K, M), tscale (..., K)``
              as ``quantize`` of x's rows, and of its transpose's, which are rounded with seed ^ 1.
``activation``  ``run(g (M, N) or (B, M, N), u | None, d | None, kind, rows, columns, values, value_columns,
              seed (B,) | None, scale (..., M) | None) -> [tensors]``
              as ``activations.value``, or ``activations.gradient`` where d is given; for each result its values (..., M, N), its row
              codes and scales, its transposed column codes and scales, of these what is asked for. The second result takes seed + 2.
              ``value_columns``, with d: transposed column codes and scales of the value, too, last, rounded to nearest. ``scale``,
              with d: the scales of the value's rows; last of all comes the value of their codes, (..., M, N) in the dtype of g. One
              whose ``hats`` is true needs no reduction for that, and reads no codes.
``mlp``       ``run(x (M, K) float, gate, up | None, down, biases, kind) -> (M, K')``, each weight (codes (N, K), scale (N,))
              optional: linear, activation, linear in one, for inference; n is that of the gate.
``norm``      ``run(x (M, K) float, residual | None, weight (K,) | None, bias (K,) | None, kind, eps, codes, values) -> [tensors]``
              as ``norms.value`` of x + residual: that sum where there is a residual, the values, the codes and scales, as asked for.
``channel_norm``  ``run(x (B, C, P) float, weight (C,) | None, bias | None, mean (C,) | None, variance | None, groups, eps, codes,
              values) -> [tensors]``: as ``norms.of_channels``; the values (B, C, P), codes (B, P, C) and scales (B,), one a sample, as
              asked for; m is B, n is P, k is C, extra (groups,), or () where mean and variance are given.
``grouped_mm`` ``run(xq (M, K), xs (M,), wq (G, N, K), ws (G, N), ends (G,) int, dtype) -> (M, N)``: ``int8_mm`` of rows that end at
              ends[g] by weight g; 0 behind the last; batch is the number of groups.
``conv``      ``run(xq (B, *S, C), xs (B, V), wq (N, *kernel, C / groups), ws (N), bias (N) | None, window, dtype) -> (B, *S', N)``
              as ``ops.raw_conv.int8_conv``; m counts windows, batch groups, n and k the channels and products of one group.
``quantize_channels``  ``run(x (B, P, C) float) -> codes int8 (B, P, C), scale float32 (B, C)``: as ``quantize`` of each channel over P;
              m is B, n is P, k is C.
``attention``  ``run(q (B, H, M, D), qs (B, H, M), k (B, G, S, D), ks (B, G, S), v (B, G, E, S), vs (B, G, E), mask | None, causal,
              scale, dtype) -> (B, H, M, E)``: as ``attentions.value``; m counts rows, n keys, k is D, batch B * H, extra (E,).
``block_mm``  ``run(xq (M, K), xs (M, B), wq (N, K), ws (N, B), bias (N,) | None, block, dtype) -> (M, N)``: as
              ``numerics.int8_block_mm``; extra is (block,).
``rotate``    ``run(x (M, K) float, smoothing (K,) | None, block, codes, scale (M,) | None) -> [values]``, or ``[codes, scale]``: as
              ``ops.rotation.conditioned_codes``, values in float32 (float64 of float64); extra is (block,).

No size is 0: empty problems are answered before an implementation is looked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

OPS = (
    "quantize",
    "int8_mm",
    "linear",
    "quantize_both",
    "activation",
    "mlp",
    "norm",
    "channel_norm",
    "grouped_mm",
    "conv",
    "quantize_channels",
    "attention",
    "block_mm",
    "rotate",
)


class Problem(NamedTuple):
    """What an implementation is chosen by.

    Attributes:
        device: torch's device type.
        dtype: of the result; of ``quantize`` and ``quantize_both`` that of x.
        batch: how many matmuls in one call.
        m: rows of the activation.
        n: output channels; 0 for ``quantize``.
        k: length of the contraction.
        extra: for conv, how many spatial dimensions there are, and channels in a group; the module's docstring has the others.

    Examples:
        >>> Problem("cpu", torch.float32, 1, 8, 16, 64).k
        64

    """

    device: str
    dtype: torch.dtype
    batch: int
    m: int
    n: int
    k: int
    extra: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        op: one of OPS.
        name: what the receipt calls it.
        run: the function; see the module's docstring for its arguments.
        device: torch's device type, or "" for every device.
        priority: the highest that is usable wins; below 0 it runs only when asked for by name.
        why_not: given a Problem, the reason why it cannot run that, or None. It is asked once for each Problem.
        flat: for int8_mm, whether operands may come without their batch dimension.
        adds: for int8_mm, whether it takes a residual.
        pairs: for quantize and quantize_both, whether it takes a pair.
        hats: for activation, whether a value's scales spare it the reading of codes.
        many: for linear, the same for several weights: ``many(x, [(w_codes, w_scale, bias), ...], dtype) -> [(M, N), ...]``.
        describe: given a Problem, the configuration that it runs it with; None where it has one for all.

    Examples:
        >>> implementations("int8_mm")[-1].op
        'int8_mm'

    """

    op: str
    name: str
    run: Callable[..., Any]
    device: str
    priority: int
    why_not: Callable[[Problem], str | None]
    flat: bool = False
    adds: bool = False
    pairs: bool = False
    hats: bool = False
    many: Callable[..., list[Any]] | None = None
    describe: Callable[[Problem], str] | None = None


_implementations: dict[str, list[Implementation]] = {op: [] for op in OPS}
_registered = [0]
_selected: dict[tuple[str, Problem], Implementation | None] = {}  # choices made so far; forgotten when one is registered


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    device: str = "",
    priority: int = 0,
    why_not: Callable[[Problem], str | None] = lambda problem: None,
    flat: bool = False,
    adds: bool = False,
    pairs: bool = False,
    hats: bool = False,
    many: Callable[..., list[Any]] | None = None,
    describe: Callable[[Problem], str] | None = None,
) -> Implementation:
    """Add an implementation of an op; one of the same op and name is replaced.

    It must return the contract's bits: run ``tests/contract.py`` over it.

    Args:
        op: one of OPS.
        name: a new name, shown in receipts.
        run: called with the shapes that ``teint8.ops.registry`` documents.
        device: torch's device type ("cuda", "mps", "xpu"), or "" for every device.
        priority: teint8's own have 0 (reference), 10 (portable) and 20 (native).
        why_not: tells why a problem cannot be run, or None.
        flat: for int8_mm, whether it takes operands without their batch dimension, too.
        adds: for int8_mm, whether it takes a residual and adds it to the result.
        pairs: for quantize and quantize_both, whether it takes ``pair``, a second tensor like x.
        hats: for activation, whether with ``scale`` it makes the value of the codes without them, for bfloat16 and float16.
        many: for linear, a function that quantizes once for several weights, if there is one.
        describe: tells which of its configurations runs a problem, for the receipt.

    Returns:
        The Implementation, as it is registered now.

    Raises:
        ValueError: an unknown op.
        TypeError: ``run`` is not callable.

    Examples:
        >>> from teint8 import numerics
        >>> def mine(x, seed, scale):
        ...     return numerics.quantize(x, seed) if scale is None else numerics.quantize_static(x, scale)
        >>> register("quantize", "mine", mine, device="xpu", priority=10).name
        'mine'

    """
    if op not in OPS:
        raise ValueError(f"register: op is {op!r}; it must be one of {', '.join(map(repr, OPS))}")
    if not callable(run):
        raise TypeError(f"register: run is {run!r}; a function is needed")
    added = Implementation(op, name, run, device, priority, why_not, flat, adds, pairs, hats, many, describe)
    others = [i for i in _implementations[op] if i.name != name]
    _implementations[op] = sorted([*others, added], key=lambda i: -i.priority)
    choose_anew()
    return added


def choose_anew() -> None:
    """Forget which implementation was chosen for which problem: what they can run has changed."""
    _selected.clear()
    _registered[0] += 1


def generation() -> int:
    """A number that grows when there is something to choose anew."""
    return _registered[0]


def implementations(op: str) -> tuple[Implementation, ...]:
    """Every registered implementation of ``op``, the preferred first.

    Args:
        op: one of OPS.

    Returns:
        A tuple, by falling priority.

    Raises:
        ValueError: an unknown op.

    Examples:
        >>> [i.name for i in implementations("int8_mm") if i.device == ""]
        ['reference']

    """
    if op not in _implementations:
        raise ValueError(f"op is {op!r}; one of {', '.join(map(repr, OPS))} is needed")
    return tuple(_implementations[op])


def best(op: str, problem: Problem) -> Implementation | None:
    """The implementation of highest priority that can run ``problem``, or None."""
    try:
        return _selected[op, problem]
    except KeyError:
        pass
    usable = (i for i in _implementations[op] if i.priority >= 0 and why_not(i, problem) is None)
    if len(_selected) > 4096:  # sizes of a program are few; those of a stream of sentences are not
        _selected.clear()
    chosen = _selected[op, problem] = next(usable, None)
    return chosen


def select(op: str, problem: Problem, name: str = "") -> Implementation:
    """The implementation that runs ``problem``: the one asked for by name, else the best.

    Args:
        op: one of OPS.
        problem: what it is to run.
        name: of an implementation, "" for the best.

    Returns:
        An Implementation.

    Raises:
        ValueError: an unknown op, none of that name, or it cannot run the problem; the message gives its reason.

    Examples:
        >>> select("int8_mm", Problem("cpu", torch.float32, 1, 8, 16, 64), "reference").priority
        0

    """
    known = implementations(op)
    chosen = None if name else best(op, problem)
    if chosen is not None:
        return chosen
    for implementation in known:
        if implementation.name == name:
            reason = why_not(implementation, problem)
            if reason is None:
                return implementation
            raise ValueError(f"{op}: implementation {name!r} cannot run {problem}: {reason}")
    names = ", ".join(repr(i.name) for i in known)
    raise ValueError(f"{op}: no implementation is called {name!r}; registered are {names}")


def describe(op: str, name: str, problem: Problem) -> str:
    """The configuration that the implementation of that name runs ``problem`` with, or "".

    Args:
        op: one of OPS.
        name: of an implementation.
        problem: what it is to run.

    Returns:
        The words that a receipt shows under ``kernel``.

    Raises:
        ValueError: an unknown op.

    Examples:
        >>> describe("int8_mm", "reference", Problem("cpu", torch.float32, 1, 8, 16, 64))
        ''

    """
    tell = next((i.describe for i in implementations(op) if i.name == name), None)
    return "" if tell is None else tell(problem)


def why_not(implementation: Implementation, problem: Problem) -> str | None:
    """The reason why ``implementation`` cannot run ``problem``, or None."""
    if implementation.device and implementation.device != problem.device:
        return f"it runs on {implementation.device}, not on {problem.device}"
    return implementation.why_not(problem)
