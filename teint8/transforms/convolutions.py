"""Calls of torch's convolutions, brought to one form."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from teint8.transforms import shapes

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

PLAIN: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
CONVOLUTIONS = frozenset((*PLAIN, *TRANSPOSED))


class Convolution(NamedTuple):
    """A call.

    Attributes:
        x, w, bias: its tensors, x as it came.
        dims: how many spatial dimensions.
        how: the other arguments, as ``ops.conv`` takes them.

    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    dims: int
    how: dict[str, Any]

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return bool(self.how["transposed"])

    @property
    def groups(self) -> int:
        """Parts of the channels."""
        return int(self.how["groups"])

    def arguments(self) -> tuple[Any, ...]:
        """What follows the tensors in a call of an aten op, which wants a number for each dimension."""

        def each(name: str) -> Any:
            value = self.how[name]
            return value if isinstance(value, (str, tuple, list)) else [value] * self.dims

        if self.transposed:
            return each("stride"), each("padding"), each("output_padding"), self.groups, each("dilation")
        return each("stride"), each("padding"), each("dilation"), self.groups


def read(func: Any, args: Any, kwargs: Any) -> Convolution:
    """The call of one of torch's convolutions."""
    transposed = func in TRANSPOSED
    x, w, bias, *rest = shapes.bind(_TRANSPOSED_NAMES if transposed else _NAMES, args, kwargs)
    defaults = (1, 0, 0, 1, 1) if transposed else (1, 0, 1, 1)
    values = [default if value is None else value for value, default in zip(rest, defaults, strict=True)]
    names = (_TRANSPOSED_NAMES if transposed else _NAMES)[3:]
    dims = (TRANSPOSED if transposed else PLAIN)[func]
    return Convolution(x, w, bias, dims, {"transposed": transposed, "output_padding": 0, **dict(zip(names, values, strict=True))})
