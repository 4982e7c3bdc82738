"""``scales`` and ``with_scales``: static scales of activations from their statistics."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from teint8.conditioning import Conditioned
from teint8.qtensor import QTensor, check_scale
from teint8.transforms.calibrate import BINS, Calibration, Statistics
from teint8.transforms.trees import is_grouped, map_leaves, weights_of

METHODS = ("absmax", "average", "percentile", "mse", "entropy")


def _edges(device: torch.device) -> Tensor:
    """(BINS + 1,) magnitudes where bins begin."""
    bits = torch.arange(BINS + 1, dtype=torch.int32, device=device) << 16
    return bits.view(torch.float32).clamp(max=torch.finfo(torch.float32).max).double()


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
        >>> from teint8 import calibrate, quantize
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
