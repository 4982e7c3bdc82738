"""Checkpoints of compressed-tensors and torchao, written and read; by the packages themselves where they are installed."""

import importlib.util
import json
import pathlib

import pytest
import torch
from contract import different
from torch import nn

import teint8
from teint8 import Policy, QTensor, Quant, Rule

needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
         for name in ("compressed_tensors", "torchao")}  # fmt: skip


def setting(dtype: torch.dtype = torch.float32) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)
    qfn = teint8.quantize(model)
    return model, qfn, dict(model.named_parameters()), torch.randn(5, 32, dtype=dtype)


@pytest.mark.parametrize("static", [False, True])
def test_round_trip(static: bool, tmp_path: pathlib.Path) -> None:
    model, qfn, params, x = setting()
    packed = teint8.pack(qfn, params)
    if static:
        packed = teint8.with_scales(packed, teint8.scales(teint8.calibrate(qfn, params, [x], progress=False)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "dtype": "float32"}))
    teint8.save_compressed_tensors(tmp_path, packed)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mine" and config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["0", "2"]
    loaded = teint8.load_compressed_tensors(tmp_path)
    assert loaded.policy == (Policy([Rule(activation=Quant(scale="static"))]) if static else Policy.qat())
    served = teint8.quantize(model, loaded.policy, strict=True)
    assert different(served(loaded.params, x), served(packed, x)) == 0
    assert set(loaded.params) == set(params)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_float_stays_so_and_dtypes_come_back(dtype: torch.dtype, static: bool, tmp_path: pathlib.Path) -> None:
    model, _, params, x = setting(dtype)
    qfn = teint8.quantize(model, Policy([Rule("2.weight", weight=None), Rule()]))
    packed = teint8.pack(qfn, params)
    how = Quant(scale="static") if static else Quant()
    if static:
        packed = teint8.with_scales(packed, teint8.scales(teint8.calibrate(qfn, params, [x], progress=False)))
    teint8.save_compressed_tensors(tmp_path, packed)
    loaded = teint8.load_compressed_tensors(tmp_path)
    assert loaded.params["0.weight"].dtype == dtype and torch.equal(loaded.params["2.weight"], params["2.weight"])
    assert loaded.policy == Policy([Rule("0.weight", activation=how)])
    served, same = (teint8.quantize(model, p, strict=True) for p in (loaded.policy, Policy([Rule("0.*", activation=how)])))
    assert different(served(loaded.params, x), same(packed, x)) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")  # others may not say it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert teint8.load_compressed_tensors(tmp_path).params["0.weight"].dtype == dtype


