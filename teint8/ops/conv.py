"""INT8 convolutions of one to three dimensions, transposed ones too: what is called, and what is asked of its arguments."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8 import _torch
from teint8.ops.conv_function import convolve, is_channels_last, weight_only
from teint8.ops.conv_layout import Codes, Shape, activation_codes, contracted, kernel_codes, kernel_rows
from teint8.ops.linear import linear, static_scale
from teint8.ops.registry import Problem
from teint8.ops.shared import Shared
from teint8.qtensor import QTensor


def conv(
    x: Tensor,
    weight: Tensor | QTensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    weight_granularity: str = "row",
    activation: str | None = "row",
    static: bool = False,
    activation_scale: Tensor | None = None,
    gradient: str | None = None,
    wgrad: str = "int8",
    impl: str = "",
    dtype: torch.dtype | None = None,
    shared: Shared | None = None,
    weight_codes: Codes | None = None,
) -> Tensor:
    """``F.conv1d``, ``conv2d``, ``conv3d`` or the transposed ones in INT8 by the numerics contract, with STE derivatives.

    ``y = (float32(sum of codes of a window) * w_scale) * x_scale + bias``, cast to the dtype of x: a scale for each sample and
    group, one for each output channel, so that a sample's result does not depend on the others of its batch. In INT8 the gradient
    is quantized as x is for dX, and both by channel for dW. With a kernel of one pixel and no groups or padding, it is ``linear``
    of the pixels.

    Args:
        x: (B, C, *S), one to three spatial dimensions, float32, bfloat16, float16 or float64.
        weight: (N, C / groups, *kernel) of that dtype, transposed (C, N / groups, *kernel), or its QTensor.
        bias: (N) or None.
        stride, padding, dilation, groups, output_padding: as in torch, padding "same" and "valid" too.
        transposed: ``F.conv_transpose1d``, 2d or 3d.
        weight_granularity: "row" for a scale for each output channel, "tensor" for one in all, for a float weight.
        activation: "row" for a scale for each sample and group (each pixel where the kernel is one), "tensor" for one in all, None for
            a float activation (W8A16).
        static: take the activation's scale from ``weight.activation_scale`` (a QTensor's), or from ``activation_scale``.
        activation_scale: float32, one number, for a float weight.
        gradient: None for a float backward, "nearest" or "stochastic" for an INT8 one.
        wgrad: "int8" or "float" for dW, where gradient is given.
        impl: name of an implementation, "reference" for plain torch; "" for the best.
        dtype: of the result; that of x unless given.
        shared: where codes of activations are kept, for calls that share one.
        weight_codes: what ``kernel_codes`` made of a float weight, if that was done before.

    Returns:
        (B, N, *S'), channels last in memory where those of x are.

    Raises:
        TypeError: not a float tensor, or two float dtypes.
        ValueError: shapes or devices that do not fit, static without a scale.

    Examples:
        >>> x, w = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> conv(x, w)
        tensor([[[3.0000, 5.0079]]])

    """
    packed = weight if isinstance(weight, QTensor) else None
    w: Any = None if packed is not None else weight
    _check(x, weight, bias, groups, transposed, dtype)
    shape, odd, _, pointwise = geometry(x, weight, stride, padding, dilation, groups, transposed, output_padding)
    if any(odd):  # "same" pads one side more than the other
        x = torch.nn.functional.pad(x, [p for o in reversed(odd) for p in (0, o)])
    dtype = dtype or x.dtype
    if pointwise:
        flat: Any = w.flatten(1) if packed is None else _flat(packed)
        y = linear(
            strided(x, shape.stride).movedim(1, -1), flat, bias, impl=impl, dtype=dtype,
            weight_granularity=weight_granularity, activation=activation, static=static, activation_scale=activation_scale,
            gradient=gradient, wgrad=wgrad,
        ).movedim(-1, 1)  # fmt: skip
        return y if is_channels_last(x) else y.contiguous()
    if packed is not None:
        codes = kernel_rows(packed.codes, transposed, groups), packed.scale.flatten()
    else:
        codes = weight_codes or kernel_codes(w, weight_granularity, transposed, groups, impl)
    if activation is None:
        return weight_only(x, w, bias, codes, tuple(shape), weight.dtype, dtype)  # type: ignore[no-any-return]
    scale = static_scale("conv", packed, activation_scale) if static else None
    x_codes = None
    if shared is not None and activation == "row" and scale is None:
        x_codes = shared.codes(x, ("conv", groups, impl), lambda: activation_codes(x, "row", None, groups, impl))
    how = (activation, scale, tuple(shape), gradient or "", wgrad, impl, dtype)
    return convolve(x, w, bias, x_codes, codes, *how)  # type: ignore[no-any-return]


def _flat(packed: QTensor) -> QTensor:
    """The weight of a kernel of one pixel, as a linear's."""
    return QTensor(packed.codes.flatten(1), packed.scale.flatten(1), packed.activation_scale, packed.dtype)


class _Geometry(NamedTuple):
    """What the sizes and arguments of a call come to.

    Attributes:
        shape: the arguments as tuples.
        odd: what "same" pads behind more than before.
        out: spatial sizes of the result.
        pointwise: whether each pixel is a row of its own.

    """

    shape: Shape
    odd: tuple[int, ...]
    out: tuple[int, ...]
    pointwise: bool


def geometry(x: Tensor, weight: Tensor | QTensor, stride: Any, padding: Any, dilation: Any, *others: Any) -> _Geometry:
    """That of a call; worked out once for each, for in eager mode that takes as long as a kernel. ValueError where nothing fits."""
    how: Any = [tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation, *others)]
    if _torch.is_compiling():  # sizes may be symbols
        return _geometry_of(x.shape, weight.shape, *how)
    try:
        return _known_geometry(tuple(x.shape), tuple(weight.shape), *how)
    except TypeError:  # what cannot be hashed
        return _geometry_of(x.shape, weight.shape, *how)


