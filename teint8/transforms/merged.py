"""A pass over graphs that Inductor is about to compile: on a CPU what is quantized and multiplied becomes one call.

A call of an op of Python's costs a CPU as much as a small matmul does, and codes that stay inside of one kernel are not written. (On a
GPU Inductor fuses the quantization into what comes before it, which saves more.) So is a GELU before that, which is torch's own kernel
in graphs for a CPU (``_compilers``), with the bits of eager mode's ``F.gelu``.
"""

import operator
from typing import Any

import torch
from torch import fx

from teint8 import _compilers
from teint8.ops import raw_linears
from teint8.ops.raw import NAMES


def merge_linears(graph: fx.Graph) -> None:
    """Replace a quantization by row on a CPU, if nothing but INT8 matmuls takes the codes, and these by one ``teint8::linears``."""
    nodes = [n for n in graph.find_nodes(op="call_function", target=torch.ops.teint8.quantize.default) if _matmuls(n)]
    if not nodes:
        return
    _compilers.sort(graph)
    for node in sorted(nodes, key={n: i for i, n in enumerate(graph.nodes)}.__getitem__):  # a GELU is found behind a merged call
        _merge(graph, node, _matmuls(node))
    graph.lint()


def _matmuls(node: fx.Node) -> list[fx.Node]:
    """The matmuls that take the codes of a quantization, or none if something else takes them, or it is not one by row on a CPU."""
    x, *how = node.args
    value: Any = x.meta.get("val")  # type: ignore[union-attr]
    if how != [None, None, 1, ""] or node.kwargs or value is None or value.device.type != "cpu" or value.ndim != 2:
        return []
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(parts) != len(node.users) or set(parts) != {0, 1}:
        return []
    codes, scale = parts[0], parts[1]
    matmuls = list(codes.users)
    for call in matmuls:
        right = call.target is torch.ops.teint8.int8_mm.default and call.args[:2] == (codes, scale) and not call.kwargs
        if not right or call.args[5:] != (NAMES[value.dtype], "") or call.args[2].meta["val"].ndim != 2:  # type: ignore[union-attr]
            return []
        if codes in call.args[2:] or scale in call.args[2:]:  # they are the weight, too
            return []
    return matmuls if set(scale.users) == set(matmuls) else []


def _merge(graph: fx.Graph, node: fx.Node, matmuls: list[fx.Node]) -> None:
    order = {n: i for i, n in enumerate(graph.nodes)}
    matmuls = sorted(matmuls, key=order.__getitem__)
    first = matmuls[0]
    late = _late(matmuls, order)
    if late is None:
        return
    for n in sorted(late, key=order.__getitem__):  # what the others take has to be there when the first is called
        first.prepend(n)
    w_codes, w_scales, biases = ([call.args[i] for call in matmuls] for i in (2, 3, 4))
    x: Any = node.args[0]
    before, activation = _before_gelu(x)
    with graph.inserting_before(first):
        if before and x.target is _VIEW:
            before = graph.call_function(_VIEW, (before, x.args[1]))
            before.meta = dict(x.meta)
        inputs = (before or x, w_codes, w_scales, biases, activation)
        call = graph.call_function(torch.ops.teint8.linears.default, inputs)
        call.meta = {"val": [m.meta["val"] for m in matmuls]}
        for i, matmul in enumerate(matmuls):
            result = graph.call_function(operator.getitem, (call, i))
            result.meta = dict(matmul.meta)
            matmul.replace_all_uses_with(result)
    for n in (*matmuls, *list(node.users), node):
        graph.erase_node(n)


def _late(matmuls: list[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node] | None:
    """What the matmuls take that comes after the first of them; None if that takes what one of them makes, or writes to memory."""
    first, found = order[matmuls[0]], set[fx.Node]()
    waiting = [n for call in matmuls for n in call.all_input_nodes if order[n] >= first]
    while waiting:
        n = waiting.pop()
        if n in matmuls or n.op != "call_function" or getattr(getattr(n.target, "_schema", None), "is_mutable", True):
            return None
        found.add(n)
        waiting += [i for i in n.all_input_nodes if order[i] >= first and i not in found]
    return found


_VIEW = torch.ops.aten.reshape.default
_GELUS = {form: name for name, form in raw_linears.FORMS.items() if name}


def _before_gelu(y: fx.Node) -> tuple[fx.Node | None, str]:
    """x and which GELU, where y has the values of that of x, and nobody else takes what is between; else None.

    Where x is not contiguous torch's kernel has other last bits than ``linears``, which writes rows.
    """
    gelu = y.args[0] if y.target is _VIEW and len(y.users) == 1 else y
    if not isinstance(gelu, fx.Node) or gelu.target is not torch.ops.aten.gelu.default or len(gelu.users) != 1:
        return None, ""
    if not gelu.args[0].meta["val"].is_contiguous():  # type: ignore[union-attr]
        return None, ""
    return gelu.args[0], _GELUS[gelu.kwargs.get("approximate", "none")]  # type: ignore[return-value, index]
