"""``correct_bias``: the mean error that quantized weights make, taken out of the biases."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from teint8.policy import Policy
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
        params: its parameters by name, or (parameters, buffers).
        batches: example inputs, each a tensor or a tuple of arguments: a hundred images do.
        progress: show a progress bar.

    Returns:
        (parameters, buffers), which ``qfn`` takes in place of ``params``, and ``load_state_dict(parameters | buffers)`` too.

    Raises:
        TypeError: not a quantized module. ValueError: no batches, or no layer that runs in INT8 has a bias or a BatchNorm.

    Example:
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
    tree = {name: leaf.detach() for group in groups for name, leaf in group.items()}
    examples = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not examples:
        raise ValueError("correct_bias: there are no batches; give some example inputs, [x] for one")
    in_float, correcting = _Means(Policy(), qfn.policy, {}), None
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            for args in tqdm(examples, "correct_bias: means in float", disable=not progress):
                in_float.start(tree, module, args)
            correcting = _Means(qfn.policy, qfn.policy, in_float.means)
            for args in tqdm(examples, "correct_bias: means in INT8", disable=not progress):
                correcting.start(tree, module, args)
    finally:
        for m, mode in training.items():
            m.training = mode
    changed = _corrected(tree, correcting.shifts, in_float.norms)
    if not changed:
        raise ValueError("correct_bias: no layer that runs in INT8 has a bias, nor a BatchNorm behind it; there is nothing to correct")
    fixed, names = {**tree, **changed}, {name for name, _ in module.named_parameters()}
    return {n: t for n, t in fixed.items() if n in names}, {n: t for n, t in fixed.items() if n not in names}


def _corrected(tree: Tree, shifts: Tree, norms: dict[str, str]) -> Tree:
    """Biases and running means without the shifts of the layers that they belong to."""
    changed: Tree = {}
    for path, shift in shifts.items():
        owner, _, _ = path.rpartition(".")
        bias = f"{owner}.bias" if owner else "bias"
        if bias in tree and tree[bias].shape == shift.shape:
            changed[bias] = (tree[bias] - shift).to(tree[bias].dtype)
        elif path in norms:
            changed[norms[path]] = (tree[norms[path]] + shift).to(tree[norms[path]].dtype)
    return changed


class _Means(BoundRoute):
    """Runs a model batch by batch and takes the mean of each layer's output; with those of the float model it takes out the error."""

    def __init__(self, policy: Policy, rules: Policy, wanted: dict[tuple[int, str, int], Tensor]) -> None:
        super().__init__(policy, False, None)
        self.rules, self.wanted = rules, wanted
        self.means: dict[tuple[int, str, int], Tensor] = {}  # by batch, path and how often that path was met
        self.shifts: dict[str, Tensor] = {}
        self.norms: dict[str, str] = {}
        self._batch, self._seen, self._made = -1, 0, None  # type: tuple[int, int, tuple[Tensor, str] | None]
        self._counts: dict[str, int] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def start(self, tree: Tree, module: nn.Module, args: Any) -> None:
        """Run one batch."""
        self._batch, self._counts = self._batch + 1, {}
        self.known.clear()
        call_module(module, self, tree, args, {})

    def convolve(self, call: Any, weight: Any, float_call: Callable[[], Any]) -> Any:
        y = super().convolve(call, weight, float_call)
        return self._look(y, weight.path, "conv", 1 if y.ndim == call.dims + 2 else 0)

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        y = super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        return y if rows is not None or ends is not None or y is None or weight.value.ndim != 2 else self._look(y, weight.path, op, -1)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.batch_norm and self._made is not None and args and args[0] is self._made[0]:
            mean = self.known.get(args[1] if len(args) > 1 else kwargs["running_mean"])
            if mean is not None:
                self.norms[self._made[1]] = mean.path
        return super().other(func, args, kwargs)

    def _look(self, y: Tensor, path: str, op: str, channel: int) -> Tensor:
        rule = self.rules.match(path, op)
        if not path or rule is None or rule.weight is None:
            return y
        index = self._counts[path] = self._counts.get(path, 0) + 1
        mean = y.float().mean([d for d in range(y.ndim) if d != channel % y.ndim])
        key = (self._batch, path, index)
        self.means[key] = mean
        self._made = (y, path)
        if key not in self.wanted:
            return y
        total, count = self._sums.get(path, (torch.zeros_like(mean), 0))
        total, count = total + (mean - self.wanted[key]), count + 1
        self._sums[path] = total, count
        shift = self.shifts[path] = total / count
        shape = [1] * y.ndim
        shape[channel] = -1
        return y - shift.view(shape).to(y.dtype)
