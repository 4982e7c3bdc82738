"""``quantize``: a model or a function as an INT8 function of its parameters."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from teint8 import _torch
from teint8.conditioning import Conditioned
from teint8.ops.shared import Shared
from teint8.policy import Policy, Rule, shown
from teint8.qtensor import QTensor
from teint8.transforms.operands import Operand
from teint8.transforms.receipt import Receipt
from teint8.transforms.route import Route
from teint8.transforms.trees import is_weight, leaf_paths

_TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__, torch.transpose, Tensor.transpose}  # type: ignore[attr-defined]
_VALUES = {*_TRANSPOSES, Tensor.H.__get__, Tensor.mH.__get__, Tensor.data.__get__, Tensor.real.__get__, Tensor.imag.__get__}  # type: ignore[attr-defined]
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_SHAPES = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.ndimension, Tensor.stride, Tensor.is_contiguous, Tensor.data_ptr, Tensor.get_device,
}  # fmt: skip


def looks(func: Any) -> bool:
    """Whether a call looks at a tensor without its values: codes answer it as the weight does, but for its dtype."""
    return func in _SHAPES or (getattr(func, "__name__", "") == "__get__" and func not in _VALUES)


class BoundRoute(Route):
    """A route for a call whose weights are known by name: the leaves of its params.

    ``functional_call`` binds the very tensors that it is given, so a dict keyed by tensors finds a weight's path and its packed
    form, in eager mode, under Dynamo and under torch.func.

    Attributes:
        known: for each tensor that stands for a weight in the program (a float leaf, or the codes of a packed one), its Operand.
        packed_leaves: whether any leaf is packed, so that other calls must be looked through for codes.

    """

    def __init__(self, policy: Policy, strict: bool, receipt: Receipt | None) -> None:
        super().__init__(policy, strict, receipt)
        self.known: dict[Tensor, Operand] = {}
        self.shared = Shared()
        self.packed_leaves = False
        self.rebind: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    def bind(self, path: str, leaf: Any) -> Any:
        """Remember a leaf; what the program gets in its place."""
        if isinstance(leaf, Conditioned):
            stands = self.bind(path, leaf.weight)
            self.known[stands] = self.known[stands]._replace(conditioning=leaf)
            return stands
        if isinstance(leaf, QTensor):
            self.packed_leaves = True
            self.known[leaf.codes] = Operand(leaf, path)
            return leaf.codes
        if isinstance(leaf, Tensor):
            self.known[leaf] = Operand(leaf, path)
        return leaf

    def operand(self, t: Any) -> Operand | None:
        return self.known.get(t)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        first = self.known.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if first is not None and func in _TRANSPOSES:
            result = func(*args, **kwargs)
            if result.ndim >= 2 and result.shape == args[0].mT.shape and result.stride() == args[0].mT.stride():
                value = first.value if isinstance(first.value, QTensor) else result
                self.known[result] = first._replace(value=value, transposed=not first.transposed)
                return result
        if first is not None and func is Tensor.data_ptr:  # nn.LSTM asks on a GPU, also under torch.func, whose wrappers have none
            return _torch.unwrapped(args[0]).data_ptr()
        if not self.packed_leaves or (first is not None and looks(func)):
            packed = first is not None and isinstance(first.value, QTensor)
            # method wrappers are made anew at each access: they are equal, not the same
            return first.value.dtype if packed and func == _DTYPE else func(*args, **kwargs)  # type: ignore[union-attr]
        if not self._may_hold_codes(args) and not (kwargs and self._may_hold_codes(kwargs.values())):
            return func(*args, **kwargs)
        return func(*self.plain(args), **self.plain(kwargs))

    def _may_hold_codes(self, args: Iterable[Any]) -> bool:
        """Whether a call must be looked through for packed weights."""
        for arg in args:  # noqa: SIM110  # a generator would take twice the time
            if arg in self.known if isinstance(arg, Tensor) else isinstance(arg, (tuple, list, dict)):
                return True
        return False

    def plain(self, args: Any) -> Any:
        if not self.packed_leaves:
            return args
        if isinstance(args, Tensor):
            operand = self.known.get(args)
            if operand is None or not isinstance(operand.value, QTensor):
                return args
            self._met_elsewhere(operand.path)
            if self.receipt is not None:
                n, k = operand.value.shape[-2:]
                self.receipt.add(
                    (operand.path, "other", 0, n, k, 1, "float", "", "packed, in an op that is not taken over: dequantized")
                )
            value = (operand.conditioning or operand.value).dequantize()
            return value.mT if operand.transposed else value
        if isinstance(args, dict):
            return {key: self.plain(value) for key, value in args.items()}
        return type(args)([self.plain(value) for value in args]) if type(args) in (tuple, list) else args

    def _met_elsewhere(self, path: str) -> None:
        """Tell of a packed weight in an op that is not taken over: dequantized there, it gives other bits than the float weight."""
        rules = [self.policy.match(path, op) for op in Rule().ops]
        if self.comparing or not any(rule is not None and rule.weight is not None for rule in rules):
            return
        what = (
            f"{path} is packed, and is used by an op that is not taken over, or in another way than it was packed for: it is "
            "dequantized there, with other bits than the float weight gives"
        )
        hint = "pack(qfn, params, *example_inputs) looks at every use, and leaves such a weight in float"
        if self.strict:
            raise ValueError(f"strict: {what}; {hint}")
        if not _torch.is_compiling():
            warnings.warn(f"teint8: {what}; {hint}", stacklevel=2)

    def replaying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return super().replaying(function if self.rebind is None else self.rebind(function))


class _Shell(nn.Module):
    """Runs a function while a module's parameters are rebound: ``functional_call`` wants a module whose forward it is."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def quantize(module_or_fn: nn.Module | Callable[..., Any], policy: Policy | None = None, *, strict: bool = False) -> Callable[..., Any]:
    """A pure function that runs ``module_or_fn`` with its matmuls in INT8 by the rules of ``policy``.

    The module is never touched, and nothing is registered: the result is a function of its inputs, under torch.func.grad,
    vmap, jvp and torch.compile as in eager mode. It takes float parameters (training) and packed ones (inference), and gives
    the same bits for both.

    Args:
        module_or_fn: an nn.Module, or a pure function whose first argument is a pytree of parameters.
        policy: which calls run in INT8, and how; ``Policy.qat()`` unless given.
        strict: raise where a rule wants INT8 and the call cannot run so, and for a rule that matches no call.

    Buffers that are not given are the module's own; one that the module writes (BatchNorm in training) is then written there.

    Returns:
        For a module, ``qfn(params, *args, **kwargs)``, where params is a dict of its parameters by name, or a tuple of such dicts
        (parameters, buffers). For a function, one of the same signature.

    Raises:
        TypeError: not a module or function, or not a Policy. When called, ValueError: params that do not fit the module.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> qfn = quantize(model)
        >>> params = dict(model.named_parameters())
        >>> loss = lambda p: qfn(p, torch.ones(3, 4)).square().mean()
        >>> grads = torch.func.grad(loss)(params)
        >>> {name: tuple(g.shape) for name, g in grads.items()}
        {'weight': (2, 4), 'bias': (2,)}

    """
    policy = Policy.qat() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"quantize: policy is {shown(policy)}; a Policy is needed, such as Policy.qat(), the default")
    if not isinstance(strict, bool):
        raise TypeError(f"quantize: strict is {shown(strict)}; True or False is needed")
    if isinstance(module_or_fn, type) and issubclass(module_or_fn, nn.Module):
        raise TypeError(f"quantize: {module_or_fn.__name__} is a class; a module is needed, {module_or_fn.__name__}(...)")
    if isinstance(module_or_fn, nn.Module):
        call = functools.partial(call_module, module_or_fn)
    elif callable(module_or_fn):
        call = functools.partial(_call_function, module_or_fn)
    else:
        raise TypeError(f"quantize: what was given, {shown(module_or_fn)}, is neither an nn.Module nor a function")

    def qfn(params: Any, *args: Any, **kwargs: Any) -> Any:
        route = BoundRoute(policy, strict, None)
        y = call(route, params, args, kwargs)
        route.finish()
        return y

    qfn.__name__ = qfn.__qualname__ = f"quantized_{getattr(module_or_fn, '__name__', type(module_or_fn).__name__)}"
    qfn.__doc__ = "Made by teint8.quantize: a pure function of its parameters, which come first."
    qfn.__wrapped__ = module_or_fn  # type: ignore[attr-defined]
    qfn.policy = policy  # type: ignore[attr-defined]
    qfn.strict = strict  # type: ignore[attr-defined]
    return qfn


