"""``gptq``, ``adaround`` and ``awq``: weights rounded with a view to the activations that they will meet."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from teint8.conditioning import Conditioned, power_of_two
from teint8.policy import Policy
from teint8.qtensor import QTensor
from teint8.transforms.looks import Looks, Seen, look_at, refuse_packed
from teint8.transforms.pack import pack, pack_weight
from teint8.transforms.quantize import of_module, quantized
from teint8.transforms.trees import map_leaves, weights_of


class Moment(NamedTuple):
    """Of the activation that meets a weight: the mean of x^T x, float32 (K, K), half the Hessian of the squared error.

    Attributes:
        mean: it.
        axis: int64 (), the dimension of the weight that meets it: -1 as in nn.Linear, -2 in ``x @ w``; 0 where both occur.

    """

    mean: Tensor
    axis: Tensor


Moments = dict[str, Moment]
"""By a weight's path."""


def second_moments(qfn: Any, params: Any, batches: Iterable[Any], *, progress: bool = True) -> Moments:
    """The mean of x^T x of the activation of each weight that the policy quantizes, which ``gptq``, ``adaround`` and ``awq`` take.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters, conditioned ones too.
        batches: example inputs, as for ``calibrate``; more rows than features.
        progress: show a progress bar.

    Returns:
        A Moment by path: ``mean`` float32 (K, K), and the ``axis`` of the weight that meets it.

    Raises:
        TypeError, ValueError: as ``calibrate``.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model = nn.Linear(2, 4)
        >>> second_moments(quantize(model), dict(model.named_parameters()), [torch.eye(2)], progress=False)["weight"].mean
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])

    """
    quantized(qfn)
    route = _Gathering(qfn.policy)
    look_at(route, qfn, params, batches, "second_moments", progress)
    axes = {path: torch.tensor(axis, device=route.sums[path].device) for path, axis in route.axes.items()}
    return {path: Moment(total / max(route.rows[path], 1), axes[path]) for path, total in route.sums.items()}


class _Gathering(Looks):
    def __init__(self, rules: Policy) -> None:
        super().__init__(rules)
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.axes: dict[str, int] = {}

    def look(self, seen: Seen, x: Tensor) -> None:
        a, path = x.reshape(-1, x.shape[-1]).float(), seen.path
        if not bool(a.isfinite().all()):
            raise ValueError(f"second_moments: what meets {path} is not finite; look for NaN and infinity in inputs and weights")
        known = self.sums.get(path)
        self.sums[path] = a.mT @ a if known is None else known + a.mT @ a
        self.rows[path] = self.rows.get(path, 0) + len(a)
        self.axes[path] = seen.axis if self.axes.get(path, seen.axis) == seen.axis else 0


def gptq(qfn: Any, params: Any, moments: Moments, *args: Any, damping: float = 0.01, progress: bool = True, **kwargs: Any) -> Any:
    """Packed parameters whose codes make the layers' outputs, not the weights, least wrong: GPTQ (Frantar et al., 2023).

    Channel after channel of K is rounded, and the channels that follow take up the error that it makes on the activations. Scales are
    those of ``pack``. With a scale for each output channel an INT8 grid is so fine that little is gained; with blocks or one scale
    in all it is more.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters.
        moments: a result of ``second_moments`` with these parameters; weights that are not in it are packed to nearest.
        args, kwargs: example inputs, as ``pack`` takes them.
        damping: what is added to the diagonal, as a share of its mean.
        progress: show a progress bar.

    Returns:
        A tree of the same structure, its quantized weights QTensors.

    Raises:
        TypeError: moments that ``second_moments`` did not make.
        ValueError: moments of another model.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize, Policy, Quant, Rule
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(64, 32), torch.randn(256, 64) @ torch.randn(64, 64)
        >>> qfn, params = quantize(model, Policy([Rule(weight=Quant("tensor"))])), dict(model.named_parameters())
        >>> better = gptq(qfn, params, second_moments(qfn, params, [x], progress=False), progress=False)["weight"]
        >>> plain = QTensor.quantize(model.weight, granularity="tensor")
        >>> error = lambda q: float((x @ (q.dequantize() - model.weight.detach()).t()).norm())
        >>> error(better) < 0.8 * error(plain)
        True

    """
    return _rounded(qfn, params, moments, args, kwargs, "gptq", progress, lambda w, q, h: _gptq(w, q, _damped(h, damping)))


