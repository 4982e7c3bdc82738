"""What te_int8_autocast keeps of a weight: its path, its packed forms, and how calls of known shape are run.

Everything is held by the weight, weakly, and is dropped when the weight changes: an in-place edit, ``.to()``, an optimizer's step.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from teint8 import _torch, ops
from teint8.qtensor import QTensor
from teint8.transforms.pack import pack_weight


class Entry:
    """A packed form of a weight.

    Attributes:
        place: what the weight was when it was packed.
        storage: a weak reference to its memory.
        packed: its codes.
        valid: False once an optimizer stepped the weight, or the cache was cleared.

    """

    __slots__ = ("__weakref__", "_event", "_streams", "packed", "place", "storage", "valid")

    def __init__(self, place: tuple[Any, ...], weight: Tensor, packed: QTensor) -> None:
        self.place, self.storage, self.packed, self.valid = place, _torch.storage_ref(weight), packed, True
        self._streams = {_torch.stream_of(weight.device)}
        self._event = torch.cuda.current_stream(weight.device).record_event() if weight.is_cuda else None

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is as it was packed, in a few checks; its shape, strides and dtype are left to others."""
        place = self.place
        same = self.valid and weight._version == place[0] and weight.data_ptr() == place[1]
        return same and not self.storage.expired()

    def on(self, stream: int) -> bool:
        """Whether a stream, which captures nothing, may read the codes as they are."""
        return self._event is None or stream in self._streams

    def use(self, weight: Tensor) -> QTensor:
        """The codes for what the current stream does next; those that a CUDA graph reads are kept as long as the weight lives."""
        if self._event is None:
            return self.packed
        stream = _torch.stream_of(weight.device)
        if torch.cuda.is_current_stream_capturing():
            # torch.cuda.graph waits for all that was done before, so that there is no event to wait for
            with _lock:
                kept = _captured.setdefault(weight, [])
                kept += [] if any(packed is self.packed for packed in kept) else [self.packed]
        elif stream not in self._streams:
            current = torch.cuda.current_stream(weight.device)
            current.wait_event(self._event)
            for t in (self.packed.codes, self.packed.scale):
                t.record_stream(current)
            self._streams.add(stream)
        return self.packed


class Plan(NamedTuple):
    """What a call of known shape comes to: the rule that decided, what runs it; on the receipt its fields, kernel and bytes."""

    rule: int
    implementation: ops.Implementation
    channels: int
    granularity: str
    generation: int
    line: tuple[tuple[Any, ...], str, int]