def _geometry_of(
    sizes: Sequence[int], weight: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, outs: Any
) -> _Geometry:
    kernel = weight[2:]
    shape, odd = _shape_of(kernel, stride, padding, dilation, groups, transposed, outs)
    padded = [s + o for s, o in zip(sizes[2:], odd, strict=True)]
    out = _out(padded, sizes, weight, shape)
    pointwise = all(k == 1 for k in kernel) and shape.groups == 1 and not shape.transposed and not any(shape.padding)
    return _Geometry(shape, tuple(odd), out, pointwise)


_known_geometry = functools.lru_cache(4096)(_geometry_of)


def conv_problem(
    x: Tensor, weight: Tensor | QTensor, bias: Tensor | None, dtype: torch.dtype, *, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, transposed: bool = False, output_padding: Any = 0,
) -> tuple[str, Problem]:  # fmt: skip
    """The op that ``conv`` of these runs, and the Problem that it poses: what ``select`` chooses an implementation by.

    Args:
        x: (B, C, *S).
        weight, bias: as for ``conv``.
        dtype: of the result.
        stride, padding, dilation, groups, transposed, output_padding: as for ``conv``.

    Returns:
        "conv", or "linear" or "int8_mm" where it is one, and the Problem.

    Raises:
        TypeError, ValueError: as ``conv``, but for dtypes that differ, which torch.autocast may mend.

    Examples:
        >>> op, problem = conv_problem(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), None, torch.float32, padding=1)
        >>> op, problem.m, problem.n, problem.k
        ('conv', 128, 4, 27)

    """
    _check_shapes(x, weight, bias, groups, transposed)
    found = geometry(x, weight, stride, padding, dilation, groups, transposed, output_padding)
    kernel = weight.shape[2:]
    op = "int8_mm" if found.pointwise else "conv"
    n, c = (weight.shape[1], weight.shape[0] // groups) if transposed else (weight.shape[0] // groups, weight.shape[1])
    m = x.shape[0] * math.prod(found.out)
    extra = (len(kernel), c) if op == "conv" else ()
    return op, Problem(x.device.type, dtype, groups, m, n, c * math.prod(kernel), extra)


def strided(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Every pixel that a window of one pixel sees."""
    for i, step in enumerate(stride, 2):
        x = x if step == 1 else x[(slice(None),) * i + (slice(None, None, step),)]
    return x


def _check(x: Tensor, weight: Tensor | QTensor, bias: Tensor | None, groups: int, transposed: bool, dtype: torch.dtype | None) -> None:
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, (Tensor, QTensor)) or not t.dtype.is_floating_point:
            raise TypeError(f"conv: {name} is {getattr(t, 'dtype', type(t).__name__)}; a float tensor is needed")
    if x.dtype != weight.dtype and dtype is None:
        raise TypeError(f"conv: x is {x.dtype} and weight {weight.dtype}; one dtype is needed, such as x.to({weight.dtype})")
    _check_shapes(x, weight, bias, groups, transposed)
    if x.device != weight.device or (bias is not None and bias.device != x.device):
        of_bias = "" if bias is None else f", bias on {bias.device}"
        raise ValueError(f"conv: x is on {x.device}, weight on {weight.device}{of_bias}; one device is needed")
    if isinstance(weight, QTensor) and (weight.axis != contracted(weight.ndim, transposed) or (transposed and groups > 1)):
        raise ValueError(f"conv: {weight!r} was not packed for this convolution (groups {groups}, transposed {transposed})")


def _check_shapes(x: Tensor, weight: Tensor | QTensor, bias: Tensor | None, groups: int, transposed: bool) -> None:
    if x.ndim not in (3, 4, 5) or weight.ndim != x.ndim:
        raise ValueError(
            f"conv: {_shapes(x, weight, groups)} do not fit; (B, C, *S) and (N, C / groups, *kernel) with 1 to 3 spatial dimensions "
            "are needed"
        )
    channels, split = (weight.shape[0], weight.shape[0]) if transposed else (weight.shape[1] * groups, weight.shape[0])
    if groups < 1 or x.shape[1] != channels or split % max(groups, 1):
        raise ValueError(
            f"conv: {_shapes(x, weight, groups)} do not fit; {channels} channels, and {split} that groups divides, are needed"
        )
    n = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"conv: bias is {bias.dtype}; a float tensor is needed")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"conv: bias has shape {tuple(bias.shape)}; ({n},) is needed for {_shapes(x, weight, groups)}")


def _shapes(x: Tensor, weight: Tensor | QTensor, groups: int) -> str:
    return f"x {tuple(x.shape)} and weight {tuple(weight.shape)}, groups {groups}"


def _shape_of(
    kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any
) -> tuple[Shape, list[int]]:
    """The arguments as tuples; and what "same" pads behind more than before."""
    nd = len(kernel)

    def each(name: str, value: Any) -> tuple[int, ...]:
        values = (value,) * nd if not isinstance(value, Sequence) else tuple(value) * (nd if len(value) == 1 else 1)
        if len(values) != nd:
            raise ValueError(f"conv: {name} is {value!r}; one number, or {nd}, are needed")
        return values

    stride, dilation, odd = each("stride", stride), each("dilation", dilation), [0] * nd
    if isinstance(padding, str):
        if padding not in ("same", "valid") or transposed or (padding == "same" and any(s != 1 for s in stride)):
            raise ValueError(f"conv: padding is {padding!r} with stride {stride}; numbers, 'valid', or 'same' with stride 1 are needed")
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        odd = [p % 2 for p in total]
        padding = tuple(p // 2 for p in total)
    outs = each("output_padding", output_padding) if transposed else ()
    return Shape(stride, each("padding", padding), dilation, groups, transposed, outs), odd


def _out(padded: Sequence[int], sizes: Sequence[int], weight: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """Spatial sizes of the result, of spatial sizes that are padded where "same" is odd."""
    steps = all(s > 0 and d > 0 for s, d in zip(shape.stride, shape.dilation, strict=True)) and all(p >= 0 for p in shape.padding)
    if shape.transposed:
        steps = steps and all(0 <= o < max(s, d) for o, s, d in zip(shape.output_padding, shape.stride, shape.dilation, strict=True))
    out = shape.out(padded, weight[2:]) if steps else ()
    if math.prod(weight[2:]) == 0 or any(size < 1 for size in out) or not steps:
        raise ValueError(
            f"conv: x {(*sizes[:2], *padded)} by weight {tuple(weight)} with stride {shape.stride}, padding {shape.padding}, dilation "
            f"{shape.dilation}, output_padding {shape.output_padding or 0}: there is no window that fits"
        )
    return out