def adaround(qfn: Any, params: Any, moments: Moments, *args: Any, sweeps: int = 8, progress: bool = True, **kwargs: Any) -> Any:
    """Packed parameters of which each weight is rounded up or down as makes its layer's output least wrong.

    The objective is AdaRound's (Nagel et al., 2020), the squared error on the activations over all choices of floor and ceiling; it is
    descended coordinate by coordinate, exactly, with no learning rate: the error never grows.

    Args:
        qfn, params, moments, args, kwargs, progress: as for ``gptq``.
        sweeps: over all channels, at most; it ends where nothing changes.

    Returns:
        A tree of the same structure, its quantized weights QTensors.

    Raises:
        TypeError: moments that ``second_moments`` did not make.
        ValueError: moments of another model.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(64, 32), torch.randn(256, 64) @ torch.randn(64, 64)
        >>> qfn, params = quantize(model), dict(model.named_parameters())
        >>> better = adaround(qfn, params, second_moments(qfn, params, [x], progress=False), progress=False)["weight"]
        >>> error = lambda q: float((x @ (q.dequantize() - model.weight.detach()).t()).norm())
        >>> error(better) < 0.8 * error(QTensor.quantize(model.weight.detach()))
        True

    """
    return _rounded(qfn, params, moments, args, kwargs, "adaround", progress, lambda w, q, h: _descend(w, q, h, sweeps))


def awq(qfn: Any, params: Any, moments: Moments, *, progress: bool = True) -> Any:
    """Parameters of the same function, smoothed so that rounding the *weights* costs the outputs least (AWQ, Lin et al., 2024).

    Channel k of the activation is divided by ``rms(x_k)^alpha``, rounded to a power of two; alpha is the best of 0, 0.1, ... 1 for each
    weight by the error that its rounding makes on the activations.

    Args:
        qfn: a result of ``quantize``; its policy's granularity of weights is what is searched for.
        params: its float parameters; what is conditioned already stays so.
        moments: a result of ``second_moments`` with these parameters.
        progress: show a progress bar.

    Returns:
        The tree with ``Conditioned`` leaves where an alpha above 0 was best; weights that are not (N, K) as nn.Linear has them stay.

    Raises:
        TypeError: moments that ``second_moments`` did not make.
        ValueError: packed parameters, or moments of another model.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(64, 32), torch.randn(256, 64)
        >>> x[:, 7] *= 100
        >>> model.weight.data[:, 7] *= 0.05
        >>> qfn, params = quantize(model), dict(model.named_parameters())
        >>> awq(qfn, params, second_moments(qfn, params, [x], progress=False), progress=False)["weight"]
        Conditioned(32x64 torch.float32, smoothed)

    """
    refuse_packed(params, "awq")
    leaves = _leaves(qfn, params, moments, "awq")
    new: dict[str, Any] = {}
    for path, moment in tqdm(moments.items(), "awq", disable=not progress):
        w = leaves[path]
        rule = next(
            (r for r in (qfn.policy.match(path, op) for op in ("linear", "matmul")) if r is not None and r.weight is not None), None
        )
        if isinstance(w, Conditioned) or rule is None or rule.weight is None or int(moment.axis) != -1:
            continue
        rms = moment.mean.diagonal().clamp(min=0).sqrt()
        middle = rms[rms > 0].log().mean().exp() if bool((rms > 0).any()) else rms.new_ones(())
        best = (float(_error(w, pack_weight(w, -1, rule.weight.grouping).dequantize(), moment.mean)), None)
        for tenth in range(1, 11):
            factor = power_of_two(torch.where(rms > 0, (rms / middle) ** (tenth / 10), 1.0).to(w.device))
            found = Conditioned(w.detach(), smoothing=factor).packed(lambda v, how=rule.weight.grouping: pack_weight(v, -1, how))
            error = float(_error(w, found.dequantize(), moment.mean))
            best = (error, factor) if error < best[0] else best
        if best[1] is not None:
            new[path] = Conditioned(w, smoothing=best[1])
    return map_leaves(lambda path, leaf: new.get(path, leaf), params, of_module(qfn))


def _leaves(qfn: Any, params: Any, moments: Moments, name: str) -> dict[str, Any]:
    leaves = weights_of(params, of_module(qfn))
    foreign = sorted(set(moments) - set(leaves))
    if foreign:
        raise ValueError(f"{name}: moments are of {foreign[0]!r}, which params do not have; are they of another model?")
    strange = next((type(m).__name__ for m in moments.values() if not isinstance(m, Moment)), None)
    if strange is not None:
        raise TypeError(f"{name}: moments holds a {strange}; {name} takes what second_moments(qfn, params, batches) returns")
    return leaves


