"""Convolutions in inference that a context met before, run again without deciding anew: the short way of ``te_int8_autocast``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teint8 import _torch, ops
from teint8.ops import registry
from teint8.ops.conv import geometry, strided
from teint8.ops.conv_function import is_channels_last
from teint8.ops.conv_layout import Shape, activation_codes, contracted, kernel_rows, spread
from teint8.ops.raw_conv import problem_of
from teint8.policy import Rule
from teint8.transforms import convolutions
from teint8.transforms.held import Held, held_of
from teint8.transforms.reasons import mode_of, why_float_conv
from teint8.transforms.recording import bytes_of_conv
from teint8.transforms.route import Route

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class ConvPlan(NamedTuple):
    """What a convolution of known shape comes to.

    Attributes:
        rule: the number of the rule that decided.
        axis: the dimensions of the weight that are summed over, by which it is packed.
        run: the result (B, *S', N) of x (B, C, *S), the weight's codes and scales as they are packed, and a bias.
        line: on the receipt: fields, kernel, bytes.

    """

    rule: int
    axis: tuple[int, ...]
    run: Run
    line: tuple[tuple[Any, ...], str, int]


class ConvolvesAgain(Route):
    """A route that keeps, in inference, what runs a convolution of known weight and shape.

    Attributes:
        policy_number: of the policy, quick to hash.
        quick: None where nothing is kept.

    """

    policy_number: int | None
    quick: Any

    def convolve_again(self, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """One of torch's convolutions, of a weight and shapes that were met before, in inference; None where it is to be decided."""
        if len(args) < 2 or torch.is_grad_enabled() or self.strict:
            return None
        (x, weight), bias = args[:2], args[2] if len(args) > 2 else None
        if type(weight) is not nn.Parameter or not isinstance(x, Tensor) or not _is_inference(x, weight, bias):
            return None
        held = held_of(weight)
        plan = self._plan_of(held, func, args, bias)
        if not plan:
            return None
        if not torch.is_inference_mode_enabled():  # a reentrant checkpoint records without gradients
            self.replay_in_checkpoints()
        self.matched.add(plan.rule)
        if self.receipt is not None:
            self.receipt.add(*plan.line)
        packed = held.entry(weight, plan.axis, "row").use(weight)
        y: Tensor = plan.run(x, packed.codes, packed.scale, bias).movedim(-1, 1)
        return y if is_channels_last(x) else y.contiguous()

    def _plan_of(self, held: Held, func: Any, args: tuple[Any, ...], bias: Any) -> Any:
        """The plan of a call; False where there is none: for the first call, and where the long way is the only one."""
        x, weight = args[:2]
        like_bias = None if bias is None else (bias.shape, bias.dtype, bias.device)
        like = x.shape, x.dtype, x.device, weight.shape, weight.dtype, weight.device, like_bias
        key = (func, self.policy_number, registry.generation(), like, args[3:])
        try:
            plan = held.convolutions.get(key)
        except TypeError:  # a list of numbers cannot be hashed
            return False
        if plan is None:
            if len(held.convolutions) > 64:
                held.convolutions.clear()
            held.convolutions[key] = plan = False
            self._plan_convolution(key, func, args)
        return plan

    def _plan_convolution(self, key: Any, func: Any, args: tuple[Any, ...]) -> None:
        """Keep a plan for calls like this one; none for what is no convolution of a rule's."""
        call = convolutions.read(func, args, {})
        weight = self.operand(call.w)
        rule = None if weight is None or weight.held is None or not weight.path else self.rule(weight.path, "conv")
        if weight is None or rule is None or rule != Rule(rule.path, rule.ops, gradient=rule.gradient, wgrad=rule.wgrad):
            return
        axis = contracted(call.w.ndim, call.transposed)
        if why_float_conv(rule, call.x, weight, axis, call) or call.x.ndim != call.dims + 2 or (call.transposed and call.groups > 1):
            return
        try:
            op, problem = ops.conv_problem(call.x, call.w, call.bias, call.x.dtype, **call.how)
        except (TypeError, ValueError):  # the long way tells
            return
        alike = call.x.dtype == call.w.dtype and all(t is None or t.device == call.x.device for t in (call.w, call.bias))
        run = _runs(call, op, problem) if alike and 0 not in (*call.x.shape, *call.w.shape) else None
        if run is None:
            return
        name, sizes = ops.select(op, problem).name, (problem.m, problem.n, problem.k, problem.batch)
        fields = (weight.path, "conv", *sizes, name, mode_of(rule), "")
        line = fields, ops.describe(op, name, problem), bytes_of_conv(call.x, *sizes)
        weight.held[1].convolutions[key] = ConvPlan(self.policy.rules.index(rule), axis, run, line)


def _runs(call: convolutions.Convolution, op: str, problem: registry.Problem) -> Run | None:
    """What runs calls like this one; None where "same" pads one side more than the other, or nothing runs pixels whole."""
    how = call.how
    found = geometry(
        call.x, call.w, how["stride"], how["padding"], how["dilation"], how["groups"], call.transposed, how["output_padding"]
    )
    if any(found.odd):
        return None
    if op != "conv":
        linear = registry.best("linear", registry.Problem(problem.device, problem.dtype, 1, problem.m, problem.n, problem.k))
        return None if linear is None else _by_pixel(linear.run, found.shape.stride, (call.x.shape[0], *found.out, problem.n))
    return _by_window(call, found.shape)


def _by_pixel(linear: Callable[..., Tensor], stride: tuple[int, ...], out: tuple[int, ...]) -> Run:
    """A kernel of one pixel: a linear of each."""
    plain = all(step == 1 for step in stride)

    def run(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        pixels = (x if plain else strided(x, stride)).movedim(1, -1).reshape(-1, x.shape[1])
        return linear(pixels, codes.flatten(1), scale.flatten(), bias, x.dtype).view(out)

    return run


def _by_window(call: convolutions.Convolution, shape: Shape) -> Run | None:
    """A kernel that sees several pixels."""
    x, groups, transposed, dtype = call.x, shape.groups, shape.transposed, call.x.dtype
    sizes, device = x.shape[2:], x.device.type
    xq_shape = x.shape[0], *sizes, x.shape[1]
    kernel = call.w.shape[2:]
    window = shape.window(kernel)
    seen = [(s - 1) * step + 1 for s, step in zip(sizes, shape.stride, strict=True)] if transposed else sizes
    w_shape = (call.w.shape[1], *kernel, call.w.shape[0]) if transposed else (call.w.shape[0], *kernel, call.w.shape[1])
    convolve = registry.select("conv", problem_of((x.shape[0], *seen, x.shape[1]), w_shape, window, device, dtype)).run
    together = x[0].numel()
    quantize = registry.select("quantize", registry.Problem(device, dtype, 1, x.shape[0], 0, together)).run

    def run(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if groups == 1:
            flat, scales = quantize(x.movedim(1, -1).reshape(-1, together), None, None)
            xq, xs = flat.view(xq_shape), scales.unsqueeze(1)
        else:
            xq, xs = activation_codes(x, "row", None, groups, "")
        if transposed:
            xq = spread(xq, shape.stride)
        y: Tensor = convolve(xq, xs, kernel_rows(codes, transposed, groups), scale.flatten(), bias, window, dtype)
        return y.contiguous()

    return run


def _is_inference(x: Tensor, weight: Tensor, bias: Any) -> bool:
    """Whether nothing but values is wanted: no transform, tracing or torch.autocast, and real tensors; gradients are off."""
    if not _torch.are_plain(x, weight, bias) or _torch.forward_ad_level() >= 0:
        return False
    return not (x.is_meta or weight.is_inference() or torch.is_autocast_enabled(x.device.type))
