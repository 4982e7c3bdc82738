"""The torch.compile backend "teint8": the captured graph with its matmuls in INT8, handed to Inductor.

``torch.compile(model, backend="teint8")`` finds it by name, through the entry point of this package. The graph is not rewritten
node by node: it is run once, under a route like that of ``quantize``, while AOTAutograd traces it, so that both decide alike.
"""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from teint8 import _torch
from teint8.ops import cuda
from teint8.policy import Policy
from teint8.qtensor import QTensor
from teint8.transforms.calls import FLOAT_ONLY, HANDLERS, Operand, know_transformers
from teint8.transforms.held import Follower, held_of
from teint8.transforms.quantize import BoundRoute
from teint8.transforms.receipt import Receipt

_OURS = ("policy", "training", "strict", "receipt", "mode", "params")


class _How(NamedTuple):
    """What ``options`` say; ``training`` None: as gradients are enabled or not when the graph is compiled."""

    policy: Policy
    training: bool | None
    strict: bool
    receipt: Receipt | None
    params: str | None


def backend(gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """Compile a graph that Dynamo captured, its matmuls in INT8; called by ``torch.compile(model, backend="teint8")``.

    Args:
        gm: the graph. inputs: its example inputs.
        mode: one of torch.compile's ("reduce-overhead", "max-autotune", ...), handed on to Inductor. Under "max-autotune" the tiles of
            the INT8 matmuls are measured, too, where this machine has not done so before (``teint8.ops.cuda.tune``).
        options: ``policy`` (``Policy.qat()`` unless given), ``training`` (True: weights are quantized in the graph, from floats; False:
            they are packed once, as by ``te_int8_autocast(training=False)``; as gradients are enabled or not unless given), ``strict``,
            ``receipt`` (a ``teint8.Receipt`` that is filled while graphs are compiled), ``mode`` (for torch.compile takes options or a
            mode, not both), ``params`` (the name of the argument of a pure function that holds its parameters), and any option of
            Inductor.

    Paths are those of ``named_parameters`` of the compiled module, or of the arguments of a compiled function ("layers.0.w" of
    ``params["layers"][0]["w"]``). Weights of ``x @ w`` are the graph's inputs that are parameters, require a gradient, are
    differentiated in the graph, or are leaves of the argument that the option ``params`` names. Matmuls inside of torch.cond, map and
    scan stay float, as the receipt says.

    Raises:
        TypeError: an option of another type. ValueError: strict, and a call cannot run in INT8.

    Example:
        >>> model = torch.nn.Linear(64, 10)
        >>> receipt = Receipt()
        >>> compiled = torch.compile(model, backend="teint8", options={"policy": Policy.training(), "receipt": receipt})

    """
    how, inductor = _read(options or {})
    mode = mode or (options or {}).get("mode")  # torch.compile takes one of mode and options
    if not _has_matmuls(gm):
        return _torch.inductor(gm, list(inputs), mode, inductor)
    training = torch.is_grad_enabled() if how.training is None else how.training
    program = _Program(gm, how, list(inputs))
    if (mode or "").startswith("max-autotune") and any(isinstance(t, Tensor) and t.is_cuda for t in inputs):
        cuda.tune_new(program.problems(inputs))
    extras = [] if training else program.packable(inputs)
    whole = program.as_graph(extras)
    compiled = _torch.inductor(whole, [*inputs, *program.fakes(inputs, extras)], mode, inductor)
    if not extras:
        return compiled

    followers = [(extra.position, Follower(extra.axis, extra.granularity)) for extra in extras]

    def run(*args: Any) -> Any:
        more: list[Tensor] = []
        for position, follower in followers:
            packed = follower.get(args[position])
            more += (packed.codes, packed.scale)
        return compiled(*args, *more)

    return run


def _read(options: dict[str, Any]) -> tuple[_How, dict[str, Any]]:
    policy, training, strict, receipt, mode, params = (options.get(name) for name in _OURS)
    strict = False if strict is None else strict
    for name, value, kind, hint in (
        ("policy", policy, Policy, "a Policy is needed, such as Policy.training()"),
        ("training", training, bool, "True, False or nothing is needed"),
        ("strict", strict, bool, "True or False is needed"),
        ("receipt", receipt, Receipt, "a teint8.Receipt() is needed, to be filled"),
        ("mode", mode, str, "the name of one of torch.compile's modes is needed, such as 'max-autotune'"),
        ("params", params, str, "the name of the argument that holds the parameters is needed"),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"torch.compile(backend='teint8'): the option {name} is {value!r}; {hint}")
    how = _How(Policy.qat() if policy is None else policy, training, strict, receipt, params)
    return how, {name: value for name, value in options.items() if name not in _OURS}


_METHODS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__"}


def _has_matmuls(gm: fx.GraphModule) -> bool:
    """Whether a graph calls anything that a route takes over; an optimizer's does not."""
    know_transformers()
    return any(
        n.target in HANDLERS
        or n.target is operator.matmul
        or _torch.hides_its_body(n.target)
        or (n.op == "call_method" and n.target in _METHODS)
        for n in gm.graph.nodes
    )


class _Extra(NamedTuple):
    """A weight whose packed form is an input of the compiled graph: its place among the inputs, and how it is packed."""

    position: int
    axis: int
    granularity: str


class _GraphRoute(BoundRoute):
    """A route whose weights are inputs of a graph; ``packings`` are what is wanted of them, ``held`` what there is."""

    def __init__(self, how: _How, record: bool, held: dict[_Extra, QTensor]) -> None:
        super().__init__(how.policy, how.strict, how.receipt if record else None)
        self.packings: dict[_Extra, None] = {}
        self.held = held

    def packed(self, weight: Operand, axis: int, granularity: str) -> Operand:
        if weight.held is None or isinstance(weight.value, QTensor):
            return weight
        extra = _Extra(weight.held, axis, granularity)
        self.packings[extra] = None
        return weight if extra not in self.held else weight._replace(value=self.held[extra])


class _Interpreter(fx.Interpreter):
    """Runs the graph under a route that knows which of its values are weights."""

    def __init__(
        self, gm: fx.GraphModule, route: _GraphRoute, weights: dict[fx.Node, tuple[int, str]], constant: Callable[[Any], Any]
    ) -> None:
        super().__init__(gm)
        self.route, self.weights, self.constant = route, weights, constant

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constant(super().get_attr(target, args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        if _torch.hides_its_body(n.target):
            self._look_into(n)
        result = super().run_node(n)
        known = self.weights.get(n)
        if known is not None:
            index, path = known
            self.route.known[result] = Operand(result, path, False, index)
        return result

    def _look_into(self, n: fx.Node) -> None:
        """Say on the receipt, in strict mode raise, that matmuls inside of cond, map or scan stay float; checkpoints are seen."""
        bodies = [self.fetch_attr(a.target) for a in n.all_input_nodes if a.op == "get_attr"]  # type: ignore[arg-type]
        calls = [call for body in bodies if isinstance(body, fx.GraphModule) for call in body.graph.nodes]
        hidden = [call for call in calls if call.target in HANDLERS and call.target not in FLOAT_ONLY]
        if not hidden or "checkpoint" in str(n.target) or not self.route.policy.rules:
            return
        reason = f"inside of {n.target}, whose body is traced outside of the routing"
        if self.route.strict:
            raise ValueError(f"strict: {len(hidden)} calls cannot run in INT8: {reason}; take them out of it, or leave strict off")
        for call in hidden if self.route.receipt is not None else []:
            self.route.receipt.add(("?", str(call.name), 0, 0, 0, 1, "float", "", reason))  # type: ignore[union-attr]


class _Program:
    """A captured graph: which of its inputs are weights, and how it runs under a route."""

    def __init__(self, gm: fx.GraphModule, how: _How, inputs: list[Any]) -> None:
        self.gm, self.how = gm, how
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.weights = _weights(gm, self.placeholders, inputs, how.params)

    def run(
        self,
        args: Sequence[Any],
        record: bool,
        held: dict[_Extra, QTensor],
        constant: Callable[[Any], Any] = lambda value: value,
        how: _How | None = None,
    ) -> tuple[Any, _GraphRoute]:
        """The results of the graph under a route, and that route; ``constant`` maps what the graph holds itself."""
        route = _GraphRoute(how or self.how, record, held)
        with route, _torch.compiling():
            return _Interpreter(self.gm, route, self.weights, constant).run(*args), route

    def packable(self, inputs: Sequence[Any]) -> list[_Extra]:
        """What packed weights the graph wants: found by running it on tensors without data."""
        with _torch.without_data() as fake, torch.no_grad():
            _, route = self.run([fake(value) for value in inputs], False, {}, fake)
        return [extra for extra in route.packings if isinstance(inputs[extra.position], torch.nn.Parameter)]

    def problems(self, inputs: Sequence[Any]) -> list[tuple[int, int, int]]:
        """M, N and K of the graph's INT8 matmuls and of those of its backward, found on tensors without data."""
        receipt = Receipt()
        how = self.how._replace(receipt=receipt, strict=False)
        with _torch.without_data() as fake, torch.no_grad():
            self.run([fake(value) for value in inputs], True, {}, fake, how)
        found: dict[tuple[int, int, int], None] = {}
        for r in receipt:
            if r.int8 and r.batch == 1:
                sizes = [(r.m, r.n, r.k)] + [(r.m, r.k, r.n)] * ("dX" in r.mode) + [(r.n, r.k, r.m)] * ("dW" in r.mode)
                found |= dict.fromkeys(size for size in sizes if 0 not in size)
        return list(found)

    def fakes(self, inputs: Sequence[Any], extras: list[_Extra]) -> list[Any]:
        """Codes and scales without data, for each packed weight."""
        out: list[Any] = []
        for extra in extras:
            packed = held_of(inputs[extra.position]).get(inputs[extra.position], extra.axis, extra.granularity)
            out += (packed.codes, packed.scale)
        return _torch.as_traced(out, inputs)

    def as_graph(self, extras: list[_Extra]) -> fx.GraphModule:
        """A graph of one call, which runs this one under a route; codes and scales of ``extras`` are its last inputs."""
        count = len(self.placeholders)
        recorded = [self.how.receipt is not None]  # it is traced more than once

        def int8_graph(*args: Any) -> Any:
            more = args[count:]
            dtypes = [args[extra.position].dtype for extra in extras]
            held = {e: QTensor(more[2 * i], more[2 * i + 1], None, dtypes[i], e.axis, checked=False) for i, e in enumerate(extras)}
            record, recorded[0] = recorded[0], False
            return self.run(args[:count], record, held)[0]

        graph = fx.Graph()
        args = []
        for node in self.placeholders:
            copied = graph.placeholder(node.name)
            copied.meta = dict(node.meta)
            args.append(copied)
        for i in range(len(extras)):
            args += [graph.placeholder(f"codes_{i}"), graph.placeholder(f"scale_{i}")]
        whole = graph.call_function(int8_graph, tuple(args))
        results = _output(self.gm).args[0]
        graph.output(tuple(graph.call_function(_item, (whole, i)) for i in range(len(results))))  # type: ignore[arg-type]
        made = fx.GraphModule(self.gm, graph)
        made.meta = dict(self.gm.meta)
        _torch.as_captured(self.gm, made, 2 * len(extras))
        return made


def _item(values: Any, index: int) -> Any:
    return values[index]


def _output(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")  # type: ignore[no-any-return]


# what torch.func's transforms wrap a tensor in, as they appear in a graph of Dynamo's: the result stands for the first argument
_WRAPPERS = {"_wrap_for_grad", "_create_differentiable", "_add_batch_dim", "_make_dual", "_set_tensor_requires_grad", "_unpack_dual"}


def _weights(gm: fx.GraphModule, placeholders: list[fx.Node], inputs: list[Any], params: str | None) -> dict[fx.Node, tuple[int, str]]:
    """Nodes that stand for weights, with the index of the input and its path."""
    origin = {node: i for i, node in enumerate(placeholders)}
    chosen = {i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_leaf and value.requires_grad}
    sources = [_torch.source_name(node) for node in placeholders]
    named = f"L['{params}']"
    chosen |= {i for i, value in enumerate(inputs) if isinstance(value, torch.nn.Parameter) or sources[i].startswith(named)}
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _WRAPPERS and node.args[0] in origin:
            origin[node] = origin[node.args[0]]
            chosen |= {origin[node]} if name == "_make_dual" else set()
        elif name == "_autograd_grad":
            found: list[fx.Node] = []
            fx.node.map_arg(node.args[1], found.append)
            chosen |= {origin[n] for n in found if n in origin}
    return {n: (i, path_of(sources[i])) for n, i in origin.items() if i in chosen and isinstance(inputs[i], Tensor)}


_PARTS = re.compile(r"\['([^']*)'\]|\[\"([^\"]*)\"\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = {"_modules", "_parameters", "_buffers", "_orig_mod"}


def path_of(source: str) -> str:
    """A weight's path from the expression by which Dynamo reaches it.

    Example:
        >>> path_of("L['self']._modules['0']._parameters['weight']"), path_of("L['params']['layers'][0]['w']")
        ('0.weight', 'layers.0.w')

    """
    parts = ["".join(match) for match in _PARTS.findall(source)]
    if "_modules" in parts or "_parameters" in parts:
        first = min(parts.index(name) for name in ("_modules", "_parameters") if name in parts)
        return ".".join(part for part in parts[first:] if part not in _CONTAINERS)
    return ".".join(parts[1:]) or (parts[0] if parts else source)