def run(qfn: Any, route: BoundRoute, params: Any, args: Any, kwargs: Any) -> Any:
    """Call a quantized function under a route of one's own, which must have its policy.

    Raises:
        TypeError: ``qfn`` is not a result of ``quantize``.

    """
    target = quantized(qfn)
    call = call_module if isinstance(target, nn.Module) else _call_function
    return call(target, route, params, args, kwargs)


def quantized(qfn: Any) -> Any:
    """The module or function that ``qfn`` was made from.

    Raises:
        TypeError: ``qfn`` is not a result of ``quantize``.

    """
    target = getattr(qfn, "__wrapped__", None)
    while isinstance(getattr(target, "policy", None), Policy):  # torch.compile wraps what quantize made
        target = getattr(target, "__wrapped__", None)
    if target is None or not isinstance(getattr(qfn, "policy", None), Policy):
        raise TypeError(f"{type(qfn).__name__} is not a quantized function; make one with teint8.quantize(model)")
    return target


def of_module(qfn: Any) -> bool:
    """Whether ``qfn`` was made from a module, whose params may be a tuple (parameters, buffers)."""
    return isinstance(quantized(qfn), nn.Module)


def call_module(module: nn.Module, route: BoundRoute, params: Any, args: Any, kwargs: Any) -> Any:
    """Call a module under a route, its parameters replaced by those of ``params``."""
    groups = params if isinstance(params, tuple) else (params,)
    check_params(module, groups)
    bound = {path: route.bind(path, leaf) for group in groups for path, leaf in group.items()}
    if not _torch.is_compiling():

        def rebind(function: Callable[..., Any]) -> Callable[..., Any]:
            names = {f"module.{path}": leaf for path, leaf in bound.items()}
            return lambda *a, **k: torch.func.functional_call(_Shell(module, function), names, a, k)

        route.rebind = rebind
    with route:
        return torch.func.functional_call(module, bound, args, kwargs)


