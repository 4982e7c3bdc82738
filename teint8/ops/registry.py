"""Which implementation runs an op. A new device or kernel is one call of ``register``; nothing else is edited.

Ops and what their implementations are called with (always these shapes; broadcast dimensions have stride 0):

``quantize``  ``run(x (M, K) float, seed int64 (S,) | None, scale float32 (M,) | None) -> codes int8 (M, K), scale float32 (M,)``
              as ``numerics.quantize``, or ``numerics.quantize_static`` where a scale is given.
``int8_mm``   ``run(x_codes (B, M, K), x_scale (B, M), w_codes (B, N, K), w_scale (B, N), bias (B, N) | None, dtype) -> (B, M, N)``
              as ``numerics.int8_mm``.
``linear``    ``run(x (M, K) float, w_codes (N, K), w_scale (N,), bias (N,) | None, dtype) -> (M, N)``
              optional: both in one, for inference, where a device has something better than one after the other.

No size is 0: empty problems are answered before an implementation is looked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from teint8 import numerics

OPS = ("quantize", "int8_mm", "linear")


class Problem(NamedTuple):
    """What an implementation is chosen by; ``quantize`` has n = 0, and its dtype is that of x."""

    device: str
    dtype: torch.dtype
    batch: int
    m: int
    n: int
    k: int


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        op: "quantize", "int8_mm" or "linear".
        name: what the receipt calls it.
        run: the function; see the module's docstring for its arguments.
        device: torch's device type, or "" for every device.
        priority: the highest that is usable wins; below 0 it runs only when asked for by name.
        why_not: given a Problem, the reason why it cannot run that, or None. It is asked once for each Problem.

    """

    op: str
    name: str
    run: Callable[..., Any]
    device: str
    priority: int
    why_not: Callable[[Problem], str | None]


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
) -> Implementation:
    """Add an implementation of an op; one of the same op and name is replaced.

    It must return the contract's bits: run ``tests/contract.py`` over it.

    Args:
        op: "quantize", "int8_mm" or "linear".
        name: a new name, shown in receipts.
        run: called with the shapes that ``teint8.ops.registry`` documents.
        device: torch's device type ("cuda", "mps", "xpu"), or "" for every device.
        priority: teint8's own have 0 (reference), 10 (portable) and 20 (native).
        why_not: tells why a problem cannot be run, or None.

    Raises:
        ValueError: an unknown op. TypeError: ``run`` is not callable.

    Example:
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
    added = Implementation(op, name, run, device, priority, why_not)
    others = [i for i in _implementations[op] if i.name != name]
    _implementations[op] = sorted([*others, added], key=lambda i: -i.priority)
    _selected.clear()
    _registered[0] += 1
    return added


def generation() -> int:
    """A number that grows with each registration: what was chosen under an older one may be chosen anew."""
    return _registered[0]


def implementations(op: str) -> tuple[Implementation, ...]:
    """Every registered implementation of ``op``, the preferred first."""
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

    Raises:
        ValueError: none of that name, or it cannot run the problem; the message gives its reason.

    """
    chosen = None if name else best(op, problem)
    if chosen is not None:
        return chosen
    for implementation in _implementations[op]:
        if implementation.name == name:
            reason = why_not(implementation, problem)
            if reason is None:
                return implementation
            raise ValueError(f"{op}: implementation {name!r} cannot run {problem}: {reason}")
    known = ", ".join(repr(i.name) for i in _implementations[op])
    raise ValueError(f"{op}: no implementation is called {name!r}; registered are {known}")


def why_not(implementation: Implementation, problem: Problem) -> str | None:
    """The reason why ``implementation`` cannot run ``problem``, or None."""
    if implementation.device and implementation.device != problem.device:
        return f"it runs on {implementation.device}, not on {problem.device}"
    return implementation.why_not(problem)


def _reference_quantize(x: torch.Tensor, seed: torch.Tensor | None, scale: torch.Tensor | None) -> Any:
    return numerics.quantize(x, seed) if scale is None else numerics.quantize_static(x, scale)


register("quantize", "reference", _reference_quantize)
register("int8_mm", "reference", numerics.int8_mm)
