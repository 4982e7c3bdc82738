"""``te_int8_autocast``: the stateful shell. It keeps a policy, a receipt and a cache of packed weights, and nothing else."""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from teint8 import _torch
from teint8._compilers import never_compiled_alone
from teint8.ops import cpu
from teint8.ops.shared import Shared
from teint8.policy import Policy, shown
from teint8.transforms import callsite
from teint8.transforms.again import Again
from teint8.transforms.again_conv import ConvolvesAgain
from teint8.transforms.calls import HANDLERS
from teint8.transforms.convolutions import CONVOLUTIONS
from teint8.transforms.held import Held, QuickCalls, all_entries, forget_all, held_of
from teint8.transforms.operands import Operand
from teint8.transforms.receipt import Receipt
from teint8.transforms.route import Route
from teint8.transforms.weight_codes import KeepsCodes


class CacheInfo(NamedTuple):
    """What the cache of packed weights holds: how many, and their bytes."""

    weights: int
    nbytes: int


_LINEAR = torch.nn.functional.linear
_lock = threading.Lock()
_policies: dict[Policy, int] = {}  # numbers for policies: a number is quick to hash
_QAT, _FLOAT = Policy.qat(), Policy()


@torch.compiler.disable(reason="te_int8_autocast has rules with paths; compile teint8.quantize(model, policy), which knows them")  # type: ignore[untyped-decorator]
def _outside_of_dynamo(route: Route, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Paths are read from the modules on the Python stack, and compiled code has none."""
    return Route.__torch_function__(route, func, types, args, kwargs)


class te_int8_autocast(Again, ConvolvesAgain, KeepsCodes):
    """Run matmuls in INT8 inside a ``with`` block, or in a decorated function; the model is not an argument and is not edited.

    Args:
        training: True for training: a weight is quantized once in a context for as long as it is unedited (so once for all microbatches
            of an optimizer step that share a context), and gradients flow to the float weights. False for inference:
            each weight is packed once and reused until it changes (optimizer step, in-place edit, load_state_dict, ``.to()``). The
            results have the same bits. Edits through ``weight.data`` are seen by no version counter: call
            ``te_int8_autocast.cache_clear()`` after them.
        policy: which calls run in INT8, and how; ``Policy.qat()`` unless given. Paths are those of ``named_parameters`` of the
            outermost module that is running.
        enabled: False runs in float, also inside of another context.
        strict: raise where a rule wants INT8 and the call cannot run so, and for a rule that matched no call.

    Attributes:
        receipt: what ran so far, and how.

    In compiled code calls are not recorded, and a policy with paths runs outside of the graph: compile
    ``teint8.quantize(model, policy)`` instead, which knows the paths of its parameters.

    Contexts nest, the innermost counts; they belong to the thread that entered them. ``loss.backward()`` may follow outside, also
    through torch.utils.checkpoint.

    Raises:
        TypeError: an argument of another type.

    Examples:
        >>> model = nn.Linear(64, 10)
        >>> with torch.no_grad(), te_int8_autocast(training=False) as ctx:
        ...     y = model(torch.ones(8, 64))
        >>> [(r.path, r.int8) for r in ctx.receipt]
        [('weight', True)]

    """

    def __init__(self, training: bool = True, *, policy: Policy | None = None, enabled: bool = True, strict: bool = False) -> None:
        for name, value in (("training", training), ("enabled", enabled), ("strict", strict)):
            if not isinstance(value, bool):
                hint = "; as a decorator write @te_int8_autocast()" if callable(value) else ""
                hint = "; the model is not an argument: call it inside of the context" if isinstance(value, nn.Module) else hint
                hint = "; write te_int8_autocast(policy=...)" if isinstance(value, Policy) else hint
                text = type(value).__name__ if isinstance(value, nn.Module) else shown(value)
                raise TypeError(f"te_int8_autocast: {name} is {text}; True or False is needed{hint}")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"te_int8_autocast: policy is {shown(policy)}; a Policy is needed, such as Policy.qat(), the default")
        chosen = _QAT if policy is None else policy
        super().__init__(chosen if enabled else _FLOAT, strict and enabled, Receipt())
        self.policy_number = None if _torch.is_compiling() else _number(self.policy)
        self.training = training
        # a path depends on the outermost module: it is looked up anew in each context only where rules depend on it
        self.paths_matter = any(rule.path != "*" for rule in self.policy.rules)
        self._paths: Any = WeakTensorKeyDictionary() if self.paths_matter else None
        # codes of norms wait in inference too, where a rule asks for it; the short ways below quantize for themselves
        waits = any("norm" in rule.ops for rule in self.policy.rules)
        self.shared = Shared() if training or waits else None
        keeps = not (training or self.paths_matter or waits) and self.policy_number is not None and bool(self.policy.rules)
        self.quick = QuickCalls() if keeps else None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate: each call of ``function`` runs inside this context.

        Args:
            function: any but a generator or a coroutine.

        Returns:
            A function of the same signature.

        Raises:
            TypeError: it is not callable, or a generator or a coroutine, which would run after the call.

        """
        if not callable(function):
            raise TypeError(f"te_int8_autocast: {function!r} cannot be decorated; a function is needed")

        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"te_int8_autocast: {function.__qualname__} is a generator or a coroutine, which runs after the call; "
                "write the with block inside of it"
            )

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if _torch.is_compiling() or self._entered():
            return
        if self.shared is not None:
            self.shared.clear()
        self.made = None
        if exc_type is None:
            self.finish()

    @never_compiled_alone
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _LINEAR and self.quick is not None and not _torch.is_compiling() and not kwargs:
            y = self._again(*args)
            if y is not None:
                return y
        if self.quick is not None and func in CONVOLUTIONS and not _torch.is_compiling() and not kwargs:
            y = self.convolve_again(func, args)
            if y is not None:
                return y
        if self.paths_matter and func in HANDLERS:
            return _outside_of_dynamo(self, func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self) -> str:
        return f"te_int8_autocast(training={self.training}, policy={self.policy!r}, strict={self.strict})"

    def operand(self, t: Any) -> Operand | None:
        if isinstance(t, nn.Parameter):
            owner, transposed = t, False
        elif _is_transposed_parameter(t):
            owner, transposed = t._base, True
        else:
            return None
        if _torch.is_compiling() or not _torch.is_plain(owner):
            return Operand(t, "", transposed)
        held = held_of(owner)
        return Operand(t, self._path_of(owner, held), transposed, (owner, held))

    def packed(self, weight: Operand, axis: int, granularity: str) -> Operand:
        if self.training or weight.held is None:
            return weight
        owner, held = weight.held
        return weight._replace(value=held.get(owner, axis, granularity)) if _cacheable(owner) else weight

    def _path_of(self, owner: Tensor, held: Held) -> str:
        if self.paths_matter:
            root = callsite.root_module()
            seen, path = self._paths.get(owner, (None, ""))
            if seen is None or seen() is not root:
                path = callsite.path_of(owner)
                self._paths[owner] = (_weak(root), path)
            return str(path)
        if held.path is None:
            held.path = callsite.path_of(owner)
        return held.path

    @staticmethod
    def cache_info() -> CacheInfo:
        """How many packed weights the cache holds, and their bytes; they go with their weights.

        Examples:
            >>> te_int8_autocast.cache_clear()
            >>> te_int8_autocast.cache_info()
            CacheInfo(weights=0, nbytes=0)

        """
        entries = all_entries()
        return CacheInfo(len(entries), sum(entry.packed.nbytes for entry in entries))

    @staticmethod
    def cache_clear() -> None:
        """Forget every packed weight, and give back the memory that this thread keeps for results on the CPU."""
        forget_all()
        cpu.release()


def _number(policy: Policy) -> int:
    with _lock:
        return _policies.setdefault(policy, len(_policies))


def _weak(root: nn.Module | None) -> Callable[[], nn.Module | None]:
    return (lambda: None) if root is None else weakref.ref(root)


def _is_transposed_parameter(t: Any) -> bool:
    base = t._base if isinstance(t, Tensor) and t.ndim > 1 else None
    if not isinstance(base, nn.Parameter):
        return False
    if not _torch.is_compiling() and t.data_ptr() != base.data_ptr():  # tensors that are traced have no address
        return False
    return bool(t.shape == base.mT.shape and t.stride() == base.mT.stride())


def _cacheable(weight: Tensor) -> bool:
    """Whether no gradient is wanted of the weight, and its edits can be noticed."""
    if weight.is_inference() or not _torch.no_dispatch_modes():
        return False
    return not (torch.is_grad_enabled() and weight.requires_grad) and _torch.forward_ad_level() < 0
