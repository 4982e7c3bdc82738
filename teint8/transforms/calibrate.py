"""``calibrate``: statistics of what meets the weights, and static scales from them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from teint8.conditioning import Conditioned
from teint8.policy import Policy, Rule
from teint8.qtensor import QTensor, check_scale
from teint8.transforms.convolutions import Convolution
from teint8.transforms.operands import Operand
from teint8.transforms.pack import is_packed
from teint8.transforms.quantize import BoundRoute, quantized, run
from teint8.transforms.trees import is_grouped, map_leaves, weights_of

BINS = 255 * 128
"""Bins of the histogram: 128 an octave of |x|, by the bits of float32, of all finite numbers: those of all machines are the same."""

OF_CONVOLUTION = -3
"""``Statistics.axis`` of what meets the weight of a convolution: its channels are those of the image."""

METHODS = ("absmax", "average", "percentile", "mse", "entropy")


class Statistics(NamedTuple):
    """What was seen of the activation that meets one weight; a pytree of tensors of constant size.

    Attributes:
        counts: int64 (BINS,), how many values had this magnitude.
        channels: float32 (K,), absmax of each channel.
        sums: float32 (K,), sum of |x| of each.
        tokens: int64 (), rows seen.
        moving: float32 (), the moving average of the batches' absmax (0.9 of the old).
        batches: int64 ().
        axis: int64 (), the dimension of the weight that meets the channels: -1 as in nn.Linear, -2 in ``x @ w``; -3 of a
            convolution; 0 where several occur.

    Examples:
        >>> from teint8 import quantize
        >>> model = torch.nn.Linear(8, 4)
        >>> stats = calibrate(quantize(model), dict(model.named_parameters()), [torch.ones(2, 8)], progress=False)
        >>> int(stats["weight"].tokens), float(stats["weight"].absmax)
        (2, 1.0)

    """

    counts: Tensor
    channels: Tensor
    sums: Tensor
    tokens: Tensor
    moving: Tensor
    batches: Tensor
    axis: Tensor

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude."""
        return self.channels.max()


Calibration = dict[str, Statistics]
"""Statistics by the weight's path."""


def calibrate(qfn: Any, params: Any, batches: Iterable[Any], *, state: Calibration | None = None, progress: bool = True) -> Calibration:
    """Run example inputs in float and gather statistics of each activation that meets a weight which the policy quantizes.

    Batches are taken one after the other, and what is kept of them (256 KB and two rows a weight) does not grow. What comes back goes
    in again as ``state``, or is added to another machine's with ``merge``; ``scales`` makes static scales of it, and ``smooth`` and
    ``keep_outliers`` use its channels.

    Args:
        qfn: a result of ``quantize``; of a module, whatever mode it is in (put it into eval mode first).
        params: its float parameters, conditioned ones too (``smooth``, ``rotate``): then of the activation as it is quantized.
        batches: example inputs, each a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        state: statistics to go on from.
        progress: show a progress bar.

    Returns:
        By the path of each weight its Statistics.

    Raises:
        TypeError: one tensor as batches.
        ValueError: no batches, packed parameters, no weight that the policy quantizes, or values that
            are not finite.

    Examples:
        >>> from torch import nn
        >>> from teint8 import pack, quantize, Policy, Quant, Rule
        >>> model, x = nn.Linear(8, 4), torch.linspace(-1, 1, 32).view(4, 8)
        >>> qfn, params = quantize(model, Policy([Rule(activation=Quant(scale="static"))])), dict(model.named_parameters())
        >>> stats = calibrate(qfn, params, [x], progress=False)
        >>> packed = with_scales(pack(qfn, params), scales(stats, "absmax"))
        >>> torch.allclose(qfn(packed, x), model(x), atol=0.02)
        True

    """
    quantized(qfn)
    route = _Looking(qfn.policy, dict(state or {}))
    look_at(route, qfn, params, batches, "calibrate", progress)
    return route.stats


def merge(*calibrations: Calibration) -> Calibration:
    """Statistics of all that each saw, as if one had seen it all; moving averages are weighted by their batches.

    Args:
        calibrations: results of ``calibrate``, one or more, of one model.

    Returns:
        Statistics by path, those of a path added up.

    Raises:
        TypeError: not results of ``calibrate``.
        ValueError: of other models.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model = nn.Linear(8, 4)
        >>> parts = [calibrate(quantize(model), dict(model.named_parameters()), [x], progress=False) for x in torch.randn(2, 3, 8)]
        >>> int(merge(*parts)["weight"].tokens)
        6

    """
    if not calibrations or not all(isinstance(c, dict) and all(isinstance(s, Statistics) for s in c.values()) for c in calibrations):
        raise TypeError("merge: results of calibrate are needed, such as merge(first, second)")
    out: Calibration = {}
    for calibration in calibrations:
        for path, new in calibration.items():
            old = out.get(path)
            if old is not None and old.channels.shape != new.channels.shape:
                raise ValueError(f"merge: {path} has {old.channels.numel()} channels and {new.channels.numel()}; of two models?")
            out[path] = new if old is None else _added(old, new)
    return out


