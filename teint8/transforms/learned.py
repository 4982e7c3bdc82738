"""``lsq``: scales that are learned with the parameters (Learned Step Size Quantization, Esser et al., 2020)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8 import ops
from teint8.conditioning import Conditioned
from teint8.ops.straight import moved
from teint8.policy import Policy, Quant
from teint8.qtensor import QTensor
from teint8.transforms.calibrate import OF_CONVOLUTION, Calibration
from teint8.transforms.looks import refuse_packed
from teint8.transforms.quantize import BoundRoute, of_module, quantized, run
from teint8.transforms.reasons import autocast_dtype
from teint8.transforms.static import scales
from teint8.transforms.trees import is_grouped, map_leaves, weights_of


class Learned(NamedTuple):
    """Scales of one linear, leaves of a pytree that torch.func.grad differentiates.

    Attributes:
        weight: float32 (N, 1), a scale for each output channel.
        activation: float32 (), the static scale of the activation.

    Examples:
        >>> Learned(torch.ones(4, 1), torch.tensor(0.1)).weight.shape
        torch.Size([4, 1])

    """

    weight: Tensor
    activation: Tensor


LearnedScales = dict[str, Learned]
"""Scales by the weight's path."""


def learned_scales(qfn: Any, params: Any, calibration: Calibration, method: str = "mse") -> LearnedScales:
    """Where learning begins: absmax / 127 of each output channel, and static scales of the activations.

    Args:
        qfn: a result of ``quantize``.
        params: its float parameters.
        calibration: a result of ``calibrate`` with these.
        method: of ``scales``.

    Returns:
        A ``Learned`` by path, for each linear weight that the policy quantizes.

    Raises:
        ValueError: packed or conditioned parameters, weights that are not (N, K) as nn.Linear has them, or statistics of another model.

    Examples:
        >>> from torch import nn
        >>> from teint8 import calibrate, quantize
        >>> model, x = nn.Linear(8, 4), torch.ones(2, 8)
        >>> qfn, params = quantize(model), dict(model.named_parameters())
        >>> start = learned_scales(qfn, params, calibrate(qfn, params, [x], progress=False), "absmax")
        >>> start["weight"].weight.shape, round(float(start["weight"].activation) * 127, 4)
        (torch.Size([4, 1]), 1.0)

    """
    refuse_packed(params, "learned_scales")
    leaves, static = weights_of(params, of_module(qfn)), scales(calibration, method)
    foreign = sorted(set(static) - set(leaves))
    if foreign:
        raise ValueError(f"learned_scales: calibration is of {foreign[0]!r}, which params do not have; is it of another model?")
    found: LearnedScales = {}
    for path, scale in static.items():
        if int(calibration[path].axis) == OF_CONVOLUTION:
            continue
        w = leaves[path]
        if isinstance(w, Conditioned) or int(calibration[path].axis) != -1 or w.shape[-1:] != calibration[path].channels.shape:
            raise ValueError(f"learned_scales: {path} is {w if isinstance(w, Conditioned) else tuple(w.shape)}; a float weight (N, K) "
                             "as nn.Linear has it is needed; leave others out by a rule with weight=None")  # fmt: skip
        top = w.detach().float().abs().amax(1, keepdim=True)
        found[path] = Learned(torch.where(top > 0, top, 1.0) / 127, scale.to(w.device))
    return found


