"""``explain``: what ran in INT8, and what did not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, ops
from teint8.transforms.quantize import BoundRoute, quantized, run
from teint8.transforms.receipt import Receipt


class _Measuring(BoundRoute):
    """Computes each call in float, too."""

    measures = True

    def measure(self, fields: Any, y: Tensor, exact: Callable[[], Tensor], x: Tensor | None, group_dims: int, scale: Any) -> None:
        if self.receipt is None or _torch.in_transform() or not _torch.are_plain(y) or y.is_meta:
            return  # there are no values to look at
        receipt, self.receipt, self.comparing = self.receipt, None, True  # this is no call of the program
        try:
            want = exact().detach().double()
        finally:
            self.receipt, self.comparing = receipt, False
        found = receipt.measured(fields)
        found.signal += float(want.square().sum())
        found.noise += float((want - y.detach().double()).square().sum())
        if x is not None and x.numel():
            codes, _ = ops.quantize(x.detach(), scale=scale, group_dims=group_dims)
            found.saturated += int((codes.abs() == 127).sum())
            found.codes += codes.numel()


def explain(qfn: Any, params: Any, *args: Any, **kwargs: Any) -> Receipt:
    """Run ``qfn`` once, without gradients, and tell for each call of a quantizable op what ran it, or why it stayed float.

    Each call that runs in INT8 is computed in float too, for its SQNR: this takes about twice as long as ``qfn``. A weight that is
    packed counts as exact, so that only the activation's error is seen there. It is a run as any other: in train mode a BatchNorm
    writes its statistics.

    Args:
        qfn: a result of ``quantize``.
        params: float or packed parameters.
        args, kwargs: the inputs.

    Returns:
        A Receipt: iterate over its records, or print it as a table.

    Raises:
        TypeError: ``qfn`` is not quantized.

    Examples:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> receipt = explain(quantize(model), dict(model.named_parameters()), torch.ones(8, 64))
        >>> [(r.path, r.m, r.n, r.k) for r in receipt], receipt.int8_calls
        ([('0.weight', 8, 32, 64), ('2.weight', 8, 10, 32)], 2)

    """
    quantized(qfn)
    receipt = Receipt()
    route = _Measuring(qfn.policy, qfn.strict, receipt)
    with torch.no_grad():
        run(qfn, route, params, args, kwargs)
    route.finish()
    return receipt
