"""What a route says of the calls that it sees: on the receipt, and by errors in strict mode."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch
from teint8.policy import Rule
from teint8.qtensor import QTensor
from teint8.transforms import callsite
from teint8.transforms.costs import bytes_of
from teint8.transforms.operands import Operand
from teint8.transforms.receipt import Receipt

_DEFAULT_OPS = Rule().ops


def bytes_of_conv(x: Tensor, m: int, n: int, k: int, batch: int) -> int:
    """Bytes that a convolution must read and write: what windows see in common is read once."""
    return _torch.number(x.numel()) + batch * (n * k + 4 * n + m * n * x.element_size())


class Recording:
    """Notes calls; ``Route`` decides on them.

    Attributes:
        strict: raise where a rule wants INT8 and the call cannot run so.
        receipt: where calls are noted, or None.
        measures: whether ``measure`` looks at values.

    """

    measures = False
    comparing = False  # whether what runs is computed only to compare
    strict: bool
    receipt: Receipt | None

    def rule(self, path: str, op: str) -> Rule | None:
        """The rule for a call."""
        raise NotImplementedError

    def refuse(self, rule: Rule | None, path: str, op: str, reason: str) -> None:
        """Raise, in strict mode, for a call that stays float though its rule wants INT8."""
        if self.strict and rule is not None and rule.weight is not None:
            ops = "" if op in _DEFAULT_OPS else f"ops=({op!r},), "
            raise ValueError(
                f"strict: {path} ({op}) cannot run in INT8: {reason}. Leave it in float with Rule({path!r}, {ops}weight=None) "
                "before the other rules, or leave strict off"
            )

    def need_kernel(self, rule: Rule, path: str, op: str, x: Tensor, ran_as: str) -> None:
        """Raise, in strict mode, for a call that only the reference can run."""
        if self.strict and ran_as == "reference" and rule.compute == "int8":
            raise ValueError(
                f"strict: {path} ({op}) has no INT8 kernel for {x.dtype} on {x.device}: only the plain-torch reference can run it. "
                "Register one with teint8.ops.register, ask for Rule(compute='simulate'), or leave strict off"
            )

    def measure(self, fields: Any, y: Tensor, exact: Callable[[], Tensor], x: Tensor | None, group_dims: int, scale: Any) -> None:
        """Compare the result of a recorded call with ``exact()``; only ``explain`` does.

        Args:
            x: the activation, of whose codes group_dims dimensions share a scale, or which have the static one; None if it is float.

        """

    def record_conv(
        self, path: str, problem: Any, weight: Operand, ran_as: str, mode: str, reason: str, kernel: str = "", x: Any = None
    ) -> Any:
        """Note one convolution on the receipt: M counts its windows, batch its groups; of one in float only the weight is known."""
        if self.receipt is None or torch.compiler.is_dynamo_compiling():
            return None
        n, k = weight.value.shape[0], math.prod(weight.value.shape[1:])
        sizes = (0, n, k, 1) if problem is None else (problem.m, problem.n, problem.k, problem.batch)
        m, n, k, batch = map(_torch.number, sizes)
        fields = (path, "conv", m, n, k, batch, ran_as, mode, reason)
        self.receipt.add(fields, kernel, 0 if x is None else bytes_of_conv(x, m, n, k, batch))
        return fields

    def stays_float(self, weight: Operand, op: str, reason: str) -> None:
        """Note that a call, of which only the weight is known, stays float; in strict mode raise, where a rule is for it."""
        path = self.path(weight)
        rule = self.rule(path, op)
        if self.strict and rule is not None and rule.weight is not None:
            raise ValueError(
                f"strict: {path} ({op}) cannot run in INT8: {reason}. Leave it in float with "
                f"Rule({path!r}, ops=({op!r},), weight=None) before the other rules, or leave strict off"
            )
        if self.receipt is not None and not torch.compiler.is_dynamo_compiling():
            n, k = weight.value.shape[-2:]
            self.receipt.add((path, op, 0, n, k, 1, "float", "", reason))

    def path(self, weight: Operand) -> str:
        """The weight's path, or its call site; "?" in compiled code, where there is no stack to read."""
        if weight.path:
            return weight.path
        return "?" if _torch.is_compiling() else callsite.line_of_call()

    def record(
        self, path: str, op: str, x: Any, weight: Operand, axis: int, rows: Any, ran_as: str, mode: str, reason: str, kernel: str = ""
    ) -> Any:
        """Note one call on the receipt; its fields there."""
        if self.receipt is None or torch.compiler.is_dynamo_compiling():
            return None
        shape = weight.value.shape if weight.value.ndim > 1 else (1, *weight.value.shape)
        swapped = weight.transposed and isinstance(weight.value, QTensor)
        n, k = shape[-2:] if (axis == -1) != swapped else shape[:-3:-1]
        n = n if rows is None else len(range(n)[rows])
        batch = math.prod(shape[:-2])
        m = x.numel() // max(k, 1) if len(shape) == 2 or x.ndim < 2 else x.shape[-2]
        m, n, k, batch = map(_torch.number, (m, n, k, batch))
        fields = (path, op, m, n, k, batch, ran_as, mode, reason)
        self.receipt.add(fields, kernel, bytes_of(m, n, k, batch, ran_as, x.element_size()))
        return fields
