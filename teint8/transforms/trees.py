"""Trees of parameters, whose leaves are tensors, packed weights and conditioned ones."""

from collections.abc import Callable, Iterable
from typing import Any

import torch.utils._pytree as torch_pytree

from teint8.conditioning import Conditioned
from teint8.qtensor import QTensor


def is_weight(node: Any) -> bool:
    """Whether a node of a pytree is a QTensor or a Conditioned, which these transforms take as a leaf."""
    return isinstance(node, (QTensor, Conditioned))


def leaf_paths(params: Any) -> list[str]:
    """Names of the leaves of a pytree, in order: keys and indices joined by dots ("layers.0.w").

    Examples:
        >>> leaf_paths({"layers": [{"w": 1.0}], "head": 2.0})
        ['layers.0.w', 'head']

    """
    return [_name(path) for path, _ in torch_pytree.tree_flatten_with_path(params, is_leaf=is_weight)[0]]


def map_leaves(function: Callable[[str, Any], Any], params: Any, grouped: bool = False) -> Any:
    """The tree with ``function(path, leaf)`` in place of each leaf.

    Args:
        function: of a leaf's path and itself.
        params: the tree.
        grouped: where it is a tuple of dicts it is a module's (parameters, buffers), whose names are the paths.

    Examples:
        >>> map_leaves(lambda path, leaf: (path, leaf), {"a": 1, "b": [2]})
        {'a': ('a', 1), 'b': [('b.0', 2)]}

    """
    if grouped and isinstance(params, tuple):
        return tuple(map_leaves(function, group) for group in params)
    leaves, spec = torch_pytree.tree_flatten(params, is_leaf=is_weight)
    return torch_pytree.tree_unflatten([function(p, leaf) for p, leaf in zip(leaf_paths(params), leaves, strict=True)], spec)


def weights_of(params: Any, grouped: bool = False) -> dict[str, Any]:
    """Every leaf by its path, as ``map_leaves`` names them."""
    found: dict[str, Any] = {}
    map_leaves(lambda path, leaf: found.setdefault(path, leaf), params, grouped)
    return found


def is_grouped(params: Any, paths: Iterable[str]) -> bool:
    """Whether these are the paths of a module's (parameters, buffers), rather than of a tuple that a function takes."""
    if not isinstance(params, tuple) or not all(isinstance(group, dict) for group in params):
        return False
    wanted = set(paths)
    return len(wanted & set(weights_of(params, True))) > len(wanted & set(weights_of(params)))


def _name(path: Any) -> str:
    parts = []
    for key in path:
        part = getattr(key, "key", None)
        part = getattr(key, "idx", None) if part is None else part
        parts.append(str(getattr(key, "name", None) if part is None else part))
    return ".".join(parts)
