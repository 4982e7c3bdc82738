"""INT8 checkpoints of others: the compressed-tensors layout that serving engines read, and torchao's tensors."""

import json
import os
import pathlib
from typing import Any

import torch
from torch import Tensor

from teint8.policy import Policy, Quant, Rule
from teint8.qtensor import QTensor
from teint8.transforms.files import PackedFile, need

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_OF_WEIGHTS = (".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point")
_FILE, _CONFIG = "model.safetensors", "config.json"


def save_compressed_tensors(folder: str | os.PathLike[str], params: dict[str, Any], *, config: dict[str, Any] | None = None) -> None:
    """Write packed parameters as a compressed-tensors checkpoint, format "int-quantized": W8A8, a scale for each output channel.

    ``layer.weight`` is int8, ``layer.weight_scale`` (N, 1) and, where activations are static, ``layer.input_scale`` (1,), both float32;
    ``config.json`` says so under ``quantization_config``, and names the layers.

    Args:
        folder: where ``model.safetensors`` and ``config.json`` go; made if need be.
        params: what ``pack`` returned for a module: a dict by name.
        config: the model's own configuration, which is kept beside; that of a ``config.json`` in the folder unless given.

    Returns:
        Nothing; ``load_compressed_tensors(folder)`` reads it back.

    Raises:
        TypeError: not a dict of tensors and QTensors by name.
        ValueError: a weight that the format has no place for, or activations of
            which some are static and some not.
        ImportError: a package that this needs is not installed; the message says which.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> from teint8 import pack, quantize
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> packed = pack(quantize(model), dict(model.named_parameters()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed_tensors(folder, packed)
        ...     loaded = load_compressed_tensors(folder)
        >>> torch.equal(loaded.params["0.weight"].codes, packed["0.weight"].codes), loaded.policy == Policy.qat()
        (True, True)

    """
    need("safetensors", "numpy")
    from safetensors.torch import save_file

    if not isinstance(params, dict):
        raise TypeError(f"save_compressed_tensors: params is a {type(params).__name__}; a dict by name is needed, as pack gives")
    folder = pathlib.Path(folder)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, bool] = {}
    for path, leaf in params.items():
        if isinstance(leaf, QTensor):
            layer = _layer(path, leaf)
            tensors[path], tensors[f"{layer}.weight_scale"] = leaf.codes, leaf.scale
            layers[layer] = leaf.activation_scale is not None
            if leaf.activation_scale is not None:
                tensors[f"{layer}.input_scale"] = leaf.activation_scale.reshape(1)
        elif isinstance(leaf, Tensor):
            tensors[path] = leaf.detach()
        else:
            raise _no_place(path, leaf)
    if not layers or len(set(layers.values())) > 1:
        what = "none is packed" if not layers else "some have a static activation scale and some have not"
        raise ValueError(f"save_compressed_tensors: of these weights {what}; pack them, and give scales to all or none")
    static = next(iter(layers.values()))
    folder.mkdir(parents=True, exist_ok=True)
    kept = _json(folder / _CONFIG) if config is None and (folder / _CONFIG).exists() else dict(config or {})
    activations = {**_INT8, "strategy": "tensor", "dynamic": False} if static else {**_INT8, "strategy": "token", "dynamic": True}
    group = {"targets": list(layers), "weights": {**_INT8, "strategy": "channel", "dynamic": False}, "input_activations": activations}
    if "dtype" not in kept and "torch_dtype" not in kept:
        kept["dtype"] = str(next(leaf.dtype for leaf in params.values() if isinstance(leaf, QTensor))).removeprefix("torch.")
    kept["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, folder / _FILE, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(kept, indent=2) + "\n")


def load_compressed_tensors(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PackedFile:
    """Packed parameters of a compressed-tensors checkpoint in INT8: symmetric, a scale for each output channel or one in all.

    Args:
        folder: with ``config.json`` and one or several ``.safetensors`` files.
        device: where the tensors go.

    Returns:
        A PackedFile: parameters by name, which ``quantize``'s functions take, and a policy: INT8 for what is INT8 in the file.

    Raises:
        FileNotFoundError: no configuration or no tensors.
        ValueError: another format, or one that INT8 by channel cannot hold; the
            message says what.
        ImportError: a package that this needs is not installed; the message says which.

    Examples:
        >>> import tempfile
        >>> packed = {"0.weight": QTensor.quantize(torch.ones(2, 4)), "0.bias": torch.zeros(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed_tensors(folder, packed)
        ...     sorted(load_compressed_tensors(folder).params)
        ['0.bias', '0.weight']

    """
    folder = pathlib.Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    for missing, what in ((not (folder / _CONFIG).is_file(), _CONFIG), (not files, ".safetensors file")):
        if missing:
            raise FileNotFoundError(f"load_compressed_tensors: there is no {what} in {folder}")
    whole = _json(folder / _CONFIG)
    activation = _activation(whole.get("quantization_config") or whole.get("compression_config"), folder)
    tensors = _tensors(files, str(device), folder)
    dtype = getattr(torch, str(whole.get("torch_dtype", whole.get("dtype", ""))).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):  # not said: that of what is in float
        others = [t.dtype for name, t in tensors.items() if t.is_floating_point() and not name.endswith(_OF_WEIGHTS)]
        dtype = others[0] if others else None
    params: dict[str, Any] = {}
    for name, t in tensors.items():
        layer = name.removesuffix(".weight")
        if t.dtype == torch.int8 and name.endswith(".weight"):
            params[name] = _weight(layer, t, tensors, dtype, folder)
        elif not name.endswith(_OF_WEIGHTS):
            params[name] = t
    if not any(isinstance(leaf, QTensor) for leaf in params.values()):
        raise _bad(folder, "it holds no int8 weight")
    packed = [name for name, leaf in params.items() if isinstance(leaf, QTensor)]
    in_float = [name for name, leaf in params.items() if not isinstance(leaf, QTensor) and leaf.ndim >= 2]
    # where some stay in float each packed weight has a rule of its own
    paths = packed if in_float else ["*"]
    return PackedFile(params, Policy([Rule(path, activation=activation) for path in paths]))


def from_torchao(state: dict[str, Any]) -> dict[str, Any]:
    """Packed parameters from a state dict with torchao's INT8 tensors (``Int8Tensor``: codes ``qdata`` (N, K), ``scale`` (N, 1)).

    Args:
        state: ``model.state_dict()`` after ``torchao.quantization.quantize_(model, Int8DynamicActivationInt8WeightConfig())``.

    Returns:
        A dict by name, as ``pack`` gives it: QTensors for INT8 tensors, all others as they are.

    Raises:
        ValueError: no tensor of that kind, or one that is not symmetric by channel.

    Examples:
        >>> class Int8Tensor:
        ...     qdata, scale, dtype = torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([[0.5]]), torch.float32
        >>> from_torchao({"0.weight": Int8Tensor(), "0.bias": torch.ones(1)})["0.weight"].dequantize()
        tensor([[ 0.5000, -1.0000]])

    """
    params: dict[str, Any] = {}
    for name, leaf in state.items():
        codes, scale = getattr(leaf, "qdata", None), getattr(leaf, "scale", None)
        if codes is None or scale is None:
            params[name] = leaf
            continue
        zero = getattr(leaf, "zero_point", None)
        by_channel = codes.dtype == torch.int8 and codes.ndim == 2 and scale.numel() in (1, codes.shape[0])
        if not by_channel or (zero is not None and bool(zero.any())):
            raise ValueError(f"from_torchao: {name} is {type(leaf).__name__} of {codes.dtype} {tuple(codes.shape)}, with scales "
                             f"{tuple(scale.shape)}; symmetric int8 (N, K) with a scale for each channel is needed")  # fmt: skip
        params[name] = QTensor(codes, scale.float().reshape(-1, 1).expand(codes.shape[0], 1).contiguous(), None, leaf.dtype)
    if not any(isinstance(leaf, QTensor) for leaf in params.values()):
        raise ValueError("from_torchao: no tensor has torchao's qdata and scale; quantize the model with its INT8 configuration first")
    return params


def _tensors(files: list[pathlib.Path], device: str, folder: pathlib.Path) -> dict[str, Tensor]:
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=device) as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _bad(folder, f"{file.name} is no safetensors file, or a part of one ({error})") from None
    return tensors


def _layer(path: str, leaf: QTensor) -> str:
    if not path.endswith(".weight") or leaf.axis != -1 or leaf.ndim != 2 or leaf.block:
        raise _no_place(path, leaf)
    return path.removesuffix(".weight")


def _no_place(path: str, leaf: Any) -> ValueError:
    return ValueError(
        f"save_compressed_tensors: {path} is {leaf!r}; the format holds weights (N, K) of linears, named '....weight', with a scale "
        "for each channel: leave others in float by a rule with weight=None"
    )


def _weight(layer: str, codes: Tensor, tensors: dict[str, Tensor], dtype: Any, folder: pathlib.Path) -> QTensor:
    scale, zero = tensors.get(f"{layer}.weight_scale"), tensors.get(f"{layer}.weight_zero_point")
    if scale is None or codes.ndim != 2 or scale.numel() not in (1, codes.shape[0]):
        found = None if scale is None else tuple(scale.shape)
        raise _bad(folder, f"{layer} has codes {tuple(codes.shape)} and scales {found}; one a channel is needed")
    if zero is not None and bool(zero.any()):
        raise _bad(folder, f"{layer} has a zero point, and INT8 here is symmetric")
    static = tensors.get(f"{layer}.input_scale")
    if static is not None and (static.numel() != 1 or not bool(static > 0)):
        raise _bad(folder, f"{layer} has the input scale {static!r}; one positive number is needed")
    of = dtype if isinstance(dtype, torch.dtype) else scale.dtype
    channels = scale.float().reshape(-1, 1).expand(codes.shape[0], 1).contiguous()
    return QTensor(codes, channels, None if static is None else static.float().reshape(()), of)


def _activation(config: Any, folder: pathlib.Path) -> Quant | None:
    """What the configuration asks of activations."""
    if not isinstance(config, dict) or config.get("format") not in ("int-quantized", "naive-quantized"):
        found = config.get("format") if isinstance(config, dict) else None
        raise _bad(folder, f"its format is {found!r}, and 'int-quantized' is read here")
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    found = {json.dumps(group.get("input_activations"), sort_keys=True) for group in groups if isinstance(group, dict)}
    if len(found) != 1 or any(not _is_int8(group.get("weights"), ("channel", "tensor")) for group in groups):
        raise _bad(folder, "its groups are not all of symmetric int8 weights by channel or tensor, with activations of one kind")
    how = json.loads(found.pop())
    if how is None:
        return None
    if not _is_int8(how, ("token", "tensor")) or how.get("dynamic") is not (how.get("strategy") == "token"):
        raise _bad(folder, f"its activations are {how}; dynamic ones by token, or static ones by tensor, are read here")
    return Quant() if how["dynamic"] else Quant(scale="static")


def _is_int8(how: Any, strategies: tuple[str, ...]) -> bool:
    return isinstance(how, dict) and all(how.get(k) == v for k, v in _INT8.items()) and how.get("strategy") in strategies


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict):
        return found
    raise ValueError(f"{path} holds {type(found).__name__}; an object is needed")


def _bad(folder: pathlib.Path, what: str) -> ValueError:
    return ValueError(f"load_compressed_tensors: {folder}: {what}")
