"""``sensitivity`` and ``search``: which layers lose most in INT8, and a policy that keeps those in float which a budget allows."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from tqdm import tqdm

from teint8.conditioning import Conditioned
from teint8.policy import Policy, Rule, glob
from teint8.transforms.looks import Looks, Seen, examples_of, refuse_packed
from teint8.transforms.pack import pack, pack_weight
from teint8.transforms.quantize import BoundRoute, of_module, quantize, quantized, run
from teint8.transforms.trees import map_leaves, weights_of

METHODS = ("hessian", "taylor", "loss", "sqnr")
_PROBES = 4


def sensitivity(
    qfn: Any,
    params: Any,
    batches: Iterable[Any],
    method: str = "hessian",
    *,
    loss: Callable[..., Tensor] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """How much each linear loses in INT8, largest first: what to keep in float. Convolutions are not ranked.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters.
        batches: example inputs, as for ``calibrate``; a few are enough.
        method: "hessian": the mean of the Hessian's diagonal times the squared error of the rounded weight (HAWQ-V2, Dong et al.,
            2020), the trace by four Hessian-vector products for each layer through the function (jvp of grad) with random signs, always
            the same. "taylor": what rounding its weight adds in second order, ``d^T H d / 2`` with
            d = w_hat - w: a product for each layer. "loss": the loss that quantizing this layer alone adds. "sqnr": the noise of
            its own output, to its signal.
        loss: ``loss(output, *args, **kwargs)``, a scalar, of the output and the batch's arguments; unless given, the mean squared
            distance to the float output, to its mean square.
        progress: show a progress bar.

    Returns:
        By the path of each weight that the policy quantizes a number, the largest first.

    Raises:
        TypeError: one tensor as batches.
        ValueError: an unknown method, packed parameters, no batches, or nothing quantized.

    Examples:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(64, 32)
        >>> with torch.no_grad():
        ...     model[2].weight[:, 3] *= 100
        >>> list(sensitivity(quantize(model), dict(model.named_parameters()), [x], progress=False))
        ['2.weight', '0.weight']

    """
    if method not in METHODS:
        raise ValueError(f"sensitivity: method is {method!r}; it must be one of {', '.join(map(repr, METHODS))}")
    examples = examples_of(qfn, batches, "sensitivity")
    refuse_packed(params, "sensitivity")
    work = _Work(qfn, quantize(quantized(qfn), Policy()), params, loss)
    score = {"sqnr": _noise, "loss": _added_loss, "taylor": _taylor, "hessian": _traces}[method]
    found: dict[str, float] = {}
    total = len(batches) if isinstance(batches, Sized) else None
    for count, (args, kwargs) in enumerate(tqdm(examples, f"sensitivity: {method}", total, disable=not progress)):
        if not work.seen:
            work.see(args, kwargs)
        for path, value in tqdm(score(work, args, kwargs), "layers", len(work.seen), leave=False, disable=not progress):
            found[path] = (found.get(path, 0.0) * count + value) / (count + 1)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def search(
    qfn: Any, params: Any, scores: dict[str, float], *args: Any, nbytes: int | None = None, share: float | None = None, **kwargs: Any
) -> Policy:
    """A policy for a budget of bytes: the layers that gain most for a byte stay in float, before the rules of ``qfn``.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters.
        scores: a result of ``sensitivity``.
        args, kwargs: example inputs, as ``pack`` takes them.
        nbytes: of all these weights together at most; or
        share: of the bytes between all in INT8 (0) and all in float (1).

    Returns:
        A Policy of readable rules: one for each layer in float, then those of ``qfn``.

    Raises:
        ValueError: neither or both budgets, one below what INT8 takes, or scores of another model.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> search(quantize(model), dict(model.named_parameters()), {"2.weight": 9.0, "0.weight": 1.0}, share=0.5)
        Policy([
            Rule('2.weight', weight=None),
            Rule('*'),
        ])

    """
    leaves = weights_of(params, of_module(qfn))
    foreign = sorted(set(scores) - set(leaves))
    if foreign:
        raise ValueError(f"search: scores are of {foreign[0]!r}, which params do not have; are they of another model?")
    if (nbytes is None) == (share is None) or not 0 <= (share or 0) <= 1:
        raise ValueError(f"search: nbytes is {nbytes!r} and share {share!r}; one of them is needed, a share from 0 to 1")
    in_int8 = weights_of(pack(qfn, params, *args, **kwargs), of_module(qfn))
    packed = {path: in_int8[path].nbytes for path in scores}
    more = {path: leaves[path].nbytes - packed[path] for path in scores}
    least = sum(packed.values())
    left = int((share or 0) * sum(more.values())) if nbytes is None else nbytes - least
    if left < 0:
        raise ValueError(f"search: nbytes is {nbytes}; in INT8 these weights take {least}")
    kept = []
    for path in sorted(scores, key=lambda p: -scores[p] / max(more[p], 1)):
        if scores[path] > 0 and more[path] <= left:
            kept.append(path)
            left -= more[path]
    in_order = [path for path in leaves if path in kept]
    return Policy([*(Rule(path, weight=None) for path in in_order), *qfn.policy.rules])


class _Work:
    """What every method starts from: the function, also in float, its parameters, the loss; and what is quantized of it.

    Attributes:
        seen: by path each weight's rule and contracted dimension.
        signs: random ones, others for each batch.

    """

    def __init__(self, qfn: Any, in_float: Any, params: Any, loss: Any) -> None:
        self.qfn, self.in_float, self.params, self.loss = qfn, in_float, params, loss
        self.seen: dict[str, Seen] = {}
        self.signs = torch.Generator().manual_seed(0)

    def see(self, args: Any, kwargs: Any) -> None:
        """Run in float to find what is quantized."""
        route = Looks(self.qfn.policy)
        with torch.no_grad():
            run(self.qfn, route, self.params, args, kwargs)
        if not route.seen:
            raise ValueError(f"sensitivity: no linear or matmul by a weight is quantized by {self.qfn.policy!r}")
        self.seen = route.seen

    def loss_of(self, args: Any, kwargs: Any) -> Callable[[Any], Tensor]:
        """The loss of an output."""
        return _loss_of(self.in_float, self.params, args, kwargs, self.loss)

    def errors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weights, and what rounding does to them; conditioned ones in the model's own basis."""
        leaves, found = weights_of(self.params, of_module(self.qfn)), {}
        for path, seen in self.seen.items():
            how = "row" if seen.rule.weight is None else seen.rule.weight.grouping
            leaf = leaves[path]
            outer = leaf if isinstance(leaf, Conditioned) else Conditioned(leaf)
            w = outer.weight.detach()  # type: ignore[union-attr]
            packed = outer.packed(lambda v, seen=seen, how=how: pack_weight(v, seen.axis, how))
            found[path] = w, packed.dequantize().detach().to(w.dtype) - w
        return found

    def at(self, weights: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The float output with these weights."""

        def give(path: str, leaf: Any) -> Any:
            if path not in weights:
                return leaf
            return dataclasses.replace(leaf, weight=weights[path], checked=False) if isinstance(leaf, Conditioned) else weights[path]

        return self.in_float(map_leaves(give, self.params, of_module(self.qfn)), *args, **kwargs)

    def only(self, path: str) -> Policy:
        """The rules of the policy for one path alone."""
        module = path.rpartition(".")[0]
        rules = [rule for rule in self.qfn.policy.rules if glob(rule.path, path) or glob(rule.path, module)]
        return Policy([dataclasses.replace(rule, path=path) for rule in rules])


def _loss_of(in_float: Any, params: Any, args: Any, kwargs: Any, loss: Any) -> Callable[[Any], Tensor]:
    """A loss of an output."""
    if loss is not None:
        return lambda y: loss(y, *args, **kwargs)
    with torch.no_grad():
        want = _tensors(in_float(params, *args, **kwargs))
    power = max(sum(float(t.square().sum()) for t in want), 1e-30)

    def distance(y: Any) -> Tensor:
        parts = [(a.float() - b).square().sum() for a, b in zip(_tensors(y, raw=True), want, strict=True)]
        return sum(parts[1:], parts[0]) / power

    return distance


def _tensors(y: Any, raw: bool = False) -> list[Tensor]:
    """The float tensors of an output, in order."""
    found = [t for t in torch_pytree.tree_leaves(_plain(y)) if isinstance(t, Tensor) and t.is_floating_point()]
    return found if raw else [t.detach().float() for t in found]


def _plain(y: Any) -> Any:
    """Outputs of transformers are dicts by another name."""
    return dict(y) if isinstance(y, dict) else y


def _noise(work: _Work, args: Any, kwargs: Any) -> Iterator[tuple[str, float]]:
    route = _Comparing(work.qfn.policy)
    with torch.no_grad():
        run(work.qfn, route, work.params, args, kwargs)
    for path in work.seen:
        noise, signal = route.sums.get(path, (0.0, 1.0))
        yield path, noise / max(signal, 1e-30)


class _Comparing(BoundRoute):
    """Runs a program in float, and each call in INT8 too."""

    def __init__(self, rules: Policy) -> None:
        super().__init__(Policy(), False, None)
        self.rules = rules
        self.sums: dict[str, tuple[float, float]] = {}
        self._inside = False

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        exact = super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        rule = self.rules.match(weight.path, op)
        if weight.path and weight.conditioning is None and rule is not None and rule.weight is not None:
            self.policy = self.rules
            y = super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
            self.policy = Policy()
            noise, signal = self.sums.get(weight.path, (0.0, 0.0))
            off = (y - exact).double()
            self.sums[weight.path] = noise + float(off.square().sum()), signal + float(exact.double().square().sum())
        return exact


def _added_loss(work: _Work, args: Any, kwargs: Any) -> Iterator[tuple[str, float]]:
    of = work.loss_of(args, kwargs)
    with torch.no_grad():
        base = float(of(work.in_float(work.params, *args, **kwargs)))
        for path in work.seen:
            alone = quantize(quantized(work.qfn), work.only(path))
            yield path, float(of(alone(work.params, *args, **kwargs))) - base


def _taylor(work: _Work, args: Any, kwargs: Any) -> Iterator[tuple[str, float]]:
    of = work.loss_of(args, kwargs)
    for path, (w, error) in work.errors().items():
        yield path, _curvature(work, of, path, w, error, args, kwargs) / 2


def _signs(work: _Work, w: Tensor) -> Tensor:
    """-1 and 1 at random, like w."""
    return (torch.randint(2, w.shape, generator=work.signs, device=work.signs.device) * 2 - 1).to(w)


def _traces(work: _Work, args: Any, kwargs: Any) -> Iterator[tuple[str, float]]:
    of = work.loss_of(args, kwargs)
    for path, (w, error) in work.errors().items():
        # of one layer alone: in a product of all at once, what a sensitive layer shares with another can hide the other's trace
        found = [_curvature(work, of, path, w, _signs(work, w), args, kwargs) for _ in range(_PROBES)]
        off = float(error.square().sum())
        yield path, max(sum(found) / _PROBES, 0.0) / w.numel() * off if off else 0.0


def _curvature(work: _Work, of: Callable[[Any], Tensor], path: str, w: Tensor, d: Tensor, args: Any, kwargs: Any) -> float:
    """``d^T H d``, H the Hessian of the loss by one weight; infinity where that is not finite."""

    def at(v: Tensor) -> Tensor:
        return of(work.at({path: v}, args, kwargs))

    product = torch.func.jvp(torch.func.grad(at), (w,), (d,))[1]
    value = float((d * product).sum())
    return value if math.isfinite(value) else math.inf
