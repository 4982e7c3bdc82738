"""What te_int8_autocast keeps of a weight: its path, its packed forms, and how calls of known shape are run.

Everything is held by the weight, weakly, and is dropped when the weight changes: an in-place edit, ``.to()``, an optimizer's step.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from teint8 import _torch, ops
from teint8.qtensor import QTensor
from teint8.transforms.pack import pack_weight


class Entry(NamedTuple):
    """A packed form of a weight: what the weight was when it was packed, a weak reference to its storage, the codes."""

    place: tuple[Any, ...]
    storage: Any
    packed: QTensor


class Plan(NamedTuple):
    """What a call of known shape comes to: the rule that decided, what runs it, and its line on the receipt."""

    rule: int
    implementation: ops.Implementation
    channels: int
    granularity: str
    generation: int
    fields: tuple[Any, ...]


class Quick:
    """What a context knows of a weight that it met before: enough to run F.linear again without asking anew."""

    __slots__ = ("bias", "codes", "entry", "held", "plans", "scale", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, held: "Held", entry: Entry, forget: Callable[[Any], Any]) -> None:
        self.weight, self.bias = weakref.ref(weight, forget), None if bias is None else weakref.ref(bias)
        self.held, self.entry = held, entry
        self.codes, self.scale = entry.packed.rows()
        self.plans: dict[Any, Plan] = {}

    def fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the tensors that were met, and the weight is as it was packed."""
        if self.weight() is not weight or bias is not (None if self.bias is None else self.bias()):
            return False
        place, entry = self.entry.place, self.held.packed.get((-1, "row"))
        same = weight._version == place[1] and weight.data_ptr() == place[2] and weight.shape == place[3]
        return same and entry is self.entry and not entry.storage.expired() and self.held.place(weight) == place


class Held:
    """What is kept of a weight: its path, its packed forms by (contracted dimension, granularity), plans by policy and shape."""

    __slots__ = ("packed", "path", "plans", "steps")

    def __init__(self) -> None:
        self.path: str | None = None
        self.packed: dict[tuple[int, str], Entry] = {}
        self.plans: dict[Any, Plan] = {}
        self.steps = 0  # of optimizers: fused ones leave no version

    def place(self, weight: Tensor) -> tuple[Any, ...]:
        """What changes when the weight does: the version counts in-place edits; address and layout tell .to() and .data = ..."""
        return self.steps, weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype

    def get(self, weight: Tensor, axis: int, granularity: str) -> QTensor:
        """The packed weight: the one that is held while the weight is what was packed, in every way, else a new one."""
        place = self.place(weight)
        entry = self.packed.get((axis, granularity))
        if entry is None or entry.place != place or entry.storage.expired():
            with torch.inference_mode(False):
                made = pack_weight(weight, axis, granularity)
            entry = self.packed[axis, granularity] = Entry(place, _torch.storage_ref(weight), made)
            follow_optimizers()
        return entry.packed


_held = WeakTensorKeyDictionary()
_lock = threading.Lock()


def held_of(weight: Tensor) -> Held:
    """What is kept of a weight; made when it is met first."""
    held: Held | None = _held.get(weight)
    if held is None:
        with _lock:
            held = _held.setdefault(weight, Held())
    return held  # type: ignore[return-value]


class Follower:
    """A packed form of what fills one place of a compiled graph, met at every call: of a weight that did not change in a few checks.

    Shapes, strides and dtypes are not among them: the guards of the graph hold those.
    """

    __slots__ = ("_last", "axis", "granularity")

    def __init__(self, axis: int, granularity: str) -> None:
        self.axis, self.granularity = axis, granularity
        self._last: tuple[weakref.ref[Tensor], Held, Entry] | None = None  # replaced as a whole: threads may share it

    def get(self, weight: Tensor) -> QTensor:
        """The packed weight, as ``Held.get`` gives it."""
        last = self._last
        if last is not None and last[0]() is weight:
            _, held, entry = last
            steps, version, address, *_ = entry.place
            same = held.steps == steps and weight._version == version and weight.data_ptr() == address
            if same and held.packed.get((self.axis, self.granularity)) is entry and not entry.storage.expired():
                return entry.packed
        held = held_of(weight)
        packed = held.get(weight, self.axis, self.granularity)
        self._last = weakref.ref(weight), held, held.packed[self.axis, self.granularity]
        return packed


def all_entries() -> list[Entry]:
    """The packed forms of every weight that is alive."""
    with _lock:
        return [entry for held in list(_held.values()) for entry in list(held.packed.values())]


def forget_all() -> None:
    """Forget every weight, also where a context that is entered again remembers it."""
    with _lock:
        for held in list(_held.values()):
            held.packed.clear()
            held.steps += 1
        _held.clear()


@functools.cache
def follow_optimizers() -> None:
    """Drop what is packed of the weights that an optimizer steps: fused optimizers edit them without a new version."""

    def drop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held = _held.get(parameter)
                if held is not None:
                    held.packed.clear()
                    held.steps += 1

    register_optimizer_step_post_hook(drop)
