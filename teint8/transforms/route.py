"""Routing: a TorchFunctionMode that sees each call of a program and takes over the matmuls that a rule wants in INT8."""

import copy
import difflib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from teint8 import _compilers, _torch, ops
from teint8.ops.conv_layout import contracted
from teint8.ops.shared import Shared
from teint8.policy import Policy, Rule
from teint8.qtensor import QTensor
from teint8.transforms import apart, basis, shapes
from teint8.transforms.calls import HANDLERS, know_transformers
from teint8.transforms.convolutions import Convolution
from teint8.transforms.costs import activation_of, exact_product
from teint8.transforms.operands import Operand
from teint8.transforms.reasons import (
    autocast_dtype,
    check_packing,
    kernel_of,
    mode_of,
    problem_or_none,
    ran_as_of,
    why_float,
    why_float_conv,
    why_not_grouped,
)
from teint8.transforms.receipt import Receipt
from teint8.transforms.recording import Recording


class Route(Recording, TorchFunctionMode):
    """Sends matmuls to INT8 by the rules of a policy. Subclasses tell what is a weight (``operand``) and what is cached.

    Args:
        policy: the rules.
        strict: raise where a rule wants INT8 and the call cannot run so.
        receipt: where calls are recorded, or None.

    """

    surveys = False
    """Whether this route runs to find how weights are used."""

    def __init__(self, policy: Policy, strict: bool, receipt: Receipt | None) -> None:
        super().__init__()
        if not _torch.is_compiling():
            know_transformers()
        self.policy, self.strict, self.receipt = policy, strict, receipt
        self.matched: set[int] = set()
        self.paths: set[str] = set()  # of the weights that were seen, in strict mode
        self.shared: Shared | None = None  # where codes of activations are kept for the next call that takes the same one
        self._entries: dict[int, list[int]] = {}  # by thread, the frames that entered this route; 0 where it was traced

    @_compilers.never_compiled_alone
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is None:
            if torch.compiler.is_dynamo_compiling() and self.policy.rules and _compilers.hides_its_body(func):
                raise RuntimeError(
                    f"teint8: matmuls inside of {func} would stay float: in compiled code its body is traced outside of the routing. "
                    "Compile the float model with torch.compile(model, backend='teint8'), which sees checkpoints; or leave fullgraph "
                    "off, so that this part runs in eager mode; or put te_int8_autocast(enabled=False) around it"
                )
            return self.other(func, args, kwargs or {})
        return handler(self, func, args, kwargs or {})

    def __enter__(self) -> Any:
        if torch.compiler.is_dynamo_compiling():
            apart.enter_traced()
        else:
            traced = _torch.is_compiling()
            self._entered().append(0 if traced else id(sys._getframe(1)))
            if not traced:
                apart.enter()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if torch.compiler.is_dynamo_compiling():
            apart.leave_traced()
        else:
            frames = self._entered()
            if frames and frames.pop():  # compiled code that was left by a graph break entered it elsewhere
                apart.leave()

    def _entered(self) -> list[int]:
        return self._entries.setdefault(threading.get_ident(), [])

    def operand(self, t: Any) -> Operand | None:
        """What is known of ``t`` as a weight, or None."""
        raise NotImplementedError

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that is not taken over."""
        return func(*args, **kwargs)

    def aliased(self, t: Tensor) -> None:
        """Keep no codes of t any more: it has an alias whose edits leave no version (``t.data``)."""
        if self.shared is not None:
            self.shared.forget(t)

    def keeps_codes(self) -> bool:
        """Whether codes of a norm's output can wait for the linear that follows."""
        if torch.compiler.is_dynamo_compiling() or self.shared is None:
            return False
        return not torch.is_inference_mode_enabled()  # what has no version keeps no codes

    def keep_codes(self, y: Tensor, codes: tuple[Tensor, Tensor], how: tuple[Any, ...] = (False, False, "")) -> None:
        """Let what follows take the codes of y: linears codes (M, K) and scales (M,), else what ``how`` stands for."""
        if self.shared is not None:
            self.shared.codes(y, how, lambda: codes)

    def plain(self, args: Any) -> Any:
        """The arguments of a call that stays float, without packed weights."""
        return args

    def packed(self, weight: Operand, axis: Any, granularity: str) -> Operand:
        """The weight with its codes where they are held already, else as it is."""
        return weight

    def weight_codes(self, weight: Operand, value: Any, axis: int, rule: Rule, cut: Any) -> tuple[Tensor, ...] | None:
        """Codes of a float weight where they are held already, as ``ops.linear`` takes them."""
        return None

    def replaying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which recomputes a checkpoint, under this route."""
        again = copy.copy(self)
        again.receipt, again.strict, again._entries = None, False, {}

        def replay(*args: Any, **kwargs: Any) -> Any:
            with again:
                return function(*args, **kwargs)

        return replay

    def replay_in_checkpoints(self) -> None:
        """See to it that checkpoints entered since this route recompute under it."""
        if not _torch.is_compiling() and self._entered():
            _torch.replay_in_checkpoints(self, self._entered()[-1])

    def rule(self, path: str, op: str) -> Rule | None:
        """The rule for a call."""
        if self.strict and not torch.compiler.is_dynamo_compiling():
            self.paths.add(path)
        for i, rule in enumerate(self.policy.rules):
            if rule.matches(path, op):
                if not torch.compiler.is_dynamo_compiling():
                    self.matched.add(i)
                return rule
        return None

    def unmatched(self) -> list[Rule]:
        """Rules that decided no call so far."""
        return [rule for i, rule in enumerate(self.policy.rules) if i not in self.matched]

    def finish(self) -> None:
        """Put rules that decided nothing on the receipt; in strict mode raise for them: a misspelt path would pass unseen."""
        if torch.compiler.is_dynamo_compiling():
            return
        unmatched = self.unmatched()
        if self.receipt is not None:
            self.receipt.unmatched = unmatched
        if not self.strict or not unmatched:
            return
        what = f"strict: no call matched {', '.join(map(repr, unmatched))}{self._near(unmatched)}"
        if not self.matched and not self.paths:
            raise ValueError(
                f"{what}: no matmul was seen that a rule is for. Other layers are not quantized, and compiled code is not seen: "
                "compile teint8.quantize(model, policy, strict=True), or leave strict off"
            )
        raise ValueError(
            f"{what}; mend the path, the ops or the order of the rules (the first match wins; teint8.explain lists the paths), "
            "or leave strict off"
        )

    def _near(self, rules: list[Rule]) -> str:
        """For an error: the paths of weights and of their modules that are most like those of rules."""
        known = sorted(self.paths | {path.rpartition(".")[0] for path in self.paths} - {""})
        # a path that is there is not misspelt: another rule came first, or the ops are others
        close = [(r.path, difflib.get_close_matches(r.path, known, 1)) for r in rules if r.path.removesuffix(".*") not in known]
        found = [f"{path!r} is much like {near[0]!r}" for path, near in close if near]
        return f" ({'; '.join(found)})" if found else ""

    def multiply(
        self, op: str, x: Any, weight: Operand, axis: int, bias: Any, float_call: Callable[[], Any], rows: Any = None, ends: Any = None
    ) -> Any:
        """x (..., K) by a weight whose contracted dimension is ``axis`` of its layout in this call: INT8, or ``float_call``.

        Args:
            rows: a slice of the output channels, for weights that hold several projections.
            ends: where the rows of each weight of a batch end, for a mixture of experts.

        """
        if weight.conditioning is not None:
            return basis.multiply(self, op, x, weight, axis, bias, float_call, rows, ends)
        x = self.plain(x)
        path = self.path(weight)
        rule = self.rule(path, op)
        reason = why_float(op, rule, x, weight, axis) or (why_not_grouped(rule) if ends is not None else "")
        if reason:
            self.refuse(rule, path, op, reason)
            self.record(path, op, x, weight, axis, rows, "float", "", reason)
            return float_call()
        assert rule is not None and rule.weight is not None
        check_packing(path, rule, weight.value)
        layout = -3 - axis if weight.transposed else axis
        whole, channels = weight, rows
        weight = self.packed(weight, layout, rule.weight.grouping)
        value = weight.value if axis == -1 or isinstance(weight.value, QTensor) else weight.value.mT
        cut = None
        if rows is not None:
            value, bias, cut = shapes.channels(value, bias, rows, rule.weight.grouping)
        x = x if ends is not None else shapes.align(x, value)
        impl = "reference" if rule.compute == "simulate" else ""
        if (self.receipt is not None or self.strict) and not torch.compiler.is_dynamo_compiling():
            ran_as = ran_as_of(x, value, rule, ends is not None)
            self.need_kernel(rule, path, op, x, ran_as)
            kernel = kernel_of(ran_as, x, value, rule, ends is not None)
            fields = self.record(path, op, x, weight, axis, rows, ran_as, mode_of(rule, ends is not None), "", kernel)
        else:
            fields = None
        self.replay_in_checkpoints()
        if ends is not None:
            gradient = None if rule.gradient is None else rule.gradient.rounding
            codes = self.weight_codes(weight, value, axis, rule, cut)
            how: dict[str, Any] = {
                "weight_granularity": rule.weight.grouping,
                "gradient": gradient,
                "impl": impl,
                "weight_codes": codes,
            }
            y = ops.grouped_linear(x, value, ends, **how)
            if fields is not None:
                behind = torch.arange(y.shape[0], device=y.device) >= ends[-1]  # of no expert: 0 here, anything in torch
                self.measure(fields, y, lambda: float_call().masked_fill(behind.unsqueeze(-1), 0), x, 1, None)
            return y
        y = ops.linear(
            x,
            value,
            bias,
            **self._how(rule, x, impl),
            activation_scale=weight.static,
            x_codes=weight.x_codes,
            weight_codes=None if rows is not None else self.weight_codes(weight, value, axis, rule, cut),
        )
        y = y if cut is None else y[..., cut]
        if fields is not None:
            seen, scale = activation_of(x, rule, weight)
            self.measure(fields, y, lambda: exact_product(x, whole, axis, bias, channels), seen, *scale)
        return y

    def convolve(self, call: Convolution, weight: Operand, float_call: Callable[[], Any]) -> Any:
        """A convolution: INT8, or ``float_call``."""
        if weight.conditioning is not None:
            if weight.conditioning.changes_basis:
                raise ValueError(f"{weight.path} is {weight.conditioning!r}, which is for linears; this call is a convolution")
            weight = weight._replace(static=weight.conditioning.activation_scale, conditioning=None)
        x = self.plain(call.x)
        path = self.path(weight)
        rule = self.rule(path, "conv")
        axis = contracted(weight.value.ndim, call.transposed)
        reason = why_float_conv(rule, x, weight, axis, call)
        if reason:
            self.refuse(rule, path, "conv", reason)
            self.record_conv(path, problem_or_none(x, weight, call), weight, "float", "", reason)
            return float_call()
        assert rule is not None and rule.weight is not None
        batched = x if x.ndim == call.dims + 2 else x.unsqueeze(0)
        bias = self.plain(call.bias)
        op, problem = ops.conv_problem(batched, weight.value, bias, autocast_dtype(x) or x.dtype, **call.how)
        if not (call.transposed and call.groups > 1):
            weight = self.packed(weight, axis, rule.weight.grouping)
        impl = "reference" if rule.compute == "simulate" else ""
        if (self.receipt is not None or self.strict) and not torch.compiler.is_dynamo_compiling():
            batch, m, n, k = map(_torch.number, (problem.batch, problem.m, problem.n, problem.k))
            problem = problem._replace(batch=batch, m=m, n=n, k=k)
            ran_as = "reference" if impl else "dequantized" if rule.activation is None else ops.select(op, problem).name
            self.need_kernel(rule, path, "conv", x, ran_as)
            kernel = ops.describe(op, ran_as, problem)
            fields = self.record_conv(path, problem, weight, ran_as, mode_of(rule), "", kernel, batched)
        else:
            fields = None
        self.replay_in_checkpoints()
        y = ops.conv(
            batched,
            weight.value,
            bias,
            **call.how,
            **self._how(rule, x, impl),
            activation_scale=weight.static,
            weight_codes=self.kernel_codes(weight, rule, call),
        )
        if fields is not None:
            seen, (together, scale) = activation_of(batched.movedim(1, -1), rule, weight)
            together = together if op == "int8_mm" or scale is not None else batched.ndim - 1
            self.measure(fields, y, lambda: float_call().reshape(y.shape), seen, together, scale)
        return y if batched is x else y.squeeze(0)

    def _how(self, rule: Rule, x: Tensor, impl: str) -> dict[str, Any]:
        """What a rule says, as ``ops.linear`` and ``ops.conv`` take it."""
        weight, activation, gradient = rule.weight, rule.activation, rule.gradient
        return {
            "weight_granularity": "row" if weight is None else weight.grouping,
            "activation": None if activation is None else activation.grouping,
            "static": activation is not None and activation.scale == "static",
            "gradient": None if gradient is None else gradient.rounding,
            **({"gradient_granularity": gradient.grouping} if gradient is not None and gradient.granularity == "block" else {}),
            "wgrad": rule.wgrad,
            "impl": impl,
            "dtype": autocast_dtype(x),
            "shared": self.shared,
        }

    def kernel_codes(self, weight: Operand, rule: Rule, call: Convolution) -> Any:
        """Codes of a convolution's float weight where they are held already, as ``ops.conv`` takes them."""
        return None