@needs["compressed_tensors"]
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_package_reads_what_is_written_and_the_reverse(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    model, qfn, params, x = setting(dtype)
    packed = teint8.pack(qfn, params)
    teint8.save_compressed_tensors(tmp_path, packed, config={"dtype": str(dtype).removeprefix("torch.")})
    config = QuantizationConfig.model_validate(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    scheme = config.config_groups["group_0"]
    tensors = load_file(tmp_path / "model.safetensors")
    theirs = {}
    for layer in scheme.targets:
        local = {name: tensors[f"{layer}.{name}"] for name in ("weight", "weight_scale")}
        found = IntQuantizationCompressor.decompress(local, scheme)["weight"]
        assert torch.equal(found.to(dtype), packed[f"{layer}.weight"].dequantize()), layer
        # the reverse: their codes of the float weight by a scale of theirs, in the dtype of the model
        scale = (params[f"{layer}.weight"].detach().abs().amax(1, keepdim=True).float() / 127.5).to(dtype)
        made = IntQuantizationCompressor.compress({"weight": params[f"{layer}.weight"].detach(), "weight_scale": scale}, scheme)
        theirs |= {f"{layer}.{name}": t.contiguous() for name, t in made.items()}
    biases = {n: p.detach() for n, p in params.items() if n.endswith("bias")}
    save_file(theirs | biases, tmp_path / "model.safetensors")
    loaded = teint8.load_compressed_tensors(tmp_path).params
    for layer in scheme.targets:
        local = {name: theirs[f"{layer}.{name}"] for name in ("weight", "weight_scale")}
        want = IntQuantizationCompressor.decompress(local, scheme)["weight"]
        assert torch.equal(loaded[f"{layer}.weight"].dequantize(), want.to(dtype)), layer
    assert float((qfn(loaded, x) - model(x)).norm() / model(x).norm()) < 0.05


@needs["torchao"]
def test_torchao() -> None:
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model, qfn, params, x = setting(torch.bfloat16)
    theirs = copy.deepcopy(model)
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
    loaded = teint8.from_torchao(theirs.state_dict())
    for name in ("0.weight", "2.weight"):
        assert isinstance(loaded[name], QTensor)
        assert torch.equal(loaded[name].dequantize(), theirs.get_parameter(name).dequantize())
    assert float((qfn(loaded, x) - theirs(x)).norm() / theirs(x).norm()) < 0.02
    assert set(loaded) == set(params)


def test_what_looks_like_torchao() -> None:
    class Int8Tensor:
        def __init__(self, zero: int = 0) -> None:
            self.qdata, self.scale = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [0.25]])
            self.zero_point, self.dtype = torch.full((2, 1), zero), torch.float32

    params = teint8.from_torchao({"a.weight": Int8Tensor(), "a.bias": torch.ones(2)})
    assert params["a.weight"].dequantize().tolist() == [[0.5, -1.0], [0.75, 1.0]] and params["a.bias"].tolist() == [1, 1]
    for state, match in (({"w": Int8Tensor(3)}, "symmetric int8"), ({"w": torch.ones(2)}, "no tensor has torchao's")):
        with pytest.raises(ValueError, match=match):
            teint8.from_torchao(state)


def test_what_the_format_has_no_place_for(tmp_path: pathlib.Path) -> None:
    _, qfn, params, _ = setting()
    packed = teint8.pack(qfn, params)
    some = {**packed, "0.weight": packed["0.weight"].with_activation_scale(0.1)}
    for tree, match in (
        (teint8.pack(qfn, teint8.rotate(qfn, params)), "0.weight is Conditioned"),
        ({"w": packed["0.weight"]}, "w is QTensor"),
        ({"a.weight": QTensor.quantize(torch.randn(4, 64), granularity="block32")}, "a.weight is QTensor"),
        (params, "none is packed"),
        (some, "some have a static activation scale"),
    ):
        with pytest.raises(ValueError, match=match):
            teint8.save_compressed_tensors(tmp_path / "no", tree)
    assert not (tmp_path / "no").exists()
    with pytest.raises(TypeError, match="a dict by name is needed"):
        teint8.save_compressed_tensors(tmp_path, [packed])


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    from safetensors.torch import load_file, save_file

    _, qfn, params, _ = setting()
    teint8.save_compressed_tensors(tmp_path, teint8.pack(qfn, params))
    good, file, config_file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", tmp_path / "config.json"
    config = config_file.read_text()

    def refused(match: str, error: type = ValueError) -> None:
        with pytest.raises(error, match=match):
            teint8.load_compressed_tensors(tmp_path)

    for name, t, match in (
        ("0.weight_scale", torch.ones(3, 1), "one a channel is needed"),
        ("0.weight_zero_point", torch.ones(16, 1), "zero point"),
        ("0.input_scale", torch.zeros(1), "one positive number"),
    ):
        save_file({**good, name: t}, file)
        refused(match)
    save_file(good, file)
    for old, new, match in (
        ("int-quantized", "pack-quantized", "its format is 'pack-quantized'"),
        ('"num_bits": 8', '"num_bits": 4', "symmetric int8 weights"),
        ('"token"', '"group"', "dynamic ones by token"),
        ("{", "[", "is not JSON"),
    ):
        config_file.write_text(config.replace(old, new))
        refused(match)
    config_file.write_text(config)
    file.write_bytes(file.read_bytes()[:200])
    refused("no safetensors file")
    file.unlink()
    refused("there is no .safetensors file", FileNotFoundError)
    config_file.unlink()
    refused("there is no config.json", FileNotFoundError)
