"""``delayed``: static scales from the steps before, as explicit state (delayed scaling, as in FP8 training)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teint8.policy import Policy
from teint8.transforms.learned import static_policy
from teint8.transforms.looks import refuse_packed
from teint8.transforms.quantize import BoundRoute, quantized, run

History = dict[str, Tensor]
"""By a weight's path float32 (steps,): absmax of the activation that met it in each of the last steps, the newest first."""


def delayed(qfn: Any, *, steps: int = 16, margin: float = 1.0) -> Callable[..., Any]:
    """``f(params, history, *args) -> (output, history)``: each activation is quantized by the largest absmax of the steps before.

    No pass over the activation is needed for its scale; what exceeds it is clipped, and gets no gradient. Where nothing was seen yet
    the scale is that of the values at hand. State goes in and comes out: nothing is hidden, and under torch.func.grad it is the aux.

    Args:
        qfn: a result of ``quantize``; its gradients and weights stay as its policy says.
        steps: how many steps the history holds.
        margin: what the largest absmax is multiplied with.

    Returns:
        The function; begin with ``history={}``.

    Raises:
        TypeError: ``qfn`` is not quantized.
        ValueError: steps below 1, a margin that is not positive, or packed parameters.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model, x = nn.Linear(8, 4), torch.ones(2, 8)
        >>> step, params = delayed(quantize(model), steps=3), dict(model.named_parameters())
        >>> y, history = step(params, {}, x)
        >>> y, history = step(params, history, 2 * x)
        >>> history["weight"].tolist()
        [2.0, 1.0, 0.0]

    """
    quantized(qfn)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"delayed: steps is {steps!r}; a whole number of at least 1 is needed")
    if not margin > 0:
        raise ValueError(f"delayed: margin is {margin!r}; a positive number is needed")

    policy = qfn.policy
    static = static_policy(policy)  # here, since Dynamo of torch 2.11 traces no dataclasses.replace

    def step(params: Any, history: History, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            refuse_packed(params, "delayed")
        route = _Delayed(policy, static, history, steps, margin)
        y = run(qfn, route, params, args, kwargs)
        return y, {**history, **route.new}

    step.__name__ = step.__qualname__ = f"delayed_{qfn.__name__}"
    return step


class _Delayed(BoundRoute):
    def __init__(self, policy: Policy, static: Policy, history: History, steps: int, margin: float) -> None:
        super().__init__(policy, False, None)
        self.dynamic, self.static = policy, static
        self.history, self.steps, self.margin = history, steps, margin
        self.new: History = {}

    def multiply(self, op: str, x: Any, weight: Any, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None) -> Any:
        rule = self.dynamic.match(weight.path, op)
        static = rule is not None and rule.weight is not None and rule.activation is not None and rule.activation.granularity != "block"
        if not static or ends is not None or weight.conditioning is not None or weight.value.ndim != 2 or not x.is_floating_point():
            return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        a = x.detach().abs().float()
        a = torch.where(a.isfinite(), a, 0.0)  # what is not finite spoils its own row in this step, and no scale
        now = a.amax() if a.numel() else torch.zeros((), device=x.device)
        old = self.history.get(weight.path)
        old = torch.zeros(self.steps, dtype=torch.float32, device=x.device) if old is None else old
        seen = self.new.get(weight.path)
        newest = now if seen is None else torch.maximum(now, seen[0])
        self.new[weight.path] = torch.cat((newest.reshape(1), old[: self.steps - 1]))
        top = old.amax()
        top = torch.where(top > 0, top * self.margin, now)
        scale = torch.where(top > 0, top, torch.ones_like(top)) / 127
        self.policy = self.static  # of linears alone: others have no scale here
        try:
            return super().multiply(op, x, weight._replace(static=scale), axis, bias, float_call, rows, ends)
        finally:
            self.policy = self.dynamic
