"""The torch.compile backend "teint8": the captured graph with its matmuls in INT8, handed to Inductor.

``torch.compile(model, backend="teint8")`` finds it by name, through the entry point of this package. The graph is not rewritten
node by node: it is run once, under a route like that of ``quantize``, while AOTAutograd traces it, so that both decide alike.
"""

import copy
import difflib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from teint8 import _compilers, _torch
from teint8.ops import tuning
from teint8.policy import OPS, Policy, Rule, glob
from teint8.qtensor import QTensor
from teint8.transforms.graphs import enables_gradients, has_matmuls, hidden_matmuls, names, weights_of
from teint8.transforms.held import Followers, held_of
from teint8.transforms.merged import merge_linears
from teint8.transforms.operands import Operand
from teint8.transforms.quantize import BoundRoute
from teint8.transforms.receipt import Receipt
from teint8.transforms.sums import add_into

_PASSES = (merge_linears, add_into)
_OURS = ("policy", "training", "strict", "receipt", "mode", "params")


class _How(NamedTuple):
    """What ``options`` say; ``training`` None: False unless gradients are enabled when the graph is compiled."""

    policy: Policy
    training: bool | None
    strict: bool
    receipt: Receipt | None
    params: str | None


def backend(gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """Compile a graph that Dynamo captured, its matmuls in INT8; called by ``torch.compile(model, backend="teint8")``.

    Args:
        gm: the graph.
        inputs: its example inputs.
        mode: one of torch.compile's ("reduce-overhead", "max-autotune", ...), handed on to Inductor. Under "max-autotune" the tiles of
            the INT8 matmuls are measured, too, where this machine has not done so before (``teint8.ops.tuning.tune``).
        options: ``policy`` (``Policy.qat()`` unless given), ``training`` (True: weights are quantized in the graph, from floats; False:
            they are packed once, as by ``te_int8_autocast(training=False)``, but for those that want a gradient; unless given, as
            gradients are enabled or not), ``strict``,
            ``receipt`` (a ``teint8.Receipt`` that is filled while graphs are compiled), ``mode`` (for torch.compile takes options or a
            mode, not both), ``params`` (the name of the argument of a pure function that holds its parameters), and any option of
            Inductor.

    Paths are those of ``named_parameters`` of the compiled module, or of the arguments of a compiled function ("layers.0.w" of
    ``params["layers"][0]["w"]``). Weights of ``x @ w`` are parameters, and the leaves of the argument that the option ``params`` names;
    where a graph has neither, its inputs that require a gradient or are differentiated in it. Matmuls inside of torch.cond, map and
    scan stay float, as the receipt says. A weight that the graph edits is quantized in the graph.

    Dynamo gives up a function that it compiled too often (``torch._dynamo.config.recompile_limit``), and runs it in float from then on:
    ``fullgraph=True`` makes that an error. A model that was compiled by this backend and is called in a function that is compiled by
    another becomes part of that function, and runs as that backend has it.

    Raises:
        TypeError: an option of another type.
        ValueError: strict, and a call cannot run in INT8, or no parameter of the module has
            the path of a rule.

    Examples:
        >>> model = torch.nn.Linear(64, 10)
        >>> receipt = Receipt()
        >>> compiled = torch.compile(model, backend="teint8", options={"policy": Policy.training(), "receipt": receipt})

    """
    how, inductor = _read(options or {})
    mode = mode or (options or {}).get("mode")  # torch.compile takes one of mode and options
    if not has_matmuls(gm):
        return _compilers.inductor(gm, list(inputs), mode, inductor, _PASSES)
    program = _Program(gm, how, list(inputs))
    if how.strict:
        _check_paths(how.policy)
    gpu = next((t.device for t in inputs if isinstance(t, Tensor) and t.is_cuda), None)
    if (mode or "").startswith("max-autotune") and gpu is not None:
        tuning.tune_new(program.problems(inputs), gpu)
    extras = program.packable(inputs)
    whole = program.as_graph(extras)
    compiled = _compilers.inductor(whole, [*inputs, *program.fakes(inputs, extras)], mode, inductor, _PASSES)
    followers = Followers(extras)
    met = _Met(program, inputs) if how.receipt is not None or any(rule.path != "*" for rule in how.policy.rules) else None
    if not extras and met is None:
        return compiled
    inner = _compilers.without_wrapper(compiled)  # one such wrapper is enough

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(*args: Any) -> Any:
        other = None if met is None else met.other(args)
        if other is not None:
            return other.run(args, False, {})[0]
        return inner(*args, *followers.get(args)) if extras else inner(*args)

    return run


class _Met:
    """Which weights a compiled graph has met: Dynamo runs it for every module that is like the first, and rules go by paths."""

    def __init__(self, program: "_Program", inputs: Sequence[Any]) -> None:
        self.program = program
        self.positions = sorted({i for i, _ in program.weights.values() if isinstance(inputs[i], torch.nn.Parameter)})
        first = tuple(inputs[i] for i in self.positions)
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], _Program | None]] = {}
        self._keep(first, None)

    def _keep(self, weights: tuple[Tensor, ...], other: "_Program | None") -> None:
        if len(self._known) >= 4096:
            self._known.clear()
        self._known[tuple(map(id, weights))] = [weakref.ref(w) for w in weights], other

    def other(self, args: Sequence[Any]) -> "_Program | None":
        """The program for these weights where their rules are not those that the graph was compiled for, else None."""
        weights = tuple(args[i] for i in self.positions)
        known = self._known.get(tuple(map(id, weights)))
        if known is not None and all(ref() is w for ref, w in zip(known[0], weights, strict=True)):
            return known[1]
        there = names()
        program = self.program.renamed({i: there[id(args[i])] for i in self.positions if id(args[i]) in there})
        same = program.rules() == self.program.rules()
        if not same:
            paths = [path for _, path in program.weights.values()]
            warnings.warn(
                f"teint8: torch.compile uses code again for {', '.join(paths[:3])} that was compiled for weights of other rules: these "
                "calls run uncompiled, with the same results. Compile the whole model without graph breaks (fullgraph=True)",
                stacklevel=2,
            )
        if program.how.receipt is not None and program.weights != self.program.weights:
            program.dry_run(args, record=True)
        self._keep(weights, None if same else program)
        return None if same else program


