"""QTensor: a weight as INT8 codes and float32 scales."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from teint8 import _torch, numerics


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class QTensor:
    """A quantized weight: ``dequantize() == codes * scale``. Frozen; a pytree node for torch and for optree.

    Attributes:
        codes: int8, in the shape of the weight.
        scale: float32, that shape with size 1 along ``axis`` (a scale for each output channel), or ceil(K / block) for blocks of
            32, 64 or 128 along it.
        activation_scale: None, or a float32 tensor of one element: the static scale of the activation that meets this weight.
        dtype: the float dtype that the weight had and that ``dequantize`` returns.
        axis: -1 for a weight (..., N, K) as in ``nn.Linear``, -2 for (..., K, N) as in ``x @ w``: the contracted dimension; a tuple
            of several for a convolution's, (-3, -2, -1) for (N, C, H, W).

    A transform may add leading dimensions to codes and scale (a stack of models under ``torch.vmap``); ``axis`` counts
    from the end, so that they do not matter.

        checked: False skips the checks of a constructor, as rebuilding a pytree must.

    Raises:
        TypeError: codes or scale of another dtype.
        ValueError: a scale whose shape does not fit the codes.

    Examples:
        >>> q = QTensor.quantize(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
        >>> q
        QTensor(2x2, torch.float32 as int8, axis=-1, device=cpu, 12 bytes)
        >>> q.codes.tolist()
        [[64, -127], [0, 127]]

    """

    codes: Tensor
    scale: Tensor
    activation_scale: Tensor | None = None
    dtype: torch.dtype = torch.float32
    axis: int | tuple[int, ...] = -1
    checked: dataclasses.InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        if not checked:  # a pytree is rebuilt: with placeholders, gradients, other dtypes in place of the tensors
            return
        if self.codes.dtype != torch.int8 or self.scale.dtype != torch.float32:
            raise TypeError(
                f"QTensor: codes are {self.codes.dtype} and scale is {self.scale.dtype}; int8 codes and a float32 scale are needed "
                "(QTensor.quantize makes them from a float weight)"
            )
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if self.axis not in (-1, -2) and (not isinstance(self.axis, tuple) or len(axes) < 2 or not all(-5 <= a <= -1 for a in axes)):
            raise ValueError(
                f"QTensor: axis is {self.axis!r}; it is -1 for a weight (..., N, K), -2 for (..., K, N), for a convolution's a tuple "
                "such as (-3, -2, -1)"
            )
        if self.codes.ndim < max(2, -min(axes)):
            raise ValueError(
                f"QTensor: codes have shape {tuple(self.codes.shape)}; a weight has at least {max(2, -min(axes))} dimensions"
            )
        want = list(self.codes.shape)
        for axis in axes:
            want[axis] = 1
        if list(self.scale.shape) != want and not self._fits_blocks(want):
            raise ValueError(
                f"QTensor: scale has shape {tuple(self.scale.shape)} but codes have {tuple(self.codes.shape)} "
                f"with axis {self.axis}; a scale of shape {tuple(want)} is needed"
            )

    def _fits_blocks(self, want: list[int]) -> bool:
        """Whether the scale is by block."""
        if not isinstance(self.axis, int) or self.scale.ndim != len(want):
            return False
        found, k = list(self.scale.shape), self.codes.shape[self.axis]
        count, found[self.axis] = found[self.axis], 1
        return found == want and count in [-(-k // block) for block in numerics.BLOCKS]

    @property
    def block(self) -> int:
        """How many values along ``axis`` share a scale; 0 where all of a row do."""
        if not isinstance(self.axis, int) or self.scale.shape[self.axis] == 1:
            return 0
        k, count = self.codes.shape[self.axis], self.scale.shape[self.axis]
        return next(block for block in numerics.BLOCKS if -(-k // block) == count)

    @classmethod
    def quantize(cls, weight: Tensor, *, axis: int | tuple[int, ...] = -1, granularity: str = "row") -> "QTensor":
        """Quantize a float weight by the numerics contract, in plain torch (``teint8.pack`` uses the device's kernel).

        Args:
            weight: (..., N, K) with axis -1 or (..., K, N) with axis -2, any float dtype; or of a convolution.
            axis: the contracted dimension, or those of a convolution: (-3, -2, -1) for (N, C, H, W).
            granularity: "row" for a scale for each output channel, "tensor" for one in all, "block32", "block64" or "block128" for one
                for so many values of a channel.

        Returns:
            The QTensor.

        Raises:
            TypeError: not a float weight.
            ValueError: an axis or a granularity that it cannot have.

        """
        if not weight.is_floating_point():
            raise TypeError(f"QTensor.quantize: weight has dtype {weight.dtype}; a float weight is needed")
        if isinstance(axis, tuple):
            return cls._of_kernel(weight, axis, granularity)
        if axis not in (-1, -2):
            raise ValueError(f"QTensor.quantize: axis is {axis!r}; -1, -2, or of a convolution a tuple such as (-3, -2, -1) are needed")
        rows = weight if axis == -1 else weight.mT
        shape = rows.shape
        block = numerics.block_of(granularity)
        if block:
            codes, scale = numerics.quantize(numerics.by_block(rows.reshape(-1, shape[-1]), block))
            codes = codes.view(math.prod(shape[:-1]), -1)[:, : shape[-1]]
            return cls.from_rows(codes.reshape(shape), scale.view(*shape[:-1], -1), weight.dtype, axis)
        flat = rows.reshape(-1, shape[-1]) if granularity == "row" else rows.reshape(-1, shape[-2] * shape[-1])
        codes, scale = numerics.quantize(flat)
        scale = scale.reshape(*shape[:-1], 1) if granularity == "row" else scale.reshape(*shape[:-2], 1, 1)
        return cls.from_rows(codes.reshape(shape), scale.expand(*shape[:-1], 1), weight.dtype, axis)

    @classmethod
    def _of_kernel(cls, weight: Tensor, axis: tuple[int, ...], granularity: str) -> "QTensor":
        """The weight of a convolution, of which ``axis`` is contracted."""
        last = list(range(-len(axis), 0))
        moved = weight.movedim(axis, last)
        flat = moved.flatten(-len(axis))
        codes, scale = numerics.quantize(flat.reshape(-1, flat.shape[-1]) if granularity == "row" else flat.reshape(1, -1))
        scale = scale.expand(flat[..., 0].numel()).reshape(*flat.shape[:-1], *[1] * len(axis))
        return cls(codes.reshape(moved.shape).movedim(last, axis), scale.movedim(last, axis), None, weight.dtype, axis)

    @classmethod
    def from_rows(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype, axis: int) -> "QTensor":
        """A weight from the rows of its codes, whatever ``axis`` it has itself.

        Args:
            codes: int8 (..., N, K).
            scale: float32 (..., N, 1), or (..., N, blocks).
            dtype: the float dtype that the weight had.
            axis: -1, or -2 for a weight (..., K, N), whose codes are transposed here.

        Returns:
            The QTensor.

        """
        return cls(codes, scale, None, dtype, -1) if axis == -1 else cls(codes.mT, scale.mT, None, dtype, -2)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Codes (..., N, K) and scales (..., N), the contracted dimension last; not of a convolution's weight."""
        if self.axis not in (-1, -2):
            raise ValueError(f"QTensor.rows: {self!r} is the weight of a convolution, which has no rows")
        if self.block:
            raise ValueError(f"QTensor.rows: {self!r} has a scale for each {self.block} values of a row; linear takes it, or unpack it")
        if self.axis == -1:
            return self.codes, self.scale.squeeze(-1)
        return self.codes.mT, self.scale.squeeze(-2)

    def dequantize(self) -> Tensor:
        """The weight as floats.

        Returns:
            ``codes * scale`` in float32, cast to ``dtype``; the shape of the weight.

        """
        scale = self.scale
        if self.block and isinstance(self.axis, int):
            scale = scale.repeat_interleave(self.block, self.axis).narrow(self.axis, 0, self.codes.shape[self.axis])
        return (self.codes.float() * scale).to(self.dtype)

    def with_activation_scale(self, scale: float | Tensor) -> "QTensor":
        """The same weight, with the static scale of the activation that meets it (``absmax / 127`` of calibration data).

        Args:
            scale: one positive number.

        Returns:
            A QTensor with the same codes.

        Raises:
            ValueError: a scale that is not one positive number.

        Examples:
            >>> q = QTensor.quantize(torch.eye(2)).with_activation_scale(0.02)
            >>> q.activation_scale
            tensor(0.0200)

        """
        return dataclasses.replace(self, activation_scale=check_scale(scale, self.codes.device))

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of the weight."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Device of codes and scale."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.activation_scale) if t is not None)

    def to(self, device: torch.device | str) -> "QTensor":
        """The same weight on another device.

        Args:
            device: torch's.

        Returns:
            A QTensor.

        Raises:
            TypeError: a dtype, which the codes cannot have.

        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"QTensor.to: {device} given; codes stay int8, and to takes a device: dequantize().to({device}) gives floats"
            )
        moved = (None if t is None else t.to(device) for t in (self.codes, self.scale, self.activation_scale))
        return QTensor(*moved, self.dtype, self.axis)  # type: ignore[arg-type,call-arg]

    def __repr__(self) -> str:
        if not isinstance(self.codes, Tensor):
            return f"QTensor({self.codes!r}, {self.scale!r})"
        static = "" if self.activation_scale is None else ", static activation scale"
        size = "x".join(map(str, self.shape))
        return f"QTensor({size}, {self.dtype} as int8, axis={self.axis}, device={self.device}, {self.nbytes} bytes{static})"


def check_scale(scale: float | Tensor, device: torch.device) -> Tensor:
    """A static scale of an activation as float32 ().

    Raises:
        ValueError: not one positive finite number.

    """
    value = torch.as_tensor(scale, dtype=torch.float32, device=device)
    if value.numel() != 1 or not bool(value > 0) or not bool(value.isfinite()):
        raise ValueError(f"activation scale: {scale!r} given; one positive finite number is needed")
    return value.reshape(())


_Aux = tuple[torch.dtype, int | tuple[int, ...]]


def _names(q: QTensor) -> tuple[str, ...]:
    return ("codes", "scale") if q.activation_scale is None else ("codes", "scale", "activation_scale")


def _flatten(q: QTensor) -> tuple[list[Any], _Aux]:
    if _torch.marks_differentiable():
        raise TypeError(
            f"{q!r} is packed, and INT8 codes have no gradient; differentiate by the float parameters (teint8.unpack gives them back), "
            "or by other arguments: torch.func.grad(f, argnums=...)"
        )
    return [getattr(q, name) for name in _names(q)], (q.dtype, q.axis)


def _unflatten(leaves: Iterable[Any], aux: _Aux) -> QTensor:
    codes, scale, *static = leaves
    return QTensor(codes, scale, static[0] if static else None, *aux, checked=False)


torch_pytree.register_pytree_node(
    QTensor,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=lambda q: (
        [(torch_pytree.GetAttrKey(name), getattr(q, name)) for name in _names(q)],
        (q.dtype, q.axis),
    ),
    serialized_type_name="teint8.QTensor",
    to_dumpable_context=lambda aux: [str(aux[0]).removeprefix("torch."), aux[1]],
    from_dumpable_context=lambda aux: (getattr(torch, aux[0]), tuple(aux[1]) if isinstance(aux[1], list) else aux[1]),
)
optree.register_pytree_node(
    QTensor,  # type: ignore[arg-type]
    lambda q: (*_flatten(q), _names(q)),  # type: ignore[arg-type]
    lambda aux, leaves: _unflatten(leaves, aux),  # type: ignore[arg-type,return-value]
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)
torch.serialization.add_safe_globals([QTensor])
