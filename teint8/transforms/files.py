"""``save_packed`` and ``load_packed``: packed parameters as safetensors files, which anyone's safetensors reads, too."""

import importlib.util
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8.policy import Policy
from teint8.transforms.schema import bad, described, rebuilt

VERSION = 1
_KEY, _CHECK = "teint8", "teint8_crc32"


class PackedFile(NamedTuple):
    """What a file holds.

    Attributes:
        params: the tree that was saved.
        policy: the Policy that was saved with it, or None.

    Examples:
        >>> params, policy = PackedFile({"w": 1}, Policy.qat())
        >>> policy == Policy.qat()
        True

    """

    params: Any
    policy: Policy | None


def save_packed(
    path: str | os.PathLike[str], params: Any, *, policy: Policy | None = None, shard_bytes: int | None = None
) -> list[pathlib.Path]:
    """Write packed parameters to a safetensors file, or to several.

    A packed weight ``w`` is the tensors ``w.codes`` (int8), ``w.scale`` (float32) and, if it is static, ``w.activation_scale``; other
    leaves are as they are. The header's metadata holds what they mean as JSON: the schema's version, the tree, each weight's float
    dtype and axis, the policy, and a checksum of every tensor.

    Args:
        path: of the file, "model.safetensors". Written beside it first, so that an interrupted write leaves what was there.
        params: what ``pack`` returned: dicts, lists and tuples of tensors and QTensors.
        policy: what it was packed by, to be found again.
        shard_bytes: begin a new file where one would hold more: "model-00001-of-00003.safetensors" and so on, and
            "model.safetensors.index.json", whose path is what ``load_packed`` takes.

    Returns:
        The paths that were written, an index last.

    Raises:
        TypeError: a leaf that is no tensor, or a key that is no string.
        ValueError: nothing to save, or a leaf too large for a shard.
        ImportError: a package that this needs is not installed; the message says which.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> from teint8 import pack, quantize
        >>> model = nn.Linear(8, 4)
        >>> packed = pack(quantize(model), dict(model.named_parameters()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save_packed(folder + "/model.safetensors", packed)
        ...     loaded = load_packed(written[0]).params
        ...     torch.equal(loaded["weight"].codes, packed["weight"].codes)
        True

    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save_packed: path is {type(path).__name__}; write save_packed(path, params), the path first")
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"save_packed: policy is {policy!r}; a Policy is needed, such as Policy.qat()")
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_packed: there is no folder {path.parent}; make it first")
    tensors: dict[str, Tensor] = {}
    leaves: dict[str, dict[str, Any]] = {}
    tree = described(params, "", tensors, leaves)
    if not tensors:
        raise ValueError("save_packed: there are no tensors in params; give what teint8.pack returned")
    shards = _shards(tensors, shard_bytes)
    names = [path] if shard_bytes is None else [_numbered(path, i + 1, len(shards)) for i in range(len(shards))]
    whole = {"version": VERSION, "tree": tree, "leaves": leaves, "policy": None if policy is None else json.loads(policy.to_json())}
    for name, keys in zip(names, shards, strict=True):
        about = {**whole, "tensors": {key: _about(tensors[key]) for key in keys}, "file": name.name}
        _write(name, {key: tensors[key] for key in keys}, about)
    if shard_bytes is None:
        return names
    index = path.with_name(path.name + ".index.json")
    sizes = {"total_size": sum(t.nbytes for t in tensors.values())}
    where = {key: name.name for name, keys in zip(names, shards, strict=True) for key in keys}
    _replace(index, json.dumps({"metadata": sizes, "weight_map": where}, indent=1).encode())
    return [*names, index]


def load_packed(path: str | os.PathLike[str], *, device: str | torch.device = "cpu", verify: bool = True) -> PackedFile:
    """Packed parameters from a file, or from several by their index; on the CPU memory-mapped: no float copy is made.

    Args:
        path: what ``save_packed`` wrote, or its index.
        device: where the tensors go.
        verify: compare every tensor with its checksum, which reads the whole file; False reads it as it is used.

    Returns:
        A PackedFile: ``params`` is what was saved, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of ``save_packed``, of a version that this one does not
            know, truncated or edited; the message says which.
        ImportError: a package that this needs is not installed; the message says which.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (file,) = save_packed(folder + "/w.safetensors", {"w": torch.ones(2)}, policy=Policy.qat())
        ...     params, policy = load_packed(file)
        >>> params, policy == Policy.qat()
        ({'w': tensor([1., 1.])}, True)

    """
    path = pathlib.Path(path)
    files = _files_of(path)
    tensors: dict[str, Tensor] = {}
    whole: dict[str, Any] | None = None
    for file in files:
        about, found = _read(file, str(device), verify)
        if whole is not None and {k: about[k] for k in ("tree", "leaves", "policy")} != {
            k: whole[k] for k in ("tree", "leaves", "policy")
        }:
            raise bad(file, "it belongs to another model than the first file of the index")
        if tensors.keys() & found.keys():
            raise bad(file, "it holds tensors that another file of the index holds, too")
        whole, tensors = about, {**tensors, **found}
    if whole is None:
        raise bad(path, "its index names no file")
    try:
        params = rebuilt(whole["tree"], whole["leaves"], tensors, path)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise bad(path, f"its description makes no sense ({error!r})") from None
    if tensors:
        raise bad(path, f"its tree does not name the tensor {next(iter(tensors))!r}")
    policy = whole["policy"]
    return PackedFile(params, None if policy is None else _policy_of(policy, path))


def _files_of(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.exists():
        raise FileNotFoundError(f"load_packed: there is no file {path}")
    if path.is_dir():
        raise ValueError(f"load_packed: {path} is a folder; give the file in it, or its .index.json")
    return _indexed(path) if path.name.endswith(".json") else [path]


def _about(t: Tensor) -> dict[str, Any]:
    return {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "crc32": _crc32(t)}


def _crc32(t: Tensor) -> int:
    flat = t.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _shards(tensors: dict[str, Tensor], limit: int | None) -> list[list[str]]:
    """Names by file, in order."""
    if limit is None:
        return [list(tensors)]
    shards: list[list[str]] = [[]]
    size = 0
    for name, t in tensors.items():
        if t.nbytes > limit:
            raise ValueError(f"save_packed: {name} has {t.nbytes} bytes, more than shard_bytes={limit}; give at least that many")
        if size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += t.nbytes
    return shards


def _numbered(path: pathlib.Path, number: int, count: int) -> pathlib.Path:
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def need(*names: str) -> None:
    """Raise for packages that files need and that are not installed.

    Raises:
        ImportError: with the command that installs them.

    """
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"files need {' and '.join(absent)}, not installed here: pip install {' '.join(absent)}")


def _write(path: pathlib.Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    need("safetensors", "numpy")  # which safetensors uses to write a tensor
    from safetensors.torch import save

    text = json.dumps(about, sort_keys=True)
    # each tensor has memory of its own in a file, whether or not it shares some here
    copies = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    _replace(path, save(copies, {"format": "pt", _KEY: text, _CHECK: str(zlib.crc32(text.encode()))}))


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Write beside the file, then put it in place."""
    beside = path.with_name(path.name + ".writing")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: pathlib.Path, device: str, verify: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of itself, and its tensors."""
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            about = _checked(file.metadata() or {}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, OSError) as error:
        raise bad(path, f"it is no safetensors file, or a part of one ({error})") from None
    wanted = about["tensors"]
    if tensors.keys() != wanted.keys():
        raise bad(path, f"its tensors are not those that it names: {sorted(tensors.keys() ^ wanted.keys())[0]!r}")
    for name, t in tensors.items():
        found = {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        if found != {key: wanted[name][key] for key in found}:
            raise bad(path, f"{name} is {found['dtype']} {found['shape']}, and was {wanted[name]['dtype']} {wanted[name]['shape']}")
        if verify and _crc32(t) != wanted[name]["crc32"]:
            raise bad(path, f"the values of {name} are not those that were saved")
    return about, tensors


def _checked(metadata: dict[str, str], path: pathlib.Path) -> dict[str, Any]:
    if _KEY not in metadata:
        raise bad(path, "it was not written by teint8.save_packed")
    text = metadata[_KEY]
    if metadata.get(_CHECK) != str(zlib.crc32(text.encode())):
        raise bad(path, "its description was edited")
    about = json.loads(text)
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise bad(path, f"its schema has version {version!r}, and this teint8 reads {VERSION}")
    if not {"tree", "leaves", "policy", "tensors"} <= about.keys() or not isinstance(about["tensors"], dict):
        raise bad(path, "its description has no tree, or no tensors")
    return about


def _indexed(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index names, all beside it."""
    try:
        names = list(dict.fromkeys(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise bad(path, f"it is no index of safetensors files ({error!r})") from None
    return [path.with_name(name) for name in _beside(names, path)]


def _beside(names: list[Any], path: pathlib.Path) -> Iterator[str]:
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise bad(path, f"it names {name!r}, which is no file beside it")
        if not path.with_name(name).exists():
            raise bad(path, f"it names {name!r}, which is missing")
        yield name


def _policy_of(rules: Any, path: pathlib.Path) -> Policy:
    try:
        return Policy.from_json(json.dumps(rules))
    except (TypeError, ValueError) as error:
        raise bad(path, f"its policy cannot be read: {error}") from None
