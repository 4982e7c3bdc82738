"""Every private API of torch's compilers (Dynamo, AOTAutograd, Inductor) that teint8 leans on; those of torch itself are in ``_torch``.

Each with the versions it was seen on (2.11, 2.13) and a test.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from teint8._torch import number


def inductor(gm: Any, inputs: Any, mode: str | None, options: dict[str, Any], passes: Sequence[Callable[[fx.Graph], None]]) -> Any:
    """Compile a graph by Inductor with a mode of torch.compile's and options of Inductor's. Seen on torch 2.11 and 2.13.

    Values are rounded to their dtype where eager mode rounds them, unless the options say otherwise: what is quantized is the same.
    ``passes`` edit the graph before the caller's own ``post_grad_custom_post_pass`` does, and GELU and LayerNorm on a CPU are torch's.
    Both are left out where torch takes one pass alone (2.11) and the caller has one, and with the C++ wrapper.
    """
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.virtualized import V

    def inner(*args: Any, **kwargs: Any) -> Any:
        with V.set_choices_handler(rows_at_once(V.choices)):
            return compile_fx_inner(*args, **kwargs)

    ours = {"emulate_precision_casts": True}
    patches = {
        **ours,
        **(list_mode_options(mode) if mode else {}),
        **{name.replace("-", "_"): value for name, value in options.items()},
    }
    theirs = patches.get("post_grad_custom_post_pass", config.post_grad_custom_post_pass)
    together = _passes(passes, theirs)
    # the C++ wrapper knows no op that takes a list of tensors, as one of ours does
    if together is None or patches.get("cpp_wrapper", config.cpp_wrapper):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)
    patches["post_grad_custom_post_pass"] = together
    with _whole():
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)


_lock, _compiles = threading.Lock(), [0]


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """GELU and LayerNorm on a CPU are not decomposed by Inductor's tables: they are torch's own kernels, as in eager mode.

    Inductor's have other last bits, and others again for a single row; its GELU is slower. The tables are edited, for another one that
    is handed to Inductor would keep it from its cache, which knows these graphs by our pass. Seen on torch 2.11 and 2.13.
    """
    from torch._inductor import decomposition

    tables, plain = (decomposition.decompositions, decomposition.fast_random_decomps()), _plain()
    with _lock:  # whoever comes first edits, whoever leaves last mends
        _compiles[0] += 1
        for table in tables:
            table.update({op: functools.partial(_unless_whole, op) for op in plain})
    try:
        yield
    finally:
        with _lock:
            _compiles[0] -= 1
            for table in tables if _compiles[0] == 0 else ():
                table.update(plain)


def _unless_whole(op: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    # what has no dimension is a value of a function that Inductor writes into a kernel, such as a score_mod of flex_attention
    return NotImplemented if x.device.type == "cpu" and x.ndim > 0 else _plain()[op](x, *args, **kwargs)


@functools.cache
def _plain() -> dict[Any, Callable[..., Any]]:
    """Inductor's own decompositions of what is left whole; it calls torch's kernels where a graph has such an op.

    With the strides that they have in eager mode: torch's GELU has other bits for other layouts.
    """
    from torch._inductor import decomposition, lowering

    ops = torch.ops.aten.gelu.default, torch.ops.aten.native_layer_norm.default
    plain = {op: decomposition.decompositions[op] for op in ops}
    for op in ops:
        lowering.make_fallback(op, layout_constraint=lowering.constrain_to_fx_strides, warn=False, override_decomp=True)
    return plain


def _passes(ours: Sequence[Callable[[fx.Graph], None]], theirs: Any) -> Any:
    """A pass that is all of ours, as Inductor's cache knows it, and theirs after it; None where torch takes one, which is theirs."""
    from torch._inductor import custom_graph_pass

    class Pass(custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for edit in ours:
                edit(graph)

        def uuid(self) -> Any:
            return custom_graph_pass.get_hash_for_files((*map(inspect.getfile, ours), __file__))

    if theirs is None:
        return Pass()
    several = getattr(custom_graph_pass, "get_custom_graph_passes", None)
    return None if several is None else [Pass(), *several(theirs)]


def sort(graph: fx.Graph) -> None:
    """Put what a node takes before it, which passes of Inductor's leave to its end. Seen on torch 2.11 and 2.13."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def without_wrapper(compiled: Any) -> Any:
    """What Inductor compiled, without the function around it that keeps Dynamo out. Seen on torch 2.11 and 2.13."""
    from torch._dynamo.eval_frame import innermost_fn

    return innermost_fn(compiled)


ROW = 1 << 14
"""Elements of a row that a program of Inductor's may hold at once where it quantizes."""


def rows_at_once(choices: Any) -> Any:
    """Inductor's choices, but that a kernel which writes codes holds a whole row, where Inductor reads longer ones than 1024 twice.

    And no row of this length is reduced in two kernels where there are few: where the row is quantized its codes would be written by a
    third. What is reduced for is not known there, so that it holds for every reduction along the last dimension.

    Seen on torch 2.11 and 2.13: a subclass is the documented way to change them, ``V.set_choices_handler`` to say so.
    """
    from torch._inductor import config
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(type(choices)):  # type: ignore[misc]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if (
                config.triton.persistent_reductions
                and not cooperative_reduction
                and features.get_reduction_hint() == ReductionHint.INNER
            ):
                codes = any(n.node is not None and n.node.get_dtype() == torch.int8 for n in features.scheduler_nodes())
                if codes and V.graph.sizevars.statically_known_leq(features.reduction_numel, ROW):
                    return True
            return bool(choices.should_use_persistent_reduction(features, cooperative_reduction))

        @staticmethod
        def reduction_split_factor(device: Any, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
            if inner_reduction and reduction_numel_hint <= ROW:
                return 1
            return int(choices.reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction))

    made = Choices.__new__(Choices)
    made.__dict__.update(choices.__dict__)
    return made


