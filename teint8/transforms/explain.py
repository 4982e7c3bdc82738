"""``explain``: what ran in INT8, and what did not."""

from typing import Any

import torch

from teint8.transforms.quantize import BoundRoute, quantized, run
from teint8.transforms.receipt import Receipt


def explain(qfn: Any, params: Any, *args: Any, **kwargs: Any) -> Receipt:
    """Run ``qfn`` once, without gradients, and tell for each call of a quantizable op what ran it, or why it stayed float.

    Args:
        qfn: a result of ``quantize``.
        params: float or packed parameters.
        args, kwargs: the inputs.

    Returns:
        A Receipt: iterate over its records, or print it as a table.

    Raises:
        TypeError: ``qfn`` is not quantized.

    Example:
        >>> from torch import nn
        >>> from teint8 import quantize
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> receipt = explain(quantize(model), dict(model.named_parameters()), torch.ones(8, 64))
        >>> [(r.path, r.m, r.n, r.k) for r in receipt], receipt.int8_calls
        ([('0.weight', 8, 32, 64), ('2.weight', 8, 10, 32)], 2)

    """
    quantized(qfn)
    receipt = Receipt()
    route = BoundRoute(qfn.policy, qfn.strict, receipt)
    with torch.no_grad():
        run(qfn, route, params, args, kwargs)
    route.finish()
    return receipt
