"""What a recorded call costs, and what it would be in float."""

from typing import Any

import torch
from torch import Tensor

from teint8 import numerics
from teint8.policy import Rule
from teint8.qtensor import QTensor
from teint8.transforms.operands import Operand


def bytes_of(m: int, n: int, k: int, batch: int, ran_as: str, size: int) -> int:
    """Bytes that a matmul must read and write, floats of ``size`` bytes: operands as they are multiplied, scales, the result.

    Examples:
        >>> bytes_of(16, 8, 32, 1, "float", 4), bytes_of(16, 8, 32, 1, "cpu-amx", 4)
        (3584, 1376)

    """
    x = m * k * size if ran_as in ("float", "dequantized") else m * k + 4 * m
    w = n * k * size if ran_as == "float" else n * k + 4 * n
    return batch * (x + w + m * n * size)


def activation_of(x: Tensor, rule: Rule, weight: Operand) -> tuple[Tensor | None, tuple[int, Any]]:
    """What is quantized of an activation (None if it is float); how many of its dimensions share a scale, and the static one."""
    how = rule.activation
    if how is None:
        return None, (1, None)
    static = None
    if how.scale == "static":
        static = weight.value.activation_scale if isinstance(weight.value, QTensor) else weight.static
    if how.granularity == "block":
        return numerics.by_block(x.reshape(-1, x.shape[-1]), how.block), (1, None)
    return x, (1 if how.granularity == "row" or static is not None else x.ndim, static)


def exact_product(x: Tensor, weight: Operand, axis: int, bias: Tensor | None, rows: Any) -> Tensor:
    """x (..., K) by a weight contracted along ``axis``, in float; of a packed weight its values are exact."""
    w = weight.value
    if isinstance(w, QTensor):
        w = w.dequantize().mT if weight.transposed else w.dequantize()
    w = w if axis == -1 else w.mT
    w = w if rows is None else w[rows]
    y: Tensor = torch.ops.aten.matmul.default(x.to(w.dtype), w.mT)  # torch.matmul would be taken over by a context around explain
    return y if bias is None else y + (bias if bias.ndim < 2 else bias.unsqueeze(-2))
