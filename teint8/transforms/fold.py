"""``fold_batchnorm``: the scale of a BatchNorm into the layer before it, parameters to parameters."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from teint8 import _torch
from teint8.policy import Policy
from teint8.qtensor import QTensor
from teint8.transforms.quantize import BoundRoute, call_module, check_params, looks, quantized

Tree = dict[str, Tensor]


def fold_batchnorm(qfn: Any, params: Any, *args: Any, **kwargs: Any) -> tuple[Tree, Tree]:
    """Parameters and buffers of the same values in eval mode, in which each BatchNorm behind a layer only adds.

    ``BN(W x + b) = (s W) x + s b + (beta - mean s)`` with ``s = gamma / sqrt(var + eps)`` (Jacob et al., 2018): the layer's weight and
    bias take ``s``, and the BatchNorm keeps the shift (its mean is 0 then, its variance 1, its gamma ``sqrt(1 + eps)``). Codes of
    weights with a scale for each output channel do not change, for that takes ``s`` in; with one scale in all they do, and for QAT
    the gradients meet the scale that serving has.

    Args:
        qfn: a result of ``quantize`` of a module.
        params: its float parameters by name, or (parameters, buffers).
        args, kwargs: example inputs, for an abstract run (shapes only, nothing is computed) that finds what follows what.

    Returns:
        (parameters, buffers), which ``qfn`` takes in place of ``params``; ``load_state_dict(parameters | buffers)`` takes them, too.

    Raises:
        TypeError: not a quantized module.
        ValueError: packed parameters, no inputs, or nothing to fold: a BatchNorm needs running
            statistics, and a layer before it whose output nothing else uses, and whose parameters nothing else has.

    Examples:
        >>> from teint8 import quantize
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> x, qfn = torch.randn(2, 3, 9, 9), quantize(model)
        >>> folded = fold_batchnorm(qfn, dict(model.named_parameters()), x)
        >>> torch.allclose(torch.func.functional_call(model, folded, (x,)), model(x), atol=1e-5)
        True

    """
    module = quantized(qfn)
    if not isinstance(module, nn.Module):
        raise TypeError(f"fold_batchnorm: {qfn.__name__} was made from a function; quantize a module")
    groups = params if isinstance(params, tuple) else (params, dict(module.named_buffers()))
    check_params(module, groups)
    packed = [name for group in groups for name, leaf in group.items() if isinstance(leaf, QTensor)]
    if packed:
        raise ValueError(f"fold_batchnorm: {packed[0]!r} is packed; give the float parameters, and pack what comes back")
    if not args and not kwargs:
        raise ValueError("fold_batchnorm: there are no inputs; give examples, such as fold_batchnorm(qfn, params, x)")
    tree = {name: leaf.detach() for group in groups for name, leaf in group.items()}
    pairs = _find(module, tree, args, kwargs)
    if not pairs:
        raise ValueError("fold_batchnorm: no BatchNorm with running statistics follows a layer whose output it alone uses")
    folded = dict(tree)
    for pair in pairs:
        folded |= pair.folded(tree)
    names = {name for name, _ in module.named_parameters()}
    return {n: t for n, t in folded.items() if n in names}, {n: t for n, t in folded.items() if n not in names}


class _Layer(NamedTuple):
    """A layer's output, and what made it: paths of its weight and bias, and which dimension of the weight its output channels are."""

    output: Tensor
    weight: str
    bias: str | None
    channels: int


class _Pair(NamedTuple):
    """A layer and the BatchNorm behind it, by paths."""

    layer: _Layer
    mean: str
    variance: str
    gamma: str
    beta: str
    eps: float

    def folded(self, tree: Tree) -> Tree:
        mean, variance, gamma, beta = (tree[path].double() for path in (self.mean, self.variance, self.gamma, self.beta))
        scale = gamma / (variance + self.eps).sqrt()
        weight = tree[self.layer.weight]
        shape = [1] * weight.ndim
        shape[self.layer.channels] = -1
        new = {
            self.layer.weight: weight.double() * scale.view(shape),
            self.mean: torch.zeros_like(mean),
            self.variance: torch.ones_like(variance),
            self.gamma: torch.full_like(gamma, 1 + self.eps).sqrt(),
            self.beta: beta - mean * scale,
        }
        if self.layer.bias is not None:
            new[self.layer.bias] = tree[self.layer.bias].double() * scale
        return {path: value.to(tree[path].dtype) for path, value in new.items()}