def _added(a: Statistics, b: Statistics) -> Statistics:
    b = Statistics(*(t.to(a.counts.device) for t in b))
    batches = a.batches + b.batches
    moving = (a.moving * a.batches + b.moving * b.batches) / batches.clamp(min=1)
    axis = torch.where(a.axis == b.axis, a.axis, 0)
    channels = torch.maximum(a.channels, b.channels)
    return Statistics(a.counts + b.counts, channels, a.sums + b.sums, a.tokens + b.tokens, moving, batches, axis)


def scales(calibration: Calibration, method: str = "mse", *, percentile: float = 99.99) -> dict[str, Tensor]:
    """Static scales by path: what the codes of the activation are multiplied with.

    Args:
        calibration: a result of ``calibrate``.
        method: "absmax" takes the largest value seen; "average" the moving average of the batches' absmax; "percentile" clips the
            largest; "mse" has the least squared error; "entropy" the least Kullback-Leibler divergence of the quantized distribution
            (Migacz, 2017).
        percentile: of the magnitudes, for that method.

    Returns:
        A float32 scale, one number, by path.

    Raises:
        ValueError: an unknown method, or a percentile that is not in (0, 100].

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model, x = nn.Linear(8, 4), torch.linspace(-1, 1, 32).view(4, 8)
        >>> stats = calibrate(quantize(model), dict(model.named_parameters()), [x], progress=False)
        >>> {name: round(float(scale) * 127, 3) for name, scale in scales(stats, "absmax").items()}
        {'weight': 1.0}

    """
    if method not in METHODS:
        raise ValueError(f"scales: method is {method!r}; it must be one of {', '.join(map(repr, METHODS))}")
    if not 0 < percentile <= 100:
        raise ValueError(f"scales: percentile is {percentile!r}; a number above 0, up to 100, is needed")
    tops = {path: _top(stats, method, percentile) for path, stats in calibration.items()}
    return {path: torch.where(top > 0, top, torch.ones_like(top)).float() / 127 for path, top in tops.items()}


def with_scales(params: Any, static: Mapping[str, Tensor]) -> Any:
    """Parameters with static scales of the activations, for a rule with ``activation=Quant(scale="static")``.

    Args:
        params: packed parameters, whose QTensors take the scales, or float ones, whose weights become ``Conditioned``: what trains, and
            what ``pack`` leaves in float.
        static: scales by path, as ``scales`` returns them.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: a scale that is not one positive number, or one of a path that params do not have.

    Examples:
        >>> with_scales({"w": torch.ones(2, 3)}, {"w": torch.tensor(0.5)})
        {'w': Conditioned(2x3 torch.float32, static activation scale)}

    """
    grouped = is_grouped(params, static)
    foreign = sorted(set(static) - set(weights_of(params, grouped)))
    if foreign:
        raise ValueError(f"with_scales: {foreign[0]!r} is not in params; are the scales of another model?")

    def give(path: str, leaf: Any) -> Any:
        scale = static.get(path)
        if scale is None:
            return leaf
        inner = leaf.weight if isinstance(leaf, Conditioned) else leaf
        if isinstance(inner, QTensor):
            inner = inner.with_activation_scale(scale)
            return dataclasses.replace(leaf, weight=inner) if isinstance(leaf, Conditioned) else inner
        outer = leaf if isinstance(leaf, Conditioned) else Conditioned(leaf)
        return dataclasses.replace(outer, activation_scale=check_scale(scale, inner.device))

    return map_leaves(give, params, grouped)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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


def refuse_packed(params: Any, name: str) -> None:
    """Raise for parameters that are packed.

    Raises:
        ValueError: a leaf is packed.

    """

    def look(path: str, leaf: Any) -> None:
        if is_packed(leaf):
            raise ValueError(f"{name}: {path!r} is packed; give the float parameters, and pack what comes back")

    map_leaves(look, params)


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


