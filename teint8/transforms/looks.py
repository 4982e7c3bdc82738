"""Routes that run a program in float and look at what meets its weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from teint8.policy import Policy, Rule
from teint8.transforms.pack import is_packed
from teint8.transforms.quantize import BoundRoute, quantized, run
from teint8.transforms.trees import map_leaves

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Seen(NamedTuple):
    """A weight that a program multiplies by: its path, the dimension of its own layout that is contracted, the rule for the call."""

    path: str
    axis: int
    rule: Rule


class Looks(BoundRoute):
    """Runs a program in float and shows each call of a weight of two dimensions that the policy would quantize to ``look``.

    Attributes:
        seen: what was seen of each weight first, by path.

    """

    def __init__(self, rules: Policy) -> None:
        super().__init__(Policy(), False, None)
        self.rules = rules
        self.seen: dict[str, Seen] = {}

    def start(self) -> None:
        """Begin a batch; called once more behind the last."""
        self.known.clear()

    def look(self, seen: Seen, x: Tensor) -> None:
        """x (..., K) by a weight."""

    def multiply(
        self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Callable[[], Any], rows: Any = None, ends: Any = None
    ) -> Any:
        rule = self.rules.match(weight.path, op)
        # of a conditioned weight the call in its own basis comes by here, too
        plain = weight.conditioning is None and ends is None and weight.value.ndim == 2
        if weight.path and plain and rule is not None and rule.weight is not None:
            seen = Seen(weight.path, -3 - axis if weight.transposed else axis, rule)
            self.seen.setdefault(weight.path, seen)
            self.look(seen, x.detach())
        return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)


def refuse_packed(params: Any, name: str) -> None:
    """Raise for parameters that are packed.

    Raises:
        ValueError: a leaf is packed.

    """

    def look(path: str, leaf: Any) -> None:
        if is_packed(leaf):
            raise ValueError(f"{name}: {path!r} is packed; give the float parameters, and pack what comes back")

    map_leaves(look, params)


def examples_of(qfn: Any, batches: Any, name: str) -> Iterator[Arguments]:
    """Positional and keyword arguments of each batch, one after the other.

    Raises:
        TypeError: not a quantized function, or a tensor or a dict as batches. When it is read to its end, ValueError: no batches.

    """
    quantized(qfn)
    if isinstance(batches, Tensor):
        raise TypeError(f"{name}: batches is a tensor {tuple(batches.shape)}; a list of batches is needed, [x] for one")
    if isinstance(batches, Mapping):
        raise TypeError(f"{name}: batches is a dict; a list of batches is needed, [batch] for one")
    return _arguments(batches, name)


def _arguments(batches: Iterable[Any], name: str) -> Iterator[Arguments]:
    none = True
    for batch in batches:
        none = False
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}
    if none:
        raise ValueError(f"{name}: there are no batches; give some example inputs, [x] for one")


def look_at(route: "Looks", qfn: Any, params: Any, batches: Iterable[Any], name: str, progress: bool) -> None:
    """Show the calls of each batch to a route, without gradients.

    Raises:
        TypeError, ValueError: as ``examples_of`` and ``refuse_packed``; ValueError: nothing was to be seen.

    """
    examples = examples_of(qfn, batches, name)
    refuse_packed(params, name)
    total = len(batches) if isinstance(batches, Sized) else None
    with torch.no_grad():
        for args, kwargs in tqdm(examples, name, total, disable=not progress):
            route.start()
            run(qfn, route, params, args, kwargs)
    route.start()
    if not route.seen:
        raise ValueError(f"{name}: no weight that it looks at is quantized by {qfn.policy!r}; there is nothing to look at")
