"""Memory that kernels find zeroed and leave zeroed, so that no launch is spent on zeroing it."""

from typing import Any

import torch
from torch import Tensor

from teint8._torch import dispatched
from teint8.kernels.launch import current_stream

_LEAST, _MOST = 2**16, 2**22
_held: dict[tuple[int | None, int], Tensor] = {}


class Zeros:
    """A context that gives int32 zeros (count or more,) to kernels of the current stream, which leave zeros behind.

    They are held for the next kernels of that stream; taken out while in use, so that another thread gets its own, and not put back
    after an error, which may have left anything in them. A graph that is captured gets its own too: it may be replayed on any stream.
    So does an op that the dispatcher runs: what torch.compile allocates while it warms up a CUDA graph belongs to that graph.

    Args:
        count: how many are needed.
        device: where.

    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.key: tuple[int | None, int] | None = None

    def __enter__(self) -> Tensor:
        if self.device.type != "cuda" or self.count > _MOST or dispatched.active or torch.cuda.is_current_stream_capturing():
            return torch.zeros(self.count, dtype=torch.int32, device=self.device)
        index: Any = self.device.index
        self.key = (index, current_stream(index))
        self.zeros = _held.pop(self.key, None)
        if self.zeros is None or self.zeros.shape[0] < self.count:
            size = max(1 << (self.count - 1).bit_length(), _LEAST)
            self.zeros = torch.zeros(size, dtype=torch.int32, device=self.device)
        return self.zeros

    def __exit__(self, error: Any, *_: Any) -> None:
        if self.key is not None and error is None:
            _held[self.key] = self.zeros  # type: ignore[assignment]