class _Looking(Looks):
    def __init__(self, rules: Policy, stats: Calibration) -> None:
        super().__init__(rules)
        self.stats = stats
        self._batch: Calibration = {}  # what this batch showed, of all calls of a weight together

    def start(self) -> None:
        super().start()
        for path, new in self._batch.items():
            old = self.stats.get(path)
            if old is None:
                self.stats[path] = new
                continue
            if old.channels.shape != new.channels.shape:
                found = f"{new.channels.numel()} channels, and {old.channels.numel()} in state"
                raise ValueError(f"calibrate: {path} meets {found}; are the statistics of another model?")
            self.stats[path] = _added(old, new)._replace(moving=old.moving.to(new.moving.device) * 0.9 + new.moving * 0.1)
        self._batch = {}

    def convolve(self, call: Convolution, weight: Operand, float_call: Callable[[], Any]) -> Any:
        rule = self.rules.match(weight.path, "conv")
        if weight.path and rule is not None and rule.weight is not None:
            seen = Seen(weight.path, OF_CONVOLUTION, rule)
            self.seen.setdefault(weight.path, seen)
            self.look(seen, call.x.detach().movedim(-1 - call.dims, -1))
        return super().convolve(call, weight, float_call)

    def look(self, seen: Seen, x: Tensor) -> None:
        a = x.reshape(-1, x.shape[-1]).abs().float()
        if not bool(a.isfinite().all()):
            raise ValueError(f"calibrate: what meets {seen.path} is not finite; look for NaN and infinity in inputs and weights")
        if not len(a):
            return
        counts = torch.bincount((a.contiguous().view(torch.int32) >> 16).flatten(), minlength=BINS)
        channels, one = a.amax(0), torch.ones((), dtype=torch.int64, device=a.device)
        new = Statistics(counts, channels, a.sum(0), one * len(a), channels.max(), one, one * seen.axis)
        old = self._batch.get(seen.path)
        if old is not None:
            new = _added(old, new)._replace(moving=torch.maximum(old.moving, new.moving), batches=one)
        self._batch[seen.path] = new


def _edges(device: torch.device) -> Tensor:
    """(BINS + 1,) magnitudes where bins begin."""
    bits = torch.arange(BINS + 1, dtype=torch.int32, device=device) << 16
    return bits.view(torch.float32).clamp(max=torch.finfo(torch.float32).max).double()


def _top(stats: Statistics, method: str, percentile: float) -> Tensor:
    """The magnitude of code 127."""
    if method == "absmax":
        return stats.absmax
    if method == "average":
        return stats.moving
    edges, counts = _edges(stats.counts.device), stats.counts.double()
    last = int(counts.nonzero().max()) if bool(counts.any()) else 0
    if last == 0:  # nothing but zeros
        return stats.absmax
    if method == "percentile":
        below = counts.cumsum(0) < percentile / 100 * counts.sum()
        return torch.minimum(edges[min(int(below.sum()), last) + 1], stats.absmax.double())
    middles = (edges[:-1] + edges[1:]) / 2
    errors = _squared_error if method == "mse" else _divergence
    # from the largest magnitude down to 1/16 of it, in steps of 3%
    tops = [edges[i + 1] for i in range(last, max(last - 4 * 128, 0), -4)]
    found = torch.stack([errors(counts, middles, float(top)) for top in tops])
    return torch.minimum(tops[int(found.argmin())], stats.absmax.double())


def _squared_error(counts: Tensor, middles: Tensor, top: float) -> Tensor:
    """Of values within half a step their own square, within the range a step's variance, beyond it what is clipped."""
    step = top / 127
    error = torch.where(middles >= top, (middles - top).square(), step * step / 12)
    return (counts * torch.where(middles < step / 2, middles.square(), error)).sum()


def _divergence(counts: Tensor, middles: Tensor, top: float) -> Tensor:
    """KL of what is clipped at ``top`` from its 128 levels, each spread evenly over the magnitudes that were seen in it."""
    counts = counts * (torch.arange(BINS, device=counts.device) > 0)  # zeros, which lose nothing
    if not bool(counts.any()):
        return counts.sum()
    inside = middles <= top
    p = torch.where(inside, counts, 0.0)
    end = int(inside.sum()) - 1
    levels = (middles[: end + 1] / (top / 127)).round().long().clamp(max=127)
    p, filled = p[: end + 1], (p[: end + 1] > 0) * middles[: end + 1]  # a bin's width is a share of its middle
    mass = torch.zeros(128, dtype=p.dtype, device=p.device).index_add(0, levels, p)
    widths = torch.zeros_like(mass).index_add(0, levels, filled)
    q = (mass / torch.where(widths > 0, widths, 1.0))[levels] * filled
    p = p.clone()
    p[end] += counts[end + 1 :].sum()
    p, q = p / p.sum(), q / q.sum()
    return torch.where(p > 0, p * (p / q.clamp(min=math.exp(-50))).log(), 0.0).sum()
