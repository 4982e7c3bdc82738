"""``te_int8_autocast``: the stateful shell. It keeps a policy, a receipt and a cache of packed weights, and nothing else."""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from teint8 import _torch
from teint8.policy import Policy
from teint8.qtensor import QTensor
from teint8.transforms import callsite
from teint8.transforms.pack import pack_weight
from teint8.transforms.receipt import Receipt
from teint8.transforms.route import Operand, Route


class CacheInfo(NamedTuple):
    """What the cache of packed weights holds: how many, and their bytes."""

    weights: int
    nbytes: int


class _Entry(NamedTuple):
    version: int
    storage: Any
    place: tuple[Any, ...]
    packed: QTensor


class _Cache:
    """Packed weights by weight, held weakly; an entry counts while the weight is the tensor that was packed, in every way."""

    def __init__(self) -> None:
        self.entries = WeakTensorKeyDictionary()
        self.lock = threading.Lock()

    def get(self, weight: Tensor, axis: int, granularity: str) -> QTensor:
        with self.lock:
            held = self.entries.setdefault(weight, {})
        entry = held.get((axis, granularity))
        # the version counts in-place edits; a storage, device, dtype or shape of its own tells .to() and .data = ...
        place = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)
        if entry is not None and entry.version == weight._version and entry.place == place and not entry.storage.expired():
            packed: QTensor = entry.packed
            return packed
        version = weight._version
        with torch.inference_mode(False):
            made = pack_weight(weight, axis, granularity)
        held[(axis, granularity)] = _Entry(version, _torch.storage_ref(weight), place, made)
        return made


_cache = _Cache()


class te_int8_autocast(Route):
    """Run matmuls in INT8 inside a ``with`` block, or in a decorated function; the model is not an argument and is not edited.

    Args:
        training: True for training: weights are quantized at each call, and gradients flow to the float weights. False for inference:
            each weight is packed once and reused until it changes (optimizer step, in-place edit, load_state_dict, ``.to()``). The
            results have the same bits. Edits through ``weight.data`` are seen by no version counter: call
            ``te_int8_autocast.cache_clear()`` after them.
        policy: which calls run in INT8, and how; ``Policy.qat()`` unless given. Paths are those of ``named_parameters`` of the
            outermost module that is running.
        enabled: False runs in float, also inside of another context.
        strict: raise where a rule wants INT8 and the call cannot run so, and for a rule that matched no call.

    Attributes:
        receipt: what ran so far, and how.

    Contexts nest, the innermost counts; they belong to the thread that entered them. ``loss.backward()`` may follow outside, also
    through torch.utils.checkpoint.

    Raises:
        TypeError: an argument of another type.

    Example:
        >>> model = nn.Linear(64, 10)
        >>> with torch.no_grad(), te_int8_autocast(training=False) as ctx:
        ...     y = model(torch.ones(8, 64))
        >>> [(r.path, r.int8) for r in ctx.receipt]
        [('weight', True)]
    """

    def __init__(
        self, training: bool = True, *, policy: Policy | None = None, enabled: bool = True, strict: bool = False
    ) -> None:
        for name, value in (("training", training), ("enabled", enabled), ("strict", strict)):
            if not isinstance(value, bool):
                hint = "; as a decorator write @te_int8_autocast()" if callable(value) else ""
                raise TypeError(f"te_int8_autocast: {name} is {value!r}; True or False is needed{hint}")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"te_int8_autocast: policy is {policy!r}; a Policy is needed, such as Policy.training()")
        chosen = Policy.qat() if policy is None else policy
        super().__init__(chosen if enabled else Policy(), strict and enabled, Receipt())
        self.training = training
        self.replays_reentrant = training
        self._paths = WeakTensorKeyDictionary()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate: each call of ``function`` runs inside this context."""
        if not callable(function):
            raise TypeError(f"te_int8_autocast: {function!r} cannot be decorated; a function is needed")

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            self.check_matched()

    def operand(self, t: Any) -> Operand | None:
        if isinstance(t, nn.Parameter):
            return Operand(t)
        base = t._base if isinstance(t, Tensor) and not torch.compiler.is_compiling() else None
        if isinstance(base, nn.Parameter) and t.ndim > 1 and t.data_ptr() == base.data_ptr() and _swapped(t, base):
            return Operand(t, transposed=True)
        return None

    def path(self, weight: Operand) -> str:
        if torch.compiler.is_compiling():
            self._check_paths()
            return "?"
        value = weight.value
        if isinstance(value, QTensor):
            return "?"
        owner = value._base if weight.transposed else value
        if not isinstance(owner, nn.Parameter):
            return callsite.line_of_call()
        path: str | None = self._paths.get(owner)
        if path is None:
            path = self._paths[owner] = callsite.path_of(owner)
        return path

    def packed(self, weight: Operand, axis: int, granularity: str) -> Operand:
        if self.training or torch.compiler.is_compiling() or isinstance(weight.value, QTensor):
            return weight
        owner = weight.value._base if weight.transposed else weight.value
        if not isinstance(owner, Tensor) or not _cacheable(owner):
            return weight
        return weight._replace(value=_cache.get(owner, axis, granularity))

    def _check_paths(self) -> None:
        if any(rule.path != "*" for rule in self.policy.rules):
            raise ValueError(
                "te_int8_autocast: in compiled code there is no stack to read a weight's path from, and the policy has rules "
                "with paths; compile teint8.quantize(model, policy) instead, which knows them"
            )

    @staticmethod
    def cache_info() -> CacheInfo:
        """How many packed weights the cache holds, and their bytes; they go with their weights.

        Example:
            >>> te_int8_autocast.cache_clear()
            >>> te_int8_autocast.cache_info()
            CacheInfo(weights=0, nbytes=0)
        """
        with _cache.lock:
            entries = [entry for held in list(_cache.entries.values()) for entry in list(held.values())]
        return CacheInfo(len(entries), sum(entry.packed.nbytes for entry in entries))

    @staticmethod
    def cache_clear() -> None:
        """Forget every packed weight."""
        with _cache.lock:
            _cache.entries.clear()


def _swapped(t: Tensor, base: Tensor) -> bool:
    return t.shape == base.mT.shape and t.stride() == base.mT.stride()


def _cacheable(weight: Tensor) -> bool:
    """Whether no gradient is wanted of the weight, and its edits can be noticed."""
    if not _torch.is_plain(weight) or weight.is_inference() or not _torch.no_dispatch_modes():
        return False
    return not (torch.is_grad_enabled() and weight.requires_grad) and _torch.forward_ad_level() < 0
