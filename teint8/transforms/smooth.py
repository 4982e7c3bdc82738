"""``smooth``, ``rotate`` and ``keep_outliers``: activations without the few channels that are far larger than the rest."""

import dataclasses
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor

from teint8 import _torch
from teint8.conditioning import Conditioned, largest_block, power_of_two
from teint8.policy import Policy
from teint8.transforms.calibrate import OF_CONVOLUTION, Calibration
from teint8.transforms.looks import refuse_packed
from teint8.transforms.pack import uses_of
from teint8.transforms.quantize import BoundRoute, looks, of_module, run
from teint8.transforms.trees import map_leaves, weights_of


def smooth(qfn: Any, params: Any, calibration: Calibration, *args: Any, alpha: float = 0.5, **kwargs: Any) -> Any:
    """Parameters of the same function, in which large channels of an activation are made smaller, and their weights larger.

    Channel k of x is divided by ``max |x_k|^alpha / max |w_k|^(1 - alpha)`` (SmoothQuant, Xiao et al., 2023), rounded to a power of
    two, which rounds no value. Given example inputs it is folded, at no cost, into what makes x: the weight and bias of a norm whose
    output linears alone take, or the linear whose output is the factor of a gate (``act(g) * u``: the rows of u's weight). Elsewhere
    the weight becomes a ``Conditioned``, and x is divided before it is quantized.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters; what is conditioned already stays so.
        calibration: a result of ``calibrate`` with these parameters; only weights in it are smoothed.
        args, kwargs: example inputs, for an abstract run that finds what may be folded.
        alpha: 0 leaves the activation as it is, 1 makes all channels equally large; 0.5 shares the difficulty.

    Returns:
        The tree with new leaves, which ``qfn``, ``calibrate`` and ``pack`` take in place of ``params``.

    Raises:
        ValueError: packed parameters, alpha not in [0, 1], or statistics of another model.

    Examples:
        >>> from torch import nn
        >>> from teint8 import calibrate, quantize
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
        >>> qfn, params, x = quantize(model), dict(model.named_parameters()), torch.randn(16, 8)
        >>> folded = smooth(qfn, params, calibrate(qfn, params, [x], progress=False), x)
        >>> torch.allclose(torch.func.functional_call(model, folded, (x,)), model(x), atol=1e-6)
        True

    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth: alpha is {alpha!r}; a number from 0 to 1 is needed")
    refuse_packed(params, "smooth")
    leaves = _conditionable(qfn, params, calibration, "smooth")
    chains = _chains(qfn, params, args, kwargs, leaves) if args or kwargs else []
    new: dict[str, Any] = {}
    for chain in chains:
        weights = [new.get(path, leaves[path]) for path in chain.consumers]
        factor = _factor(calibration[chain.consumers[0]].channels, weights, alpha)
        for path, weight in zip(chain.consumers, weights, strict=True):
            new[path] = weight.detach() * factor.to(weight.dtype)
        for path in chain.producers:
            maker = new.get(path, weights_of(params, of_module(qfn))[path]).detach()
            inverse = factor.reciprocal().to(maker.dtype)
            new[path] = maker * (inverse if maker.ndim == 1 else inverse[:, None])
    folded = {path for chain in chains for path in chain.consumers}
    for path, weight in leaves.items():
        if path not in folded:
            weight = new.get(path, weight)
            new[path] = Conditioned(weight, smoothing=_factor(calibration[path].channels, [weight], alpha))
    return map_leaves(lambda path, leaf: new.get(path, leaf), params, of_module(qfn))


def rotate(qfn: Any, params: Any, *args: Any, most: int = 1024, **kwargs: Any) -> Any:
    """Parameters of the same function, in which activations are rotated before they are quantized: an outlier becomes many small ones.

    Each block of channels is multiplied by a Hadamard matrix (QuaRot, Ashkboos et al., 2024), and so is the weight; the block is the
    largest power of two that divides K. It costs log2(block) additions a value, in float32, in the same order everywhere. Weights that
    ``smooth`` conditioned are rotated after that, which is the most exact way to INT8 that is known here.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters.
        args, kwargs: example inputs; for a function they are needed, and for a module whose layers are its own.
        most: the largest block.

    Returns:
        A tree of the same structure, its rotated weights ``Conditioned``.

    Raises:
        ValueError: packed parameters, or nothing to rotate: K has no block of 2.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model = nn.Linear(8, 4)
        >>> rotate(quantize(model), dict(model.named_parameters()))["weight"]
        Conditioned(4x8 torch.float32, rotated by 8)

    """
    refuse_packed(params, "rotate")
    new = {}
    for path, leaf in _by_rows(qfn, params, args, kwargs, "rotate").items():
        block = largest_block(leaf.shape[-1], most)
        if block > 1:
            new[path] = _with(leaf, rotation=block)
    if not new:
        raise ValueError("rotate: no linear has an even number of features; there is nothing to rotate")
    return map_leaves(lambda path, leaf: new.get(path, leaf), params, of_module(qfn))


def keep_outliers(qfn: Any, params: Any, calibration: Calibration, *, threshold: float = 6.0, most: int = 64) -> Any:
    """Parameters of the same function, in which the largest channels of activations stay in float (LLM.int8, Dettmers et al., 2022).

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters.
        calibration: a result of ``calibrate`` with these parameters.
        threshold: a channel is kept in float whose absmax is so many times the median channel's.
        most: channels of a layer at most, the largest first: each costs a float product.

    Returns:
        A tree of the same structure; a weight with outlier channels is ``Conditioned``, others are as they were.

    Raises:
        ValueError: packed parameters, statistics of another model, or a threshold below 1.

    Examples:
        >>> from torch import nn
        >>> from teint8 import calibrate, quantize
        >>> model, x = nn.Linear(8, 4), torch.ones(2, 8)
        >>> x[:, 3] = 50
        >>> qfn, params = quantize(model), dict(model.named_parameters())
        >>> keep_outliers(qfn, params, calibrate(qfn, params, [x], progress=False))["weight"].outliers
        (3,)

    """
    if threshold < 1:
        raise ValueError(f"keep_outliers: threshold is {threshold!r}; a number of at least 1 is needed")
    refuse_packed(params, "keep_outliers")
    new = {}
    for path, leaf in _conditionable(qfn, params, calibration, "keep_outliers").items():
        channels = calibration[path].channels
        order = channels.argsort(descending=True)[:most]
        found = sorted(int(c) for c in order[channels[order] > threshold * channels.median()])
        if found:
            new[path] = _with(leaf, outliers=tuple(found))
    return map_leaves(lambda path, leaf: new.get(path, leaf), params, of_module(qfn))


def _with(leaf: Any, **fields: Any) -> Conditioned:
    return dataclasses.replace(leaf if isinstance(leaf, Conditioned) else Conditioned(leaf), **fields)


def _factor(channels: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """(K,) powers of two by which the activation is divided; 1 where a channel is never used."""
    of_weight = torch.stack([w.detach().abs().amax(0).float() for w in weights]).amax(0)
    factor = channels.to(of_weight.device) ** alpha / of_weight ** (1 - alpha)
    return power_of_two(torch.where((factor > 0) & factor.isfinite(), factor, 1.0))


def _conditionable(qfn: Any, params: Any, calibration: Calibration, name: str) -> dict[str, Any]:
    """Leaves (N, K) that statistics are of."""
    leaves = weights_of(params, of_module(qfn))
    foreign = sorted(set(calibration) - set(leaves))
    if foreign:
        raise ValueError(f"{name}: calibration is of {foreign[0]!r}, which params do not have; is it of another model?")
    found = {path: leaves[path] for path, stats in calibration.items() if int(stats.axis) != OF_CONVOLUTION}
    for path, leaf in found.items():
        if leaf.ndim != 2 or calibration[path].channels.numel() not in leaf.shape:
            width = calibration[path].channels.numel()
            raise ValueError(f"{name}: {path} is {tuple(leaf.shape)}, and calibration saw {width} channels; is it of another model?")
    wrong = [path for path in found if int(calibration[path].axis) != -1]
    if wrong:
        kept = ", ".join(wrong[:3])
        warnings.warn(f"{name}: {kept}: these weights are not (N, K) as nn.Linear has them, and stay as they are", stacklevel=3)
    return {p: leaf for p, leaf in found.items() if p not in wrong and not (name == "smooth" and isinstance(leaf, Conditioned))}


def _by_rows(qfn: Any, params: Any, args: Any, kwargs: Any, name: str) -> dict[str, Any]:
    """Leaves (N, K) that the policy quantizes as weights of linears."""
    uses, leaves = uses_of(qfn, params, args, kwargs), weights_of(params, of_module(qfn))
    found = {path: leaves[path] for path, of in uses.items() if path in leaves and any(use is not None and use[0] == -1 for use in of)}
    return {path: leaf for path, leaf in found.items() if leaf.ndim == 2 and _is_linear(qfn, path)}


def _is_linear(qfn: Any, path: str) -> bool:
    if qfn.policy.match(path, "embedding") is not None:  # a table is looked up in its own basis
        return False
    return any(qfn.policy.match(path, op) is not None for op in ("linear", "matmul"))


class _Chain(NamedTuple):
    """Leaves that make a tensor, by output channel, and the weights of the linears that alone take it."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]