def _call_function(function: Callable[..., Any], route: BoundRoute, params: Any, args: Any, kwargs: Any) -> Any:
    leaves, spec = torch_pytree.tree_flatten(params, is_leaf=is_weight)
    paths = leaf_paths(params)
    bound = [route.bind(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    with route:
        return function(torch_pytree.tree_unflatten(bound, spec), *args, **kwargs)


def check_params(module: nn.Module, groups: tuple[Any, ...], complete: bool = True) -> None:
    """Raise for params that are not those of the module: unknown or (where they must be ``complete``) missing names, other shapes."""
    for group in groups:
        if not isinstance(group, Mapping):
            of_a_file = "; of what load_packed returns give .params" if group is None or isinstance(group, Policy) else ""
            raise TypeError(
                f"quantized {type(module).__name__}: params is a {type(group).__name__}; a dict of tensors by name is needed, "
                f"dict(model.named_parameters()), or a tuple of such dicts: (params, buffers){of_a_file}"
            )
    if _torch.is_compiling():
        return
    own, missing, absent = _look_through(module, groups)
    for group in groups:
        for path, leaf in group.items():
            _check_leaf(module, path, leaf, own.get(path))
    if complete and missing:
        raise ValueError(
            f"quantized {type(module).__name__}: params lacks {', '.join(map(repr, missing[:5]))}; a pure function takes all of its "
            "parameters, dict(model.named_parameters()), also those that are not differentiated"
        )
    if complete and absent:
        _check_buffers(module, absent, groups)


def _look_through(module: nn.Module, groups: tuple[Any, ...]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The module's own tensors by path; parameters that no group has, and buffers on the meta device, which has no values."""
    own: dict[str, Tensor] = {}
    missing, absent, seen = [], [], set()
    for path, tensor, is_buffer in _members(module):
        own[path] = tensor
        tied = id(tensor) in seen  # the first is enough
        seen.add(id(tensor))
        if tied or any(path in group for group in groups):
            continue
        if not is_buffer:
            missing.append(path)
        elif tensor.is_meta:
            absent.append(path)
    return own, missing, absent


def _check_buffers(module: nn.Module, absent: list[str], groups: tuple[Any, ...]) -> None:
    """Raise for buffers that would be taken from the module and hold no values there: torch may compute garbage from them."""
    if not all(leaf.device.type == "meta" for group in groups for leaf in group.values() if hasattr(leaf, "device")):
        raise ValueError(
            f"quantized {type(module).__name__}: the module's buffers {', '.join(map(repr, absent[:5]))} "
            "are on the meta device, which holds no values; give them: (params, buffers), where buffers is dict(model.named_buffers()) "
            "of a model that has them"
        )


def _members(module: nn.Module) -> Iterable[tuple[str, Tensor, bool]]:
    """Parameters, and buffers (True), by path; a module may have names of its own for them."""
    if type(module).named_parameters is nn.Module.named_parameters and type(module).named_buffers is nn.Module.named_buffers:
        return _torch.members(module)
    named = ((module.named_parameters, False), (module.named_buffers, True))
    return ((path, tensor, is_buffer) for names, is_buffer in named for path, tensor in names())


def _check_leaf(module: nn.Module, path: str, leaf: Any, own: Tensor | None) -> None:
    owner, _, name = path.rpartition(".")
    if name == "_extra_state":  # state_dict has it of modules that keep more than tensors
        return
    try:
        own = getattr(module.get_submodule(owner), name) if own is None else own
    except AttributeError:
        raise ValueError(
            f"quantized {type(module).__name__}: it has no parameter or buffer {path!r}; are these the params of another model?"
        ) from None
    if is_lazy(own):
        raise ValueError(
            f"quantized {type(module).__name__}: {path} has no shape yet; run the module once, as torch's lazy modules need"
        )
    if not isinstance(leaf, Tensor) and not is_weight(leaf):
        raise TypeError(
            f"quantized {type(module).__name__}: {path} is a {type(leaf).__name__}; a tensor or a QTensor is needed, such as "
            "torch.as_tensor(...)"
        )
    if is_weight(leaf) and leaf.shape != own.shape:
        raise ValueError(
            f"quantized {type(module).__name__}: {path} has shape {tuple(own.shape)} but {leaf!r} was given; "
            "is it the QTensor of another layer?"
        )
