"""A weight as a call sees it."""

from typing import Any, NamedTuple

from torch import Tensor

from teint8.conditioning import Conditioned
from teint8.qtensor import QTensor


class Operand(NamedTuple):
    """A weight as a call sees it.

    Attributes:
        value: the float tensor in the layout of the call, or the QTensor in its own.
        path: its path in the params, "" where it has none.
        transposed: whether the call sees it with its last two dimensions swapped.
        held: what a route keeps of it.
        static: the static scale of the activation that meets a float weight, or None.
        conditioning: what its activation goes through before it is quantized, or None.
        x_codes: codes and scales of the activation that it meets, where they were made in its basis already.

    """

    value: Tensor | QTensor
    path: str = ""
    transposed: bool = False
    held: Any = None
    static: Tensor | None = None
    conditioning: Conditioned | None = None
    x_codes: tuple[Tensor, Tensor] | None = None
