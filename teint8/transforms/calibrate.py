"""``calibrate``: statistics of what meets the weights, which add up."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8.policy import Policy
from teint8.transforms.convolutions import Convolution
from teint8.transforms.looks import Looks, Seen, look_at
from teint8.transforms.operands import Operand
from teint8.transforms.quantize import quantized

BINS = 255 * 128
"""Bins of the histogram: 128 an octave of |x|, by the bits of float32, of all finite numbers: those of all machines are the same."""

OF_CONVOLUTION = -3
"""``Statistics.axis`` of what meets the weight of a convolution: its channels are those of the image."""


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
        >>> from teint8 import pack, quantize, scales, with_scales, Policy, Quant, Rule
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