def lsq(qfn: Any) -> Callable[..., Any]:
    """A pure function of (parameters, scales) whose linears quantize by those scales, and which is differentiable in both.

    Values are those of INT8 kernels, the bits that ``pack_learned`` serves. Gradients are LSQ's: ``round(x / s) - x / s`` for the scale
    where x is not clipped and -127 or 127 where it is, times ``1 / sqrt(127 K)`` with K features; a clipped x gets none.

    Args:
        qfn: a result of ``quantize``: calls whose path is in scales are quantized so, others by its policy.

    Returns:
        ``f((params, scales), *args, **kwargs)``.

    Raises:
        TypeError: ``qfn`` is not quantized, or when called, no pair was given.

    Examples:
        >>> from torch import nn
        >>> from teint8 import calibrate, quantize
        >>> model, x = nn.Linear(8, 4), torch.randn(16, 8)
        >>> qfn, params = quantize(model), dict(model.named_parameters())
        >>> start = learned_scales(qfn, params, calibrate(qfn, params, [x], progress=False))
        >>> learn = lsq(qfn)
        >>> grads = torch.func.grad(lambda both: learn(both, x).square().mean())((params, start))
        >>> tuple(grads[0]["weight"].shape), tuple(grads[1]["weight"].weight.shape), grads[1]["weight"].activation.shape
        ((4, 8), (4, 1), torch.Size([]))

    """
    quantized(qfn)

    def learn(both: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(both, tuple) or len(both) != 2 or not all(isinstance(s, Learned) for s in both[1].values()):
            raise TypeError("lsq: a pair (params, scales) is needed, scales as learned_scales returns them")
        params, learned = both
        return run(qfn, _Learning(qfn.policy, learned), params, args, kwargs)

    learn.__name__ = learn.__qualname__ = f"learned_{qfn.__name__}"
    return learn


def pack_learned(params: Any, learned: LearnedScales) -> Any:
    """Packed parameters by learned scales, static activation scales included, for rules with ``activation=Quant(scale="static")``.

    Args:
        params: a pytree of float parameters.
        learned: a Learned by path, as ``learned_scales`` begins and training ends it.

    Returns:
        A tree of the same structure, with QTensors in place of the weights that have learned scales.

    Raises:
        ValueError: a scale that is not positive.

    Examples:
        >>> pack_learned({"w": torch.ones(2, 3)}, {"w": Learned(torch.full((2, 1), 0.5), torch.tensor(0.1))})["w"].codes[0].tolist()
        [2, 2, 2]

    """

    def give(path: str, leaf: Any) -> Any:
        if path not in learned:
            return leaf
        scale = learned[path]
        if not bool((scale.weight > 0).all()):
            raise ValueError(f"pack_learned: {path} has a scale that is not positive; learn with a smaller rate")
        codes, made = ops.quantize(leaf.detach(), scale=scale.weight.detach().squeeze(-1))
        return QTensor(codes, made.unsqueeze(-1), None, leaf.dtype).with_activation_scale(scale.activation.detach())

    return map_leaves(give, params, is_grouped(params, learned))


def static_policy(policy: Policy) -> Policy:
    """The rules of a policy with static activations.

    Examples:
        >>> static_policy(Policy.qat())
        Policy([
            Rule('*', activation=Quant(scale='static')),
        ])

    """
    rules = []
    for rule in policy.rules:
        plain = rule.activation is None or rule.activation.granularity == "block"
        rules.append(rule if plain else dataclasses.replace(rule, activation=Quant(scale="static")))
    return Policy(rules)


def _on_grid(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of x (M, K), NaN where a row is not finite; and values on their grid that move with x and with the scale."""
    rows = scale.detach().reshape(-1).expand(x.shape[:1]).contiguous()
    codes, made = ops.quantize(x.detach(), scale=rows)
    share = (127 * x.shape[1]) ** -0.5
    scale = scale * share + (scale - scale * share).detach()
    ratio = (x.float() / scale).clamp(-127, 127)
    return codes, made, (ratio + (codes.float() - ratio).detach()) * scale


class _Learning(BoundRoute):
    def __init__(self, policy: Policy, learned: LearnedScales) -> None:
        super().__init__(policy, False, None)
        self.learned = learned

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        scale = self.learned.get(weight.path)
        if scale is None or isinstance(weight.value, QTensor) or weight.conditioning is not None or ends is not None or axis != -1:
            return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        w = weight.value
        of_weight = scale.weight if rows is None else scale.weight[rows]
        w = w if rows is None else w[rows]
        x = self.plain(x)
        dtype = autocast_dtype(x) or x.dtype
        xq, xs, x_hat = _on_grid(x.reshape(-1, x.shape[-1]), scale.activation)
        wq, ws, w_hat = _on_grid(w, of_weight)
        moving = x_hat.to(dtype) @ w_hat.to(dtype).mT
        moving = moving if bias is None else moving + bias
        value = ops.int8_mm(xq, xs, wq, ws, None if bias is None else bias.detach(), dtype)
        return moved(value, moving.to(dtype)).reshape(*x.shape[:-1], w.shape[0])
