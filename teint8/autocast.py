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

from teint8 import _torch, ops
from teint8.ops import cpu, registry
from teint8.ops.conv_layout import kernel_codes
from teint8.ops.linear import differentiates, weight_codes_of
from teint8.ops.shared import Shared
from teint8.policy import Policy, Rule
from teint8.qtensor import QTensor
from teint8.transforms import callsite
from teint8.transforms.calls import HANDLERS
from teint8.transforms.held import Held, Plan, Quick, all_entries, follow_optimizers, forget_all, held_of
from teint8.transforms.operands import Operand
from teint8.transforms.reasons import mode_of
from teint8.transforms.receipt import Receipt
from teint8.transforms.route import Route


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


class te_int8_autocast(Route):
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

    Example:
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
                value = type(value).__name__ if isinstance(value, nn.Module) else value
                raise TypeError(f"te_int8_autocast: {name} is {value!r}; True or False is needed{hint}")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"te_int8_autocast: policy is {policy!r}; a Policy is needed, such as Policy.training()")
        chosen = _QAT if policy is None else policy
        super().__init__(chosen if enabled else _FLOAT, strict and enabled, Receipt())
        self._policy = None if _torch.is_compiling() else _number(self.policy)
        self.training = training
        # a path depends on the outermost module: it is looked up anew in each context only where rules depend on it
        self._paths_matter = any(rule.path != "*" for rule in self.policy.rules)
        self._paths: Any = WeakTensorKeyDictionary() if self._paths_matter else None
        # codes of norms wait in inference too, where a rule asks for it; the short ways below quantize for themselves
        waits = any("norm" in rule.ops for rule in self.policy.rules)
        self.shared = Shared() if training or waits else None
        self._quick: dict[int, Quick] | None = None if training or self._paths_matter or waits else {}
        self._weight_codes: Any = None  # in training, by weight, until the context ends; made late, for Dynamo traces this

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate: each call of ``function`` runs inside this context."""
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
        self._weight_codes = None
        if exc_type is None:
            self.finish()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _LINEAR and self._quick is not None and not _torch.is_compiling() and not kwargs:
            y = self._again(*args)
            if y is not None:
                return y
        if self._paths_matter and func in HANDLERS:
            return _outside_of_dynamo(self, func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self) -> str:
        return f"te_int8_autocast(training={self.training}, policy={self.policy!r}, strict={self.strict})"

    def operand(self, t: Any) -> Operand | None:
        if isinstance(t, nn.Parameter):
            owner, transposed = t, False
        elif _torch.is_compiling() or not _is_transposed_parameter(t):
            return None
        else:
            owner, transposed = t._base, True
        if _torch.is_compiling() or not _torch.is_plain(owner):
            return Operand(t, "", transposed)
        held = held_of(owner)
        return Operand(t, self._path_of(owner, held), transposed, (owner, held))

    def multiply(
        self, op: str, x: Any, weight: Operand, axis: int, bias: Any, float_call: Any, rows: Any = None, ends: Any = None
    ) -> Any:
        lean = (
            ends is None and weight.held is not None and axis == -1 and rows is None and self.shared is None and _is_inference(x, bias)
        )
        if not lean or self._policy is None or weight.transposed or self._paths_matter or weight.held[0].is_inference():
            return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        owner, held = weight.held
        known = (owner.shape, owner.dtype, owner.device, None if bias is None else (bias.shape, bias.dtype, bias.device))
        key = (self._policy, registry.generation(), op, x.shape, x.dtype, x.device, known)
        plan = held.plans.get(key)
        if plan is None:  # decided by the long way, once
            self._plan(key, op, x, weight, bias)
            return super().multiply(op, x, weight, axis, bias, float_call, rows, ends)
        if not torch.is_inference_mode_enabled():  # a reentrant checkpoint records without gradients
            self.replay_in_checkpoints()
        self._remember(plan, op, x, weight, bias)
        self.matched.add(plan.rule)
        if self.receipt is not None:
            self.receipt.add(plan.fields)
        codes, scale = held.get(owner, -1, plan.granularity).rows()
        y = plan.implementation.run(x.reshape(-1, x.shape[-1]), codes, scale, bias, x.dtype)
        return y.view(*x.shape[:-1], plan.channels)

    def _again(self, x: Any, weight: Any = None, bias: Any = None) -> Tensor | None:
        """F.linear of a weight and a shape that were met before, in inference; None where anything is not as it was."""
        quick = self._quick.get(id(weight))  # type: ignore[union-attr]
        if quick is None or torch.is_grad_enabled() or not quick.fits(weight, bias) or not isinstance(x, Tensor):
            return None
        plan = quick.plans.get((x.shape, x.dtype, x.device))
        if plan is None or plan.generation != registry.generation() or not _torch.are_plain(x) or _torch.forward_ad_level() >= 0:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if not torch.is_inference_mode_enabled():  # a reentrant checkpoint records without gradients
            self.replay_in_checkpoints()
        quick.entry.use(weight)
        self.matched.add(plan.rule)
        if self.receipt is not None:
            self.receipt.add(plan.fields)
        if x.ndim == 2:
            return plan.implementation.run(x, quick.codes, quick.scale, bias, x.dtype)  # type: ignore[no-any-return]
        y = plan.implementation.run(x.reshape(-1, x.shape[-1]), quick.codes, quick.scale, bias, x.dtype)
        return y.view(*x.shape[:-1], plan.channels)  # type: ignore[no-any-return]

    def _remember(self, plan: Plan, op: str, x: Tensor, weight: Operand, bias: Tensor | None) -> None:
        """Let ``_again`` run calls like this one."""
        if self._quick is None or op != "linear":
            return
        owner, held = weight.held
        quick = self._quick.get(id(owner))
        if quick is None or not quick.fits(owner, bias):
            if len(self._quick) >= 4096:
                self._quick.clear()
            known, number = self._quick, id(owner)
            quick = Quick(owner, bias, held, held.entry(owner, -1, "row"), lambda _: known.pop(number, None))
            if _torch.is_capturing(owner):  # codes that are made in a CUDA graph are there when it is replayed
                return
            known[number] = quick
        if len(quick.plans) > 64:
            quick.plans.clear()
        quick.plans[x.shape, x.dtype, x.device] = plan

    def _plan(self, key: Any, op: str, x: Tensor, weight: Operand, bias: Tensor | None) -> None:
        """Keep a plan for calls like this one, if a fused implementation runs them whole."""
        w, held = weight.value, weight.held[1]
        rule = self.rule(weight.path, op)
        if rule is None or rule != Rule(rule.path, rule.ops, gradient=rule.gradient, wgrad=rule.wgrad) or w.ndim != 2:
            return
        fits = x.dtype == w.dtype and x.shape[-1:] == w.shape[-1:] and x.device == w.device
        fits = fits and (bias is None or (bias.shape == w.shape[:1] and bias.is_floating_point() and bias.device == w.device))
        if not fits or 0 in x.shape or 0 in w.shape:
            return
        (n, k), m = w.shape, x.numel() // w.shape[1]
        implementation = registry.best("linear", ops.Problem(x.device.type, x.dtype, 1, m, n, k))
        if implementation is not None:
            if len(held.plans) > 64:
                held.plans.clear()
            fields = (weight.path, op, m, n, k, 1, implementation.name, mode_of(rule), "")
            held.plans[key] = Plan(self.policy.rules.index(rule), implementation, n, "row", registry.generation(), fields)

    def packed(self, weight: Operand, axis: int, granularity: str) -> Operand:
        if self.training or weight.held is None:
            return weight
        owner, held = weight.held
        return weight._replace(value=held.get(owner, axis, granularity)) if _cacheable(owner) else weight

    def weight_codes(self, weight: Operand, value: Any, axis: int, rule: Rule, cut: Any) -> tuple[Tensor, ...] | None:
        """A weight's codes, made once in a context: they serve every microbatch until an optimizer steps."""
        as_held = axis == (-2 if weight.transposed else -1)
        if weight.held is None or not as_held or cut is not None or isinstance(value, QTensor):
            return None
        owner, held = weight.held
        if not self.training or rule.compute != "int8" or rule.weight is None or not _torch.no_dispatch_modes() or owner.is_inference():
            return None
        columns = rule.gradient is not None and differentiates(owner)
        if _torch.is_capturing(owner):  # a CUDA graph quantizes the weight at each replay
            return weight_codes_of(owner, rule.weight.grouping, columns)
        place = (*held.place(owner), rule.weight.grouping, columns, _torch.stream_of(owner.device))
        granularity = rule.weight.grouping
        return self._codes_of(owner, place, lambda: weight_codes_of(owner, granularity, columns))

    def aliased(self, t: Tensor) -> None:
        super().aliased(t)
        if not isinstance(t, nn.Parameter) or _torch.is_compiling():
            return
        held_of(t).drop()
        if self._weight_codes is None:
            self._weight_codes = WeakTensorKeyDictionary()
        self._weight_codes[t] = None  # None: of this one codes are not kept in this context

    def kernel_codes(self, weight: Operand, rule: Rule, call: Any) -> Any:
        if weight.held is None or weight.transposed or isinstance(weight.value, QTensor) or rule.weight is None:
            return None
        owner, held = weight.held
        usable = rule.compute == "int8" and _torch.no_dispatch_modes() and not owner.is_inference()
        if not usable or _torch.is_capturing(owner):
            return None
        granularity, groups = rule.weight.grouping, call.groups
        place = (*held.place(owner), granularity, call.transposed, groups, _torch.stream_of(owner.device))
        return self._codes_of(owner, place, lambda: kernel_codes(owner, granularity, call.transposed, groups))

    def _codes_of(self, owner: Tensor, place: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Codes of a weight, made once in a context for as long as it is what it was."""
        if self._weight_codes is None:
            self._weight_codes = WeakTensorKeyDictionary()
        known = self._weight_codes.get(owner, ((), ()))
        if known is None:
            return make()
        if known[0] != place:
            known = self._weight_codes[owner] = (place, make())
            follow_optimizers()
        return known[1]  # type: ignore[no-any-return]

    def _path_of(self, owner: Tensor, held: Held) -> str:
        if self._paths_matter:
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

        Example:
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


def _is_inference(x: Any, bias: Any) -> bool:
    """Whether nothing but values is wanted: no gradient, transform, tracing or torch.autocast, and real tensors."""
    if torch.is_grad_enabled() or _torch.is_compiling() or not _torch.no_dispatch_modes():
        return False
    if _torch.forward_ad_level() >= 0 or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return False
    return _torch.is_plain(x) and (bias is None or _torch.is_plain(bias))


def _is_transposed_parameter(t: Any) -> bool:
    base = t._base if isinstance(t, Tensor) and t.ndim > 1 else None
    if not isinstance(base, nn.Parameter) or t.data_ptr() != base.data_ptr():
        return False
    return bool(t.shape == base.mT.shape and t.stride() == base.mT.stride())


def _cacheable(weight: Tensor) -> bool:
    """Whether no gradient is wanted of the weight, and its edits can be noticed."""
    if weight.is_inference() or not _torch.no_dispatch_modes():
        return False
    return not (torch.is_grad_enabled() and weight.requires_grad) and _torch.forward_ad_level() < 0
