"""Inference calls that a context met before, run again without deciding anew: the short way of ``te_int8_autocast``."""

import weakref
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, ops
from teint8.ops import registry
from teint8.policy import Rule
from teint8.transforms.costs import bytes_of
from teint8.transforms.held import Plan, Quick, QuickCalls
from teint8.transforms.operands import Operand
from teint8.transforms.reasons import kernel_of, mode_of, ran_as_of
from teint8.transforms.route import Route


class Again(Route):
    """A route that keeps, in inference, what runs a call of known weight and shape.

    Attributes:
        policy_number: of the policy, quick to hash; None in compiled code.
        paths_matter: whether rules depend on paths.
        quick: by the id of a weight, what is known of it; None where nothing is kept.

    """

    policy_number: int | None
    paths_matter: bool
    quick: QuickCalls | None

    def multiply(
        self, op: str, x: Any, weight: Operand, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None
    ) -> Any:
        lean = (
            ends is None and weight.held is not None and axis == -1 and rows is None and self.shared is None and _is_inference(x, bias)
        )
        if not lean or self.policy_number is None or weight.transposed or self.paths_matter or weight.held[0].is_inference():
            return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        owner, held = weight.held
        known = (owner.shape, owner.dtype, owner.device, None if bias is None else (bias.shape, bias.dtype, bias.device))
        key = (self.policy_number, registry.generation(), op, x.shape, x.dtype, x.device, known)
        plan = held.plans.get(key)
        if plan is None:  # decided by the long way, once
            self._plan(key, op, x, weight, bias)
            return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        if not torch.is_inference_mode_enabled():  # a reentrant checkpoint records without gradients
            self.replay_in_checkpoints()
        self._remember(plan, op, x, weight, bias)
        self.matched.add(plan.rule)
        if self.receipt is not None:
            self.receipt.add(*plan.line)
        codes, scale = held.get(owner, -1, plan.granularity).rows()
        y = plan.implementation.run(x.reshape(-1, x.shape[-1]), codes, scale, bias, x.dtype)
        return y.view(*x.shape[:-1], plan.channels)

    def _again(self, x: Any, weight: Any = None, bias: Any = None) -> Tensor | None:
        """F.linear of a weight and a shape that were met before, in inference; None where anything is not as it was."""
        quick = self.quick.get(id(weight))  # type: ignore[union-attr]
        if quick is None or torch.is_grad_enabled() or not quick.fits(weight, bias) or not isinstance(x, Tensor):
            return None
        plan = quick.plans.get((x.shape, x.dtype, x.device))
        if plan is None or plan.generation != registry.generation() or not _torch.are_plain(x) or _torch.forward_ad_level() >= 0:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if not torch.is_inference_mode_enabled():  # a reentrant checkpoint records without gradients
            self.replay_in_checkpoints()
        quick.entry.use(weight)
        self.matched.add(plan.rule)
        if self.receipt is not None:
            self.receipt.add(*plan.line)
        if x.ndim == 2:
            return plan.implementation.run(x, quick.codes, quick.scale, bias, x.dtype)  # type: ignore[no-any-return]
        y = plan.implementation.run(x.reshape(-1, x.shape[-1]), quick.codes, quick.scale, bias, x.dtype)
        return y.view(*x.shape[:-1], plan.channels)  # type: ignore[no-any-return]

    def _remember(self, plan: Plan, op: str, x: Tensor, weight: Operand, bias: Tensor | None) -> None:
        """Let ``_again`` run calls like this one."""
        if self.quick is None or op != "linear":
            return
        owner, held = weight.held
        quick = self.quick.get(id(owner))
        if quick is None or not quick.fits(owner, bias):
            if len(self.quick) >= 4096:
                self.quick.clear()
            number, known = id(owner), weakref.ref(self.quick)  # a context that is left is gone at once, with what it knows
            quick = Quick(owner, bias, held, held.entry(owner, -1, "row"), lambda _: _forget(known(), number))
            if _torch.is_capturing(owner):  # codes that are made in a CUDA graph are there when it is replayed
                return
            self.quick[number] = quick
        if len(quick.plans) > 64:
            quick.plans.clear()
        quick.plans[x.shape, x.dtype, x.device] = plan

    def _plan(self, key: Any, op: str, x: Tensor, weight: Operand, bias: Tensor | None) -> None:
        """Keep a plan for calls like this one, if a fused implementation runs them whole."""
        w, held = weight.value, weight.held[1]
        rule = self.rule(weight.path, op)
        if rule is None or rule != Rule(rule.path, rule.ops, gradient=rule.gradient, wgrad=rule.wgrad) or w.ndim != 2:
            return
        fits = x.dtype == w.dtype and x.shape[-1:] == w.shape[-1:] and x.device == w.device
        fits = fits and (bias is None or (bias.shape == w.shape[:1] and bias.is_floating_point() and bias.device == w.device))
        if not fits or 0 in x.shape or 0 in w.shape:
            return
        (n, k), m = w.shape, x.numel() // w.shape[1]
        implementation = registry.best("linear", ops.Problem(x.device.type, x.dtype, 1, m, n, k))
        if implementation is not None:
            if len(held.plans) > 64:
                held.plans.clear()
            ran_as = ran_as_of(x, w, rule, False)  # as the long way calls it
            fields = (weight.path, op, m, n, k, 1, ran_as, mode_of(rule), "")
            line = fields, kernel_of(ran_as, x, w, rule, False), bytes_of(m, n, k, 1, ran_as, x.element_size())
            held.plans[key] = Plan(self.policy.rules.index(rule), implementation, n, "row", registry.generation(), line)


def _forget(known: QuickCalls | None, number: int) -> None:
    if known is not None:
        known.pop(number, None)


def _is_inference(x: Any, bias: Any) -> bool:
    """Whether nothing but values is wanted: no gradient, transform, tracing or torch.autocast, and real tensors."""
    if torch.is_grad_enabled() or _torch.is_compiling() or not _torch.no_dispatch_modes():
        return False
    if _torch.forward_ad_level() >= 0 or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return False
    return _torch.is_plain(x) and (bias is None or _torch.is_plain(bias))
