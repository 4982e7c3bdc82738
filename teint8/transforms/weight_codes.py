"""Codes of float weights, made once in a training context: they serve every microbatch until an optimizer steps."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from teint8 import _torch
from teint8.ops.conv_layout import kernel_codes
from teint8.ops.linear import differentiates, weight_codes_of
from teint8.policy import Rule
from teint8.qtensor import QTensor
from teint8.transforms.held import follow_optimizers, held_of
from teint8.transforms.operands import Operand
from teint8.transforms.route import Route


class KeepsCodes(Route):
    """A route that keeps the codes of weights, until its context ends.

    Attributes:
        training: whether it does.
        made: by weight, what it was and its codes; None for a weight whose codes are not kept. Made late,
            for Dynamo traces the making of a context.

    """

    training: bool
    made: Any = None

    def weight_codes(self, weight: Operand, value: Any, axis: int, rule: Rule, cut: Any) -> tuple[Tensor, ...] | None:
        """A weight's codes, made once in a context: they serve every microbatch until an optimizer steps."""
        as_held = axis == (-2 if weight.transposed else -1)
        if weight.held is None or not as_held or cut is not None or isinstance(value, QTensor):
            return None
        owner, held = weight.held
        if not self.training or rule.compute != "int8" or rule.weight is None or not _torch.no_dispatch_modes() or owner.is_inference():
            return None
        columns = rule.gradient is not None and differentiates(owner)
        if _torch.is_capturing(owner):  # a CUDA graph quantizes the weight at each replay
            return weight_codes_of(owner, rule.weight.grouping, columns)
        place = (*held.place(owner), rule.weight.grouping, columns, _torch.stream_of(owner.device))
        granularity = rule.weight.grouping
        return self._codes_of(owner, place, lambda: weight_codes_of(owner, granularity, columns))

    def aliased(self, t: Tensor) -> None:
        super().aliased(t)
        if not isinstance(t, nn.Parameter) or _torch.is_compiling():
            return
        held_of(t).drop()
        self._made()[t] = None  # None: of this one codes are not kept in this context

    def kernel_codes(self, weight: Operand, rule: Rule, call: Any) -> Any:
        if weight.held is None or weight.transposed or isinstance(weight.value, QTensor) or rule.weight is None:
            return None
        owner, held = weight.held
        usable = rule.compute == "int8" and _torch.no_dispatch_modes() and not owner.is_inference()
        if not usable or _torch.is_capturing(owner):
            return None
        granularity, groups = rule.weight.grouping, call.groups
        place = (*held.place(owner), granularity, call.transposed, groups, _torch.stream_of(owner.device))
        return self._codes_of(owner, place, lambda: kernel_codes(owner, granularity, call.transposed, groups))

    def _codes_of(self, owner: Tensor, place: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Codes of a weight, made once in a context for as long as it is what it was."""
        made = self._made()
        known = made.get(owner, ((), ()))
        if known is None:
            return make()
        if known[0] != place:
            known = made[owner] = (place, make())
            follow_optimizers()
        return known[1]  # type: ignore[no-any-return]

    def _made(self) -> Any:
        """What is kept; another thread that shares this context may leave it, and drop it, at any time."""
        made = self.made
        if made is None:
            made = self.made = WeakTensorKeyDictionary()
        return made
