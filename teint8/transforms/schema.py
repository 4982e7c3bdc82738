"""The description of a tree of packed parameters in JSON, beside its tensors."""

import pathlib
from typing import Any

import torch
from torch import Tensor

from teint8.conditioning import Conditioned
from teint8.ops.conv_layout import contracted
from teint8.qtensor import QTensor

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_CONDITIONS = ("smoothing", "outlier_weight", "activation_scale")


def bad(path: pathlib.Path, what: str) -> ValueError:
    """The error that a file is told of with."""
    return ValueError(f"load_packed: {path}: {what}; save it again with teint8.save_packed, or get another copy")


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def described(node: Any, path: str, tensors: dict[str, Tensor], leaves: dict[str, dict[str, Any]]) -> Any:
    """The tree in JSON, each leaf its path; tensors and what is to be known of packed ones go to the dicts."""
    if isinstance(node, QTensor):
        axis = list(node.axis) if isinstance(node.axis, tuple) else node.axis
        leaves[path] = {"dtype": str(node.dtype).removeprefix("torch."), "axis": axis}
        parts = {"codes": node.codes, "scale": node.scale, "activation_scale": node.activation_scale}
        tensors |= {f"{path}.{name}": t for name, t in parts.items() if t is not None}
        return {"packed": path}
    if isinstance(node, Conditioned):
        leaves[path] = {"rotation": node.rotation, "outliers": list(node.outliers)}
        parts = {name: getattr(node, name) for name in _CONDITIONS}
        tensors |= {f"{path}.{name}": t for name, t in parts.items() if t is not None}
        return {"conditioned": [path, described(node.weight, f"{path}.weight", tensors, leaves)]}
    if isinstance(node, Tensor):
        tensors[path] = node.detach()
        return {"tensor": path}
    if isinstance(node, dict):
        wrong = next((key for key in node if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(f"save_packed: the key {wrong!r} at {path or 'the root'!r} is no string")
        return {"dict": [[key, described(value, _joined(path, key), tensors, leaves)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [described(value, _joined(path, str(i)), tensors, leaves) for i, value in enumerate(node)]}
    raise TypeError(
        f"save_packed: {path or 'params'!r} is {type(node).__name__}; tensors and QTensors in dicts, lists and tuples are needed"
    )


def _taken(tensors: dict[str, Tensor], name: str, file: pathlib.Path) -> Tensor:
    if name not in tensors and "-of-" in file.name:
        raise ValueError(
            f"load_packed: {file} is one of several files; load them by their index, {file.stem.split('-')[0]}*.index.json"
        )
    if name not in tensors:
        raise bad(file, f"the tensor {name!r} is missing")
    return tensors.pop(name)


def _conditioned(path: str, weight: Any, leaves: Any, tensors: dict[str, Tensor], file: pathlib.Path) -> Conditioned:
    parts: dict[str, Any] = {name: tensors.pop(f"{path}.{name}", None) for name in _CONDITIONS}
    try:
        about = leaves[path]
        return Conditioned(weight, rotation=about["rotation"], outliers=tuple(about["outliers"]), **parts)
    except (TypeError, ValueError, KeyError) as error:
        raise bad(file, f"{path} is no conditioned weight: {error}") from None


def rebuilt(node: Any, leaves: Any, tensors: dict[str, Tensor], file: pathlib.Path) -> Any:
    """The tree; tensors that it takes are taken out of the dict."""
    ((kind, value),) = node.items()
    if kind == "tensor":
        return _taken(tensors, value, file)
    if kind == "packed":
        about = leaves[value]
        codes, scale = (_taken(tensors, f"{value}.{name}", file) for name in ("codes", "scale"))
        axis = tuple(about["axis"]) if isinstance(about["axis"], list) else about["axis"]
        try:
            if isinstance(axis, tuple) and axis == contracted(codes.ndim, False):
                codes = codes.movedim(1, -1).contiguous().movedim(-1, 1)  # as a convolution reads them, and as they were packed
            return QTensor(codes, scale, tensors.pop(f"{value}.activation_scale", None), _DTYPES[about["dtype"]], axis)
        except (TypeError, ValueError, KeyError) as error:
            raise bad(file, f"{value} is no packed weight: {error}") from None
    if kind == "conditioned":
        return _conditioned(value[0], rebuilt(value[1], leaves, tensors, file), leaves, tensors, file)
    if kind == "dict":
        return {key: rebuilt(inner, leaves, tensors, file) for key, inner in value}
    made = [rebuilt(inner, leaves, tensors, file) for inner in value]
    return made if kind == "list" else tuple(made)