def _rounded(
    qfn: Any, params: Any, moments: Moments, args: Any, kwargs: Any, name: str, progress: bool,
    make: Callable[[Tensor, QTensor, Tensor], Tensor],
) -> Any:  # fmt: skip
    """What ``pack`` returns, with codes (N, K) that ``make`` gives for a weight, its packed form and its moment."""
    refuse_packed(params, name)
    floats, packed, new = _leaves(qfn, params, moments, name), pack(qfn, params, *args, **kwargs), {}
    leaves = weights_of(packed, of_module(qfn))
    for path, moment in tqdm(moments.items(), name, disable=not progress):
        leaf, w = leaves[path], floats[path]
        q = leaf.weight if isinstance(leaf, Conditioned) else leaf
        if not isinstance(q, QTensor) or q.ndim != 2:
            continue
        rows = (w.conditioned() if isinstance(w, Conditioned) else w).detach().float()
        rows = rows if q.axis == -1 else rows.mT
        if rows.shape[-1] != len(moment.mean):
            raise ValueError(f"{name}: {path} has {rows.shape[-1]} features and its moment {len(moment.mean)}; is it of another model?")
        codes = make(rows, q, moment.mean.to(rows.device))
        q = dataclasses.replace(q, codes=(codes if q.axis == -1 else codes.mT).to(torch.int8))
        new[path] = dataclasses.replace(leaf, weight=q) if isinstance(leaf, Conditioned) else q
    return map_leaves(lambda path, leaf: new.get(path, leaf), packed, of_module(qfn))


def _steps(q: QTensor) -> Tensor:
    """(N, K): the scale of each weight."""
    scale = q.scale if q.axis == -1 else q.scale.mT
    n, k = q.shape if q.axis == -1 else q.shape[::-1]
    return scale.repeat_interleave(q.block, -1)[:, :k] if q.block else scale.expand(n, k)


def _damped(moment: Tensor, damping: float) -> Tensor:
    diagonal = moment.diagonal()
    return moment + torch.diag_embed((damping * diagonal.mean()).clamp(min=1e-12) + (diagonal == 0) * diagonal.mean().clamp(min=1e-12))


def _gptq(w: Tensor, q: QTensor, moment: Tensor) -> Tensor:
    steps = _steps(q)
    safe = torch.where(steps > 0, steps, 1.0)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment.double())), upper=True).float()
    w, codes = w.clone(), torch.zeros_like(w)
    for start in range(0, w.shape[1], 128):  # what lies behind a block takes up its errors at once
        stop = min(start + 128, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for k in range(start, stop):
            codes[:, k] = torch.where(steps[:, k] > 0, (w[:, k] / safe[:, k]).round().clamp(-127, 127), 0.0)
            error = (w[:, k] - codes[:, k] * steps[:, k]) / inverse[k, k]
            w[:, k:stop] -= error[:, None] * inverse[k, k:stop]
            errors[:, k - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes


def _descend(w: Tensor, q: QTensor, moment: Tensor, sweeps: int) -> Tensor:
    steps = _steps(q)
    safe = torch.where(steps > 0, steps, 1.0)
    exact = torch.where(steps > 0, w / safe, 0.0)
    low, high = exact.floor().clamp(-127, 127), exact.ceil().clamp(-127, 127)
    codes = (q.codes if q.axis == -1 else q.codes.mT).float()
    slope = (codes * steps - w) @ moment
    curvature = moment.diagonal()
    per_step = torch.where(curvature > 0, curvature, math.inf) * safe  # of a channel that is never seen nothing moves
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, w.shape[1], 128):  # what a block moves is told to the others at once
            stop = min(start + 128, w.shape[1])
            moves = torch.zeros_like(w[:, start:stop])
            own = slope[:, start:stop].clone()
            for k in range(start, stop):
                new = (codes[:, k] - own[:, k - start] / per_step[:, k]).round()
                new = torch.minimum(torch.maximum(new, low[:, k]), high[:, k])
                move = (new - codes[:, k]) * steps[:, k]
                own += move[:, None] * moment[k, start:stop]
                moves[:, k - start], codes[:, k] = move, new
            slope += moves @ moment[start:stop]
        if torch.equal(codes, before):
            break
    return codes


def _error(w: Tensor, other: Tensor, moment: Tensor) -> Tensor:
    """The mean squared error of a layer's output, summed over its channels."""
    d = (other - w.detach()).float()
    return ((d @ moment.to(d.device)) * d).sum()
