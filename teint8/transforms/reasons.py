"""Why a call stays float, and what runs one that does not."""

from typing import Any

import torch
from torch import Tensor

from teint8 import _torch, ops
from teint8.numerics import block_of
from teint8.ops.raw import problem_of
from teint8.policy import Rule
from teint8.qtensor import QTensor
from teint8.transforms import shapes
from teint8.transforms.convolutions import Convolution
from teint8.transforms.operands import Operand


def why_float(op: str, rule: Rule | None, x: Any, weight: Operand, axis: int) -> str:
    """The reason why a call stays float, or ""."""
    if rule is None:
        return "between activations: a rule must name 'activation_matmul'" if op == "activation_matmul" else "no rule matches"
    if rule.weight is None:
        return "its rule leaves the weight in float"
    unfit = next((t for t in (x, weight.value) if isinstance(t, Tensor) and (t.layout is not torch.strided or t.is_nested)), None)
    if unfit is not None or weight.value.ndim < 2:
        return "the weight is a vector" if unfit is None else f"an operand is {unfit.layout}{' and nested' if unfit.is_nested else ''}"
    if not x.is_floating_point():
        return f"the activation is {x.dtype}"
    value = weight.value
    if by_block(rule) and value.ndim != 2:
        return f"blocks are for weights of two dimensions, not {value.ndim}"
    if isinstance(value, QTensor):
        seen = -3 - value.axis if weight.transposed and isinstance(value.axis, int) else value.axis
        return "" if seen == axis else "the weight was packed along its other dimension"
    if not value.is_floating_point():
        return f"the weight is {value.dtype}"
    return shapes.why_not(x, value)


def by_block(rule: Rule) -> bool:
    """Whether a rule quantizes an operand by block."""
    return any(quant is not None and quant.granularity == "block" for quant in (rule.weight, rule.activation))


def check_packing(path: str, rule: Rule, value: Any) -> None:
    """Raise for a weight that was packed by other blocks than its rule wants: the bits would be those of neither policy."""
    if not isinstance(value, QTensor) or not isinstance(value.axis, int) or rule.weight is None:
        return
    k, wanted = value.shape[value.axis], block_of(rule.weight.grouping)
    if value.block != (wanted if k > wanted else 0):
        packed = f"a scale for each {value.block} values" if value.block else "a scale for each row"
        raise ValueError(
            f"{path} was packed with {packed}, and its rule wants Quant({rule.weight.granularity!r}"
            f"{f', block={wanted}' if wanted else ''}): pack the float weights by this policy, or use the policy that packed them"
        )


def problem_or_none(x: Any, weight: Operand, call: Convolution) -> Any:
    """What a convolution that stays float would have been; None where it fits no convolution."""
    try:
        batched = x if x.ndim == call.dims + 2 else x.unsqueeze(0)
        return ops.conv_problem(batched, weight.value, None, torch.float32, **call.how)[1]
    except (TypeError, ValueError):
        return None


def _unfit(name: str, t: Any) -> str:
    """The reason why an operand is none of a convolution in INT8, or ""."""
    if not t.dtype.is_floating_point:
        return f"the {name} is {t.dtype}"
    if isinstance(t, Tensor) and (t.layout is not torch.strided or t.is_nested):
        return f"the {name} is {t.layout}{' and nested' if t.is_nested else ''}"
    return ""


def why_float_conv(rule: Rule | None, x: Any, weight: Operand, axis: tuple[int, ...], call: Convolution) -> str:
    """The reason why a convolution stays float, or ""."""
    if rule is None or rule.weight is None:
        return "no rule matches" if rule is None else "its rule leaves the weight in float"
    if by_block(rule):
        return "convolutions have no blocks: Quant(granularity='row')"
    value = weight.value
    if x.ndim not in (call.dims + 1, call.dims + 2) or value.ndim != call.dims + 2:
        return f"{call.dims} spatial dimensions do not fit {tuple(x.shape)} by {tuple(value.shape)}"  # torch tells what is wrong
    unfit = _unfit("activation", x) or _unfit("weight", value)
    if unfit:
        return unfit
    if isinstance(value, QTensor) and (value.axis != axis or (call.transposed and call.groups > 1)):
        return "the weight was packed for another kind of convolution"
    if weight.transposed:
        return "the last dimensions of its weight are seen turned around"
    return ""


def why_not_grouped(rule: Rule | None) -> str:
    """The reason why a mixture of experts stays float under a rule that wants it in INT8, or ""."""
    activation = None if rule is None else rule.activation
    if activation is None or rule is None:
        return "experts have no W8A16"
    if by_block(rule):
        return "experts have no blocks"
    fits = activation.granularity == "row" and activation.scale == "dynamic"
    return "" if fits else "the activation of experts has a dynamic scale a token, and no other"


def mode_of(rule: Rule, grouped: bool = False) -> str:
    """What a rule asks for, as the receipt says it: "W8A8", "W8A8 by 32", "W8A16"; with "dX", "dW", "stochastic" of an INT8 backward.

    The dW of a mixture of experts (``grouped``) is in float.
    """
    blocks = next((f" by {q.block}" for q in (rule.weight, rule.activation) if q is not None and q.granularity == "block"), "")
    if rule.activation is None:
        return f"W8A16{blocks}"
    if rule.gradient is None:
        return f"W8A8{blocks}"
    backward = "dX dW" if rule.wgrad == "int8" and not grouped else "dX"
    return f"W8A8{blocks} {backward}{' stochastic' if rule.gradient.rounding == 'stochastic' else ''}"


def ran_as_of(x: Tensor, value: Any, rule: Rule, grouped: bool) -> str:
    """The name of the implementation that ``ops.linear``, or ``ops.grouped_linear``, will select."""
    if rule.compute == "simulate":
        return "reference"
    if rule.activation is None:
        return "dequantized"
    op, problem = _posed(x, value, rule, grouped)
    return ops.select(op, problem).name


def kernel_of(ran_as: str, x: Tensor, value: Any, rule: Rule, grouped: bool) -> str:
    """The configuration of the kernel that will run, or ""."""
    if ran_as in ("reference", "dequantized"):
        return ""
    op, problem = _posed(x, value, rule, grouped)
    return ops.describe(op, ran_as, problem)


def _posed(x: Tensor, value: Any, rule: Rule, grouped: bool) -> tuple[str, ops.Problem]:
    """The op of a call, and the Problem that it poses."""
    problem = _problem(x, value, grouped)
    if not by_block(rule) and not (isinstance(value, QTensor) and value.block):
        return "grouped_mm" if grouped else "int8_mm", problem
    sizes = [q.block for q in (rule.weight, rule.activation) if q is not None and q.granularity == "block"]
    return "block_mm", problem._replace(extra=(sizes[0] if sizes else value.block,))


def _problem(x: Tensor, value: Any, grouped: bool) -> ops.Problem:
    n = value.shape[-2] if not isinstance(value, QTensor) or value.axis == -1 else value.shape[-1]
    batch, m = (value.shape[0], x.shape[0]) if grouped else problem_of(x, n, value.ndim)[2:4]
    dtype = None if grouped else autocast_dtype(x)
    batch, m, n, k = map(_torch.number, (batch, m, n, x.shape[-1]))
    return ops.Problem(x.device.type, dtype or x.dtype, batch, m, n, k)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast wants of a matmul's result: autocast acts below the mode, so the op must honour it."""
    kind = x.device.type
    if kind == "meta":
        return None
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None