def _read(options: dict[str, Any]) -> tuple[_How, dict[str, Any]]:
    policy, training, strict, receipt, mode, params = (options.get(name) for name in _OURS)
    strict = False if strict is None else strict
    for name, value, kind, hint in (
        ("policy", policy, Policy, "a Policy is needed, such as Policy.qat(), the default"),
        ("training", training, bool, "True, False or nothing is needed"),
        ("strict", strict, bool, "True or False is needed"),
        ("receipt", receipt, Receipt, "a teint8.Receipt() is needed, to be filled"),
        ("mode", mode, str, "the name of one of torch.compile's modes is needed, such as 'max-autotune'"),
        ("params", params, str, "the name of the argument that holds the parameters is needed"),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"torch.compile(backend='teint8'): the option {name} is {value!r}; {hint}")
    for name in options:
        close = difflib.get_close_matches(name, _OURS, 1, 0.7)
        if name not in _OURS and close and not hasattr(torch._inductor.config, name):
            raise ValueError(f"torch.compile(backend='teint8'): there is no option {name!r}; did you mean {close[0]!r}?")
    how = _How(Policy.qat() if policy is None else policy, training, strict, receipt, params)
    return how, {name: value for name, value in options.items() if name not in _OURS}


def _check_paths(policy: Policy) -> None:
    """Raise for a rule whose path is that of no parameter of the model that is running: it is misspelt."""
    paths = list(names().values())
    for rule in policy.rules if paths else ():
        if rule.path != "*" and not any(glob(rule.path, path) or glob(rule.path, path.rpartition(".")[0]) for path in paths):
            raise ValueError(
                f"strict: no parameter has the path of {rule!r}; those are {', '.join(map(repr, paths[:5]))}"
                f"{', ...' if len(paths) > 5 else ''}; mend the path, or leave strict off"
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
        if _compilers.hides_its_body(n.target):
            self._look_into(n)
        if _compilers.takes_data(n.target) and self.route.shared is not None:
            self.route.shared.forget(self.env[n.args[0]])  # type: ignore[index]
        result = super().run_node(n)
        known = self.weights.get(n)
        if known is not None:
            index, path = known
            self.route.known[result] = Operand(result, path, False, index)
        return result

    def _look_into(self, n: fx.Node) -> None:
        """Say on the receipt, in strict mode raise, that matmuls inside of cond, map or scan stay float; checkpoints are seen."""
        hidden = hidden_matmuls(self.module, n)  # type: ignore[arg-type]
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
        self.weights = weights_of(gm, self.placeholders, inputs, how.params)

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
        with route, _compilers.compiling():
            return _Interpreter(self.gm, route, self.weights, constant).run(*args), route

    def renamed(self, paths: dict[int, str]) -> "_Program":
        """The same program with other paths for some of its inputs."""
        other = copy.copy(self)
        other.weights = {node: (i, paths.get(i, path)) for node, (i, path) in self.weights.items()}
        return other

    def rules(self) -> list[Rule | None]:
        """What the policy says of each weight."""
        return [self.how.policy.match(path, op) for _, path in self.weights.values() for op in OPS]

    def dry_run(self, inputs: Sequence[Any], record: bool, how: _How | None = None) -> None:
        """Run on tensors without data, for what the receipt then says."""
        with _compilers.without_data() as fake, torch.no_grad():
            self.run([fake(value) for value in inputs], record, {}, fake, how)

    def packable(self, inputs: Sequence[Any]) -> list[_Extra]:
        """The weights whose packed forms are to be inputs: found by running the graph on tensors without data.

        Not those of which a gradient is wanted, nor those that the graph edits, through whichever of its inputs.
        """
        enabled = torch.is_grad_enabled()
        if (enabled if self.how.training is None else self.how.training) or enables_gradients(self.gm):
            return []
        with _compilers.without_data() as fake, torch.no_grad(), _torch.Writes() as writes:
            fakes = [fake(value) for value in inputs]
            writes.storages.clear()
            _, route = self.run(fakes, False, {}, fake)
            edited = [t for t, f in zip(inputs, fakes, strict=True) if isinstance(t, Tensor) and _torch.memory_of(f) in writes.storages]
        memory = {_torch.memory_of(t) for t in edited}

        def fits(weight: Any) -> bool:
            if not isinstance(weight, torch.nn.Parameter) or weight.is_inference() or (enabled and weight.requires_grad):
                return False
            return _torch.memory_of(weight) not in memory

        return [extra for extra in route.packings if fits(inputs[extra.position])]

    def problems(self, inputs: Sequence[Any]) -> list[tuple[int, int, int]]:
        """M, N and K of the graph's INT8 matmuls and, where gradients are wanted, of those of its backward; found without data."""
        backward = torch.is_grad_enabled() or enables_gradients(self.gm)
        receipt = Receipt()
        how = self.how._replace(receipt=receipt, strict=False)
        self.dry_run(inputs, True, how)
        found: dict[tuple[int, int, int], None] = {}
        for r in receipt:
            if r.int8 and r.batch == 1:
                sizes = [(r.m, r.n, r.k)]
                sizes += [(r.m, r.k, r.n)] * (backward and "dX" in r.mode) + [(r.n, r.k, r.m)] * (backward and "dW" in r.mode)
                found |= dict.fromkeys(size for size in sizes if 0 not in size)
        return list(found)

    def fakes(self, inputs: Sequence[Any], extras: list[_Extra]) -> list[Any]:
        """Codes and scales without data, for each packed weight."""
        out: list[Any] = []
        for extra in extras:
            packed = held_of(inputs[extra.position]).get(inputs[extra.position], extra.axis, extra.granularity)
            out += (packed.codes, packed.scale)
        return _compilers.as_traced(out, inputs)

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
        _compilers.as_captured(self.gm, made, 2 * len(extras))
        return made


def _item(values: Any, index: int) -> Any:
    return values[index]


def _output(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")  # type: ignore[no-any-return]
