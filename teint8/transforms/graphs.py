"""Reading a graph that Dynamo captured: which of its inputs are weights, and under which paths; what it calls."""

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from teint8 import _compilers
from teint8.transforms import callsite
from teint8.transforms.calls import FLOAT_ONLY, HANDLERS, know_transformers

_OPERATORS: dict[Any, Any] = {operator.matmul: Tensor.matmul, operator.imatmul: Tensor.matmul}


def has_matmuls(gm: fx.GraphModule) -> bool:
    """Whether a graph calls anything that a route takes over; an optimizer's does not."""
    know_transformers()
    return any(function_of(n) in HANDLERS or _compilers.hides_its_body(n.target) for n in gm.graph.nodes)


def function_of(n: fx.Node) -> Any:
    """What a node of a graph calls, as a route sees it; None for a node that is no call."""
    if n.op == "call_method":
        return getattr(Tensor, str(n.target), None)
    return _OPERATORS.get(n.target, n.target) if n.op == "call_function" else None


def hidden_matmuls(gm: fx.GraphModule, n: fx.Node) -> list[fx.Node]:
    """The matmuls inside of the functions that a call is given, and inside of those that these call."""
    bodies = [getattr(gm, str(a.target), None) for a in n.all_input_nodes if a.op == "get_attr"]
    found: list[fx.Node] = []
    for body in bodies:
        if isinstance(body, fx.GraphModule):
            found += [call for call in body.graph.nodes if function_of(call) in HANDLERS and function_of(call) not in FLOAT_ONLY]
            found += [
                call for inner in body.graph.nodes if _compilers.hides_its_body(inner.target) for call in hidden_matmuls(body, inner)
            ]
    return found


# what torch.func's transforms wrap a tensor in, as they appear in a graph of Dynamo's: the result stands for the first argument
_WRAPPERS = {"_wrap_for_grad", "_create_differentiable", "_add_batch_dim", "_make_dual", "_set_tensor_requires_grad", "_unpack_dual"}
# calls after which gradients are wanted, whatever the mode is outside of the graph
_GRADIENTS = {"_grad_increment_nesting", "_jvp_increment_nesting", "_autograd_grad", "_create_differentiable", "_make_dual", "grad"}


def enables_gradients(gm: fx.GraphModule) -> bool:
    """Whether a graph differentiates, or enables gradients, in itself or in a function that it calls."""
    for module in gm.modules():
        for n in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            name = getattr(n.target, "__name__", str(n.target)) if n.op == "call_function" else ""
            if name in _GRADIENTS or (name == "_set_grad_enabled" and n.args[0]) or (name == "_enter_inference_mode" and not n.args[0]):
                return True
    return False


def weights_of(
    gm: fx.GraphModule, placeholders: list[fx.Node], inputs: list[Any], params: str | None
) -> dict[fx.Node, tuple[int, str]]:
    """Nodes that stand for weights, with the index of the input and its path."""
    origin = {node: i for i, node in enumerate(placeholders)}
    sources = [_compilers.source_name(node) for node in placeholders]
    named = f"L['{params}']"
    chosen = {i for i, value in enumerate(inputs) if isinstance(value, torch.nn.Parameter) or sources[i].startswith(named)}
    told = bool(chosen)
    if not told:
        chosen = {i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_leaf and value.requires_grad}
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _WRAPPERS and node.args[0] in origin:
            origin[node] = origin[node.args[0]]
            chosen |= {origin[node]} if name == "_make_dual" and not told else set()
        elif name == "_autograd_grad" and not told:
            found: list[fx.Node] = []
            fx.node.map_arg(node.args[1], found.append)
            chosen |= {origin[n] for n in found if n in origin}
    known = names()
    return {
        n: (i, known.get(id(inputs[i])) or path_of(sources[i]))
        for n, i in origin.items()
        if i in chosen and isinstance(inputs[i], Tensor)
    }


def names() -> dict[int, str]:
    """Paths of the parameters of the module that was compiled: also of what is compiled apart after a graph break in it."""
    root = callsite.compiled_module()
    return {} if root is None else {id(p): name.replace("_orig_mod.", "") for name, p in root.named_parameters()}


_PARTS = re.compile(r"\['([^']*)'\]|\[\"([^\"]*)\"\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = {"_modules", "_parameters", "_buffers", "_orig_mod"}


def path_of(source: str) -> str:
    """A weight's path from the expression by which Dynamo reaches it.

    Examples:
        >>> path_of("L['self']._modules['0']._parameters['weight']"), path_of("L['params']['layers'][0]['w']")
        ('0.weight', 'layers.0.w')

    """
    parts = ["".join(match) for match in _PARTS.findall(source)]
    if "_modules" in parts or "_parameters" in parts:
        first = min(parts.index(name) for name in ("_modules", "_parameters") if name in parts)
        return ".".join(part for part in parts[first:] if part not in _CONTAINERS)
    return ".".join(parts[1:]) or (parts[0] if parts else source)