def _find(module: nn.Module, tree: Tree, args: Any, kwargs: Any) -> list[_Pair]:
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        fake_tree, fake_args, fake_kwargs = _torch.to_fake((tree, args, kwargs))
        route = _Follows()
        with _torch.abstract_run("fold_batchnorm", fake_tree, fake_args):
            route.use(call_module(module, route, fake_tree, fake_args, fake_kwargs))
    finally:
        for m, mode in training.items():
            m.training = mode
    return route.pairs()


class _Follows(BoundRoute):
    """Runs a model in float and notes which BatchNorm takes which layer's output, and how often each tensor is used."""

    surveys = True

    def __init__(self) -> None:
        super().__init__(Policy(), False, None)
        self._layers: list[_Layer] = []
        self._found: list[_Pair] = []
        self._uses: dict[str, int] = {}  # of leaves, by path; of a layer's output, by its place in the list

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not looks(func):
            self.use((args, kwargs))
            layer = self._layer_of(args[0]) if func is F.batch_norm and args else None
            if layer is not None:
                self._pair(layer, *args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def use(self, tree: Any) -> None:
        """Count a use of every tensor in a tree."""
        for leaf in torch_pytree.tree_leaves(tree):
            known = self.known.get(leaf) if isinstance(leaf, Tensor) else None
            if known is not None:
                self._uses[known.path] = self._uses.get(known.path, 0) + 1
            for i, layer in enumerate(self._layers):
                if layer.output is leaf:
                    self._uses[str(i)] = self._uses.get(str(i), 0) + 1

    def convolve(self, call: Any, weight: Any, float_call: Any) -> Any:
        y = super().convolve(call, weight, float_call)
        simple = not (call.transposed and call.groups > 1) and y.ndim == call.dims + 2
        return self._made(y, weight.path if simple else "", call.bias, 1 if call.transposed else 0)

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        y = super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        simple = axis == -1 and not weight.transposed and rows is None and ends is None and weight.value.ndim == 2
        return self._made(y, weight.path if simple and y is not None and y.ndim == 2 else "", bias, 0)

    def _made(self, y: Any, path: str, bias: Any, channels: int) -> Any:
        known = self.known.get(bias) if isinstance(bias, Tensor) else None
        if path and isinstance(y, Tensor) and (bias is None or known is not None):
            self._layers.append(_Layer(y, path, None if known is None else known.path, channels))
        return y

    def _pair(
        self, layer: _Layer, x: Tensor, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False,
        momentum: float = 0.1, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        known = [self.known.get(t) if isinstance(t, Tensor) else None for t in (mean, variance, weight, bias)]
        paths = [operand.path for operand in known if operand is not None]
        if not training and len(paths) == 4:
            self._found.append(_Pair(layer, paths[0], paths[1], paths[2], paths[3], eps))

    def _layer_of(self, t: Any) -> _Layer | None:
        return next((layer for layer in self._layers if layer.output is t), None)

    def pairs(self) -> list[_Pair]:
        """Those of which every tensor is used once: the layer's output by the BatchNorm, its leaves by the layer, and so on."""
        return [pair for pair in self._found if all(self._uses.get(name) == 1 for name in self._names(pair))]

    def _names(self, pair: _Pair) -> list[str]:
        place = next(i for i, known in enumerate(self._layers) if known.output is pair.layer.output)
        bias = [] if pair.layer.bias is None else [pair.layer.bias]
        return [str(place), pair.layer.weight, *bias, pair.mean, pair.variance, pair.gamma, pair.beta]