def _chains(qfn: Any, params: Any, args: Any, kwargs: Any, leaves: dict[str, Any]) -> list[_Chain]:
    fake_params, fake_args, fake_kwargs = _torch.to_fake((params, args, kwargs))
    route = _Follows()
    with _torch.abstract_run("smooth", fake_params, fake_args, fake_kwargs):
        route.use(run(qfn, route, fake_params, fake_args, fake_kwargs))
    return route.chains(set(leaves))


_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


class _Made(NamedTuple):
    """A tensor that a norm's parameters, a scale or a gate made, and the paths of the leaves whose channels it has."""

    output: Tensor
    leaves: tuple[str, ...]
    through: Tensor | None  # of a gate, the linear's output, which nothing else may use


class _Follows(BoundRoute):
    """Runs a program in float and notes what makes the tensors that linears take."""

    surveys = True

    def __init__(self) -> None:
        super().__init__(Policy(), False, None)
        self._made: list[_Made] = []
        self._outputs: list[_Made] = []  # of linears
        self._uses: dict[int, int] = {}
        self._taken: dict[int, list[str]] = {}  # by tensor, the weights of linears that take it
        self._alive: list[Tensor] = []  # so that no two tensors have one id

    def use(self, tree: Any) -> None:
        """Count a use of every tensor in a tree."""
        for leaf in torch_pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._alive.append(leaf)
                self._uses[id(leaf)] = self._uses.get(id(leaf), 0) + 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if looks(func):
            return super().__torch_function__(func, types, args, kwargs)
        self.use((args, kwargs))
        y = super().__torch_function__(func, types, args, kwargs)
        if func in (F.layer_norm, F.rms_norm):
            names = ("input", "normalized_shape", "weight", "bias")
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self._note(y, [given.get("weight"), given.get("bias")], None)
        elif func in _PRODUCTS and len(args) == 2 and isinstance(y, Tensor):
            self._product(y, *args)
        return y

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        y = super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        plain = axis == -1 and not weight.transposed and rows is None and ends is None and weight.conditioning is None
        if plain and weight.path:
            self._taken.setdefault(id(x), []).append(weight.path)
            known = self.known.get(bias) if isinstance(bias, Tensor) else None
            if isinstance(y, Tensor) and (bias is None or known is not None):
                self._outputs.append(_Made(y, (weight.path, *(() if known is None else (known.path,))), None))
        return y

    def _product(self, y: Tensor, a: Any, b: Any) -> None:
        for t in (a, b):
            known = self.known.get(t) if isinstance(t, Tensor) else None
            if known is not None and t.ndim == 1 and t.shape == y.shape[-1:]:
                self._note(y, [t], None)
                return
        for t in (a, b):
            linear = next((made for made in self._outputs if made.output is t), None)
            if linear is not None and t.shape == y.shape:
                self._made.append(_Made(y, linear.leaves, linear.output))
                return

    def _note(self, y: Any, parameters: list[Any], through: Tensor | None) -> None:
        known = [self.known.get(t) if t.ndim == 1 else None for t in parameters if isinstance(t, Tensor)]
        if known and all(k is not None for k in known):
            self._made.append(_Made(y, tuple(k.path for k in known if k is not None), through))

    def chains(self, smoothed: set[str]) -> list[_Chain]:
        """Those of whose tensors nothing but linears takes part, and whose leaves nothing else has."""
        found = []
        used: dict[str, int] = {}  # of a leaf: itself, and what it is called when it is transposed
        for t, operand in self.known.items():
            used[operand.path] = used.get(operand.path, 0) + self._uses.get(id(t), 0)
        for made in self._made:
            consumers = self._taken.get(id(made.output), [])
            alone = consumers and self._uses.get(id(made.output)) == len(consumers) == len(set(consumers))
            once = all(used[path] == 1 for path in (*made.leaves, *consumers))
            through = made.through is None or self._uses.get(id(made.through)) == 1
            if alone and once and through and set(consumers) <= smoothed:
                found.append(_Chain(made.leaves, tuple(consumers)))
        return found