@functools.cache
def written_once_for(*ops: Any) -> None:
    """Let Inductor write what calls of these ops take, once; otherwise it is computed for each. Seen on torch 2.11 and 2.13."""
    from torch._inductor import lowering

    def written(node: Any, *args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            if hasattr(arg, "realize"):
                arg.realize()
        return lowering.constrain_to_fx_strides(node, *args, **kwargs)

    for op in ops:
        lowering.make_fallback(op, layout_constraint=written)


def never_compiled_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate: Dynamo traces ``function`` within what it compiles; elsewhere it leaves it alone, and what it calls.

    Where Dynamo gives a frame up (torch's recurrent layers) it would compile each call of a mode by itself, and hand back a dtype as a
    number. Seen on torch 2.11 and 2.13.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """What a backend of ours runs while it is traced counts as compiling, as in torch 2.13 anyway; 2.11 says so to Dynamo alone."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def without_data() -> Any:
    """A context for a dry run. It gives a function: of a tensor one without data, of a symbolic size a number, which guards nothing."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, Tensor):
                return mode.from_tensor(value, static_shapes=True)
            return number(value) if isinstance(value, torch.SymInt) else value

        yield fake


def as_traced(tensors: list[Tensor], others: Any) -> list[Tensor]:
    """Tensors of fixed shapes as the inputs, beside others, of a graph that is about to be traced."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(others)
    return tensors if mode is None else [mode.from_tensor(t, static_shapes=True) for t in tensors]


def let_modes_see(*functions: Any) -> None:
    """Let Dynamo hand calls of these functions to modes, too: it does so for a list of functions alone. Seen on torch 2.11 and 2.13."""
    from torch._dynamo.variables import torch as variables

    variables.get_overridable_functions().update(functions)


def tracing_context() -> Any:
    """An object that lives as long as what Dynamo is tracing; it is another one when a trace is begun anew."""
    return torch._guards.TracingContext.get()


def hides_its_body(func: Any) -> bool:
    """Whether functions that ``func`` is given (checkpoint, cond, scan, ...) are traced with no TorchFunctionMode; not attention's."""
    return isinstance(func, torch._ops.HigherOrderOperator) and not str(func).startswith("flex_attention")


def takes_data(func: Any) -> bool:
    """Whether ``func`` stands for ``x.data`` in a graph of Dynamo's. Seen on torch 2.11 and 2.13."""
    return getattr(func, "__name__", "") == "_get_data_attr"


def source_name(placeholder: Any) -> str:
    """The expression by which Dynamo reaches an input of its graph, or its name. Seen on torch 2.11 (a method) and 2.13."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", placeholder.name)
    return str(name() if callable(name) else name)


def as_captured(old: Any, new: Any, static: int) -> None:
    """Let AOTAutograd know what Dynamo said of an old graph of a new one with the same inputs and ``static`` more behind them.

    That is by which sources it reaches them, and which keep their address from call to call, as the new ones do: a CUDA graph reads
    those where they are. Seen on torch 2.11 and 2.13.
    """
    if not hasattr(old, "_param_name_to_source"):
        return
    new._param_name_to_source = old._param_name_to_source
    sources = [node for node in old.graph.nodes if node.op == "placeholder"]
    placeholders = [node for node in new.graph.nodes if node.op == "placeholder"]
    for node, source in zip(placeholders, sources, strict=False):
        node._dynamo_source = source._dynamo_source
    for node in placeholders[len(placeholders) - static :]:
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
