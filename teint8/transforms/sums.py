"""A pass over graphs that Inductor is about to compile: on Hopper a sum of two INT8 matmuls is added up in the second one's kernel.

That is what a backward is full of: the gradients of an input that several linears share. Inductor would read both products to write
their sum. The bits are the same: the kernel rounds its product before it adds it.
"""

from typing import Any

import torch
from torch import fx

from teint8 import _compilers
from teint8.ops import raw_sums
from teint8.ops.raw import NAMES

_MM, _ADD_INTO = torch.ops.teint8.int8_mm.default, torch.ops.teint8.int8_mm_add_.default
_ADD, _VIEW = torch.ops.aten.add.Tensor, torch.ops.aten.reshape.default


def add_into(graph: fx.Graph) -> None:
    """Replace additions of two INT8 matmuls, whose results nobody else takes, where the kernel of the second one adds."""
    if not any(_pair(n) for n in graph.find_nodes(op="call_function", target=_ADD)):
        return
    _compilers.sort(graph)  # what reads a total has to come after all that is added to it
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.find_nodes(op="call_function", target=_ADD)):
        pair = _pair(node)
        if not pair:
            continue
        total, second = sorted(pair, key=order.__getitem__)
        if not _fits(second, total):
            total, second = second, total
        if _fits(second, total):
            _replace(graph, node, total, second)
    graph.lint()


def _pair(addition: fx.Node) -> list[fx.Node]:
    """The two matmuls whose results are added, if nobody else takes them; else none."""
    products = [] if addition.kwargs or "val" not in addition.meta else [_product(n, addition) for n in addition.args]
    pair = [p for p in dict.fromkeys(products) if p is not None]
    return pair if len(pair) == 2 else []


def _product(node: Any, addition: fx.Node) -> fx.Node | None:
    """The matmul whose result this is, perhaps seen otherwise, if only the addition and sums in its memory take it; else None."""
    made, user = node, addition
    if isinstance(node, fx.Node) and node.target is _VIEW and list(node.users) == [addition]:
        made, user = node.args[0], node
    if not isinstance(made, fx.Node) or made.target is not _MM:
        return None
    if any(n.meta.get("val") is None for n in (made, node, *made.all_input_nodes)):  # a pass of the caller's made it
        return None
    shapes = [n.meta["val"].shape for n in (made, node, addition)]
    if not all(type(s) is int for shape in shapes for s in shape) or shapes[1] != shapes[2]:  # to compare symbols is to guard on them
        return None
    takers = [n for n in made.users if not (n.target is _ADD_INTO and n.args[4] is made)]
    return made if takers == [user] else None


def _fits(second: fx.Node, total: fx.Node) -> bool:
    """Whether the second matmul, alone and without a bias, can be added to the first in its kernel."""
    args: Any = second.args
    codes, w_codes = args[0].meta["val"], args[2].meta["val"]
    value, product = total.meta["val"], second.meta["val"]
    if second.kwargs or args[4:] != (None, NAMES.get(value.dtype), "") or len(second.users) != 1:
        return False
    if value.ndim != 2 or product.shape != value.shape or value.dtype == torch.float64:  # a kernel's own sum is one of float32
        return False
    if codes.ndim != 2 or w_codes.ndim != 2 or not all(type(s) is int and s > 0 for s in (*codes.shape, *w_codes.shape)):
        return False
    return raw_sums.adds(codes.device.type, value.dtype, codes.shape[0], w_codes.shape[0], codes.shape[1])


def _replace(graph: fx.Graph, addition: fx.Node, total: fx.Node, second: fx.Node) -> None:
    with graph.inserting_before(addition):
        graph.call_function(_ADD_INTO, (*second.args[:4], total))
        result = total
        if addition.meta["val"].shape != total.meta["val"].shape:
            result = graph.call_function(_VIEW, (total, list(addition.meta["val"].shape)))
            result.meta = dict(addition.meta)
    seen: Any = dict.fromkeys((*addition.args, second))
    addition.replace_all_uses_with(result)
    graph.erase_node(addition)
    for n in seen:
        if n is not total:
            graph.erase_node(n)
