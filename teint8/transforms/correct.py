"""``correct_bias``: the mean error that quantized weights make, taken out of the biases."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from teint8.policy import Policy
from teint8.qtensor import QTensor
from teint8.transforms.quantize import BoundRoute, call_module, check_params, quantized

Tree = dict[str, Tensor]


def correct_bias(qfn: Any, params: Any, batches: Iterable[Any], *, progress: bool = True) -> tuple[Tree, Tree]:
    """Parameters and buffers with which the mean of each INT8 layer's output is that of the float model.

    Rounding a weight adds the same error to every output of a channel as far as its inputs have a mean: after a ReLU that is most of
    it, and small models with BatchNorm (MobileNet, EfficientNet) lose more by it than by all else. The error's mean over example inputs
    is subtracted from the layer's bias, or, where it has none, added to the running mean of the BatchNorm that follows (Nagel et al.,
    2019, with means of data). No gradient, no labels; weights stay as they are.

    Args:
        qfn: a result of ``quantize`` of a module, which is put into eval mode while this runs.
        params: its float parameters by name, or (parameters, buffers); pack what comes back.
        batches: example inputs, each a tensor or a tuple or list of arguments: a hundred images do.
        progress: show a progress bar.

    Returns:
        (parameters, buffers), which ``qfn`` takes in place of ``params``; ``load_state_dict(parameters | buffers)`` takes them, too
        (with strict=False where weights are tied, or buffers are not persistent).

    Raises:
        TypeError: not a quantized module, or one tensor as batches.
        ValueError: packed parameters, no batches, or no layer that runs in
            INT8 has a bias or a BatchNorm.

    Examples:
        >>> from teint8 import quantize
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> fixed, buffers = correct_bias(quantize(model), dict(model.named_parameters()), [torch.rand(8, 3, 9, 9)], progress=False)
        >>> sorted(name for name, p in model.named_parameters() if not torch.equal(p, fixed[name]))
        ['0.bias', '2.bias']

    """
    module = quantized(qfn)
    if not isinstance(module, nn.Module):
        raise TypeError(f"correct_bias: {qfn.__name__} was made from a function; its biases are not known: quantize a module")
    groups = params if isinstance(params, tuple) else (params, dict(module.named_buffers()))
    check_params(module, groups)
    tree, examples = _checked(groups, batches)
    in_float, correcting = _Means(Policy(), qfn.policy), None
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            for args in tqdm(examples, "correct_bias: means in float", disable=not progress):
                in_float.start(tree, module, args)
            correcting = _Means(qfn.policy, qfn.policy, in_float)
            for args in tqdm(examples, "correct_bias: means in INT8", disable=not progress):
                correcting.start(tree, module, args)
    finally:
        for m, mode in training.items():
            m.training = mode
    changed = {name: (tree[name] + shift).to(tree[name].dtype) for name, shift in correcting.shifts().items()}
    if not changed:
        raise ValueError("correct_bias: no layer that runs in INT8 has a bias, nor a BatchNorm behind it; there is nothing to correct")
    fixed, names = {**tree, **changed}, {name for name, _ in module.named_parameters()}
    return {n: t for n, t in fixed.items() if n in names}, {n: t for n, t in fixed.items() if n not in names}


def _checked(groups: Any, batches: Any) -> tuple[Tree, list[Any]]:
    """Copies of the parameters and buffers, and the arguments of each batch."""
    if isinstance(batches, Tensor):
        raise TypeError(f"correct_bias: batches is a tensor {tuple(batches.shape)}; a list of batches is needed, [x] for one")
    packed = [name for group in groups for name, leaf in group.items() if isinstance(leaf, QTensor)]
    if packed:
        raise ValueError(f"correct_bias: {packed[0]!r} is packed; give the float parameters, and pack what comes back")
    examples = [tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in batches]
    if not examples:
        raise ValueError("correct_bias: there are no batches; give some example inputs, [x] for one")
    return {name: leaf.detach().clone() for group in groups for name, leaf in group.items()}, examples


class _Target(NamedTuple):
    """The leaf that takes the shift of a layer's output, and whether it is added to that output (a bias) or taken from it (a mean)."""

    path: str
    added: bool


_Call = tuple[str, int]
"""A weight's path, and how often it was met before in this batch."""


class _Means(BoundRoute):
    """Runs a model batch by batch and takes the mean of each layer's output; given those of the float model it takes out the error."""

    def __init__(self, policy: Policy, rules: Policy, wanted: "_Means | None" = None) -> None:
        super().__init__(policy, False, None)
        self.rules, self.wanted = rules, wanted
        self.means: dict[tuple[int, _Call], Tensor] = {}
        self.targets: dict[_Call, _Target] = {}
        self._batch, self._made = -1, None  # type: tuple[int, tuple[Tensor, _Call] | None]
        self._counts: dict[str, int] = {}
        self._sums: dict[_Target, tuple[Tensor, int]] = {}  # of shifts, weighted by how many outputs they are of

    def start(self, tree: Tree, module: nn.Module, args: Any) -> None:
        """Run one batch."""
        self._batch, self._counts = self._batch + 1, {}
        self.known.clear()
        call_module(module, self, tree, args, {})

    def shifts(self) -> Tree:
        """What is to be added to each leaf."""
        return {target.path: total / count * (-1 if target.added else 1) for target, (total, count) in self._sums.items()}

    def convolve(self, call: Any, weight: Any, float_call: Callable[[], Any]) -> Any:
        y = super().convolve(call, weight, float_call)
        return self._look(y, weight.path, "conv", 1 if y.ndim == call.dims + 2 else 0, call.bias)

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        y = super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        whole = rows is None and ends is None and y is not None and weight.value.ndim == 2
        return self._look(y, weight.path, op, -1, bias) if whole else y

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.batch_norm and self._made is not None and args and args[0] is self._made[0]:
            mean = self.known.get(args[1] if len(args) > 1 else kwargs["running_mean"])
            if mean is not None:
                self.targets.setdefault(self._made[1], _Target(mean.path, False))
        return super().other(func, args, kwargs)

    def _look(self, y: Tensor, path: str, op: str, channel: int, bias: Any) -> Tensor:
        rule = self.rules.match(path, op)
        if not path or rule is None or rule.weight is None:
            return y
        call = (path, self._counts.get(path, 0))
        self._counts[path] = call[1] + 1
        known = self.known.get(bias) if isinstance(bias, Tensor) else None
        if known is not None:
            self.targets[call] = _Target(known.path, True)
        mean = y.float().mean([d for d in range(y.ndim) if d != channel % y.ndim])
        self.means[self._batch, call] = mean
        self._made = (y, call)
        target = None if self.wanted is None else self.wanted.targets.get(call)
        if target is None or self.wanted is None:
            return y
        total, count = self._sums.get(target, (torch.zeros_like(mean), 0))
        outputs = y.numel() // max(mean.numel(), 1)
        total, count = total + (mean - self.wanted.means[self._batch, call]) * outputs, count + outputs
        self._sums[target] = total, count
        shape = [1] * y.ndim
        shape[channel] = -1
        return y - (total / count).view(shape).to(y.dtype)