class Quick:
    """What a context knows of a weight that it met before: enough to run F.linear again without asking anew."""

    __slots__ = ("bias", "channels", "codes", "entry", "held", "plans", "scale", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, held: "Held", entry: Entry, forget: Callable[[Any], Any]) -> None:
        self.weight, self.bias = weakref.ref(weight, forget), None if bias is None else weakref.ref(bias)
        self.held, self.entry, self.channels = held, entry, weight.shape[:1]
        self.codes, self.scale = entry.packed.rows()
        self.plans: dict[Any, Plan] = {}

    def fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the tensors that were met, and the weight is as it was packed."""
        if self.weight() is not weight or bias is not (None if self.bias is None else self.bias()):
            return False
        if bias is not None and bias.shape != self.channels:
            return False
        return self.entry.is_of(weight) and self.held.place(weight) == self.entry.place


class QuickCalls(dict[int, Quick]):
    """What a context knows of weights, by their ids; unlike a dict it may be referred to weakly."""


class Held:
    """What is kept of a weight: its path, its packed forms by (contracted dimension, granularity), plans by policy and shape."""

    __slots__ = ("convolutions", "packed", "path", "plans", "steps")

    def __init__(self) -> None:
        self.path: str | None = None
        self.packed: dict[tuple[int, str], Entry] = {}
        self.plans: dict[Any, Plan] = {}
        self.convolutions: dict[Any, Any] = {}
        self.steps = 0  # of optimizers: fused ones leave no version

    def place(self, weight: Tensor) -> tuple[Any, ...]:
        """What changes when the weight does: the version counts in-place edits; address and layout tell .to() and .data = ..."""
        return weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, self.steps

    def entry(self, weight: Tensor, axis: int, granularity: str) -> Entry:
        """A packed form: the one that is held while the weight is what was packed, in every way, else a new one.

        While a CUDA graph is captured a new one becomes part of it, made anew at each replay, and is held for nobody else.
        """
        place = self.place(weight)
        entry = self.packed.get((axis, granularity))
        if entry is None or entry.place != place or not entry.is_of(weight):
            with torch.inference_mode(False):
                made = pack_weight(weight, axis, granularity)
            if _torch.is_capturing(weight):
                return Entry(place, weight, made)
            entry = self.packed[axis, granularity] = Entry(place, weight, made)
            follow_optimizers()
        return entry

    def get(self, weight: Tensor, axis: int, granularity: str) -> QTensor:
        """The packed weight of ``entry``."""
        return self.entry(weight, axis, granularity).use(weight)

    def drop(self) -> None:
        """Forget the packed forms, also where somebody else holds on to one."""
        for entry in list(self.packed.values()):
            entry.valid = False
        self.packed.clear()
        self.steps += 1


_held = WeakTensorKeyDictionary()
_captured = WeakTensorKeyDictionary()  # by weight, codes that CUDA graphs read
_lock = threading.Lock()


def held_of(weight: Tensor) -> Held:
    """What is kept of a weight; made when it is met first."""
    held: Held | None = _held.get(weight)
    if held is None:
        with _lock:
            held = _held.setdefault(weight, Held())
    return held  # type: ignore[return-value]


class Followers:
    """Packed forms of what fills some places of a compiled graph, met at every call: of weights that did not change in a few checks.

    Shapes, strides and dtypes are not among them: the guards of the graph hold those. Nothing is kept alive. Where one weight changed
    all are looked up anew.

    Args:
        places: of each weight its place among the arguments, the contracted dimension and the granularity.

    """

    __slots__ = ("_last", "places")

    def __init__(self, places: Sequence[tuple[int, int, str]]) -> None:
        self.places = tuple(places)
        # replaced as a whole: threads may share it
        self._last: list[tuple[int, weakref.ref[Tensor], weakref.ref[Entry]]] | None = None

    def get(self, args: Sequence[Any]) -> list[Tensor]:
        """Codes and scales, one after the other, as ``Held.get`` gives them."""
        return self._known(args) or self._anew(args)

    def _known(self, args: Sequence[Any]) -> list[Tensor] | None:
        """Those of the last call, if they are those of this one."""
        if self._last is None:
            return None
        parts: list[Tensor] = []
        device, stream = None, 0
        for position, ref, entry_ref in self._last:
            weight, entry = ref(), entry_ref()
            if weight is None or args[position] is not weight or entry is None or not entry.is_of(weight):
                return None
            if weight.device != device:
                device = weight.device
                stream = _torch.stream_of(device)
                if _torch.is_capturing(weight):
                    return None
            if not entry.on(stream):
                return None
            parts += (entry.packed.codes, entry.packed.scale)
        return parts

    def _anew(self, args: Sequence[Any]) -> list[Tensor]:
        parts: list[Tensor] = []
        last = []
        for position, axis, granularity in self.places:
            weight = args[position]
            entry = held_of(weight).entry(weight, axis, granularity)
            last.append((position, weakref.ref(weight), weakref.ref(entry)))
            packed = entry.use(weight)
            parts += (packed.codes, packed.scale)
        self._last = last
        return parts


def all_entries() -> list[Entry]:
    """The packed forms of every weight that is alive."""
    with _lock:
        return [entry for held in list(_held.values()) for entry in list(held.packed.values())]


def forget_all() -> None:
    """Forget every weight, also where a context that is entered again remembers it."""
    with _lock:
        for held in list(_held.values()):
            held.drop()
        _held.clear()


@functools.cache
def follow_optimizers() -> None:
    """Drop what is packed of the weights that an optimizer steps: fused optimizers edit them without a new version."""

    def drop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held = _held.get(parameter)
                if held is not None:
                    held.drop()

    register_optimizer_step_post_hook(drop)
