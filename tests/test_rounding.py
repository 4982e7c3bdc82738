"""GPTQ, rounding by coordinate descent, AWQ: the objective itself, measured."""

import pytest
import torch
from contract import different
from torch import nn

import teint8
from teint8 import Policy, QTensor, Quant, Rule


def setting(granularity: str, device: str, bias: bool = True) -> tuple:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64, bias=bias), nn.GELU(), nn.Linear(64, 10)).to(device)
    mix = torch.randn(48, 48, device=device)
    x = torch.randn(512, 48, device=device) @ mix
    activation = None if granularity == "block" else Quant()
    qfn = teint8.quantize(
        net, Policy([Rule(weight=Quant(granularity, block=32 if granularity == "block" else 128), activation=activation)])
    )
    return net, x, qfn, dict(net.named_parameters())


def error(q: QTensor, w: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (q.dequantize() - w.detach()).mT).norm())


@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_the_error_of_layers_falls(method: str, granularity: str, device: str) -> None:
    net, x, qfn, params = setting(granularity, device)
    moments = teint8.second_moments(qfn, params, x.split(128), progress=False)
    torch.testing.assert_close(moments["0.weight"].mean, x.mT @ x / 512, rtol=1e-4, atol=1e-3)
    plain = teint8.pack(qfn, params)
    packed = getattr(teint8, method)(qfn, params, moments, progress=False)
    with torch.no_grad():
        inputs = {"0.weight": x, "2.weight": net[1](net[0](x))}
    for path, seen in inputs.items():
        assert torch.equal(packed[path].scale, plain[path].scale) and int(packed[path].codes.abs().max()) <= 127
        assert error(packed[path], params[path], seen) < 0.8 * error(plain[path], params[path], seen), path
        off = (packed[path].codes.int() - plain[path].codes.int()).abs()
        assert int((off > 0).sum()) > 0 and (method == "gptq" or int(off.max()) == 1)
    assert different(packed["0.bias"], params["0.bias"].detach()) == 0
    assert float((qfn(packed, x) - net(x)).norm()) < float((qfn(plain, x) - net(x)).norm()) * 1.05


def test_descent_finds_the_best_of_all_roundings() -> None:
    """Of eight weights every choice of up and down is tried."""
    better = 0
    for seed in range(8):
        torch.manual_seed(seed)
        w, x = torch.randn(1, 8), torch.randn(64, 8) @ torch.randn(8, 8)
        qfn = teint8.quantize(lambda p, x: nn.functional.linear(x, p["w"]))
        moments = teint8.second_moments(qfn, {"w": w}, [x], progress=False)
        found = teint8.adaround(qfn, {"w": w}, moments, x, progress=False)["w"]
        exact = w / found.scale
        errors = []
        for choice in range(256):
            up = torch.tensor([choice >> i & 1 for i in range(8)])
            codes = torch.where(up == 1, exact.ceil(), exact.floor()).clamp(-127, 127)
            errors.append(float((x @ (codes * found.scale - w).mT).norm()))
        nearest = error(teint8.pack(qfn, {"w": w}, x)["w"], w, x)
        assert error(found, w, x) <= min(nearest, sorted(errors)[25])  # coordinate descent: among the best tenth
        better += error(found, w, x) < nearest
    assert better >= 4


def test_conditioned_weights_and_other_layouts(device: str) -> None:
    _, x, qfn, params = setting("tensor", device)
    ready = teint8.rotate(qfn, params)
    packed = teint8.gptq(qfn, ready, teint8.second_moments(qfn, ready, [x], progress=False), progress=False)
    plain = teint8.pack(qfn, ready)
    assert isinstance(packed["0.weight"], teint8.Conditioned)
    assert error(packed["0.weight"], params["0.weight"], x) < 0.9 * error(plain["0.weight"], params["0.weight"], x)

    turned = {"w": params["0.weight"].detach().mT.contiguous()}
    by_matmul = teint8.quantize(lambda p, x: x @ p["w"], qfn.policy)
    moments = teint8.second_moments(by_matmul, turned, [x], progress=False)
    better, nearest = teint8.gptq(by_matmul, turned, moments, x, progress=False)["w"], teint8.pack(by_matmul, turned, x)["w"]
    assert better.axis == -2
    errors = [float((x @ (q.dequantize() - turned["w"])).norm()) for q in (better, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_channels_that_are_never_seen_and_rows_of_zeros(device: str) -> None:
    _, x, qfn, params = setting("row", device)
    x[:, 5] = 0
    params = {n: p.detach().clone() for n, p in params.items()}
    params["0.weight"][3] = 0
    moments = teint8.second_moments(qfn, params, [x], progress=False)
    for method in (teint8.gptq, teint8.adaround):
        packed = method(qfn, params, moments, progress=False)["0.weight"]
        assert int(packed.codes[3].abs().max()) == 0 and bool(packed.dequantize().isfinite().all())


def test_awq_smooths_where_it_helps(device: str) -> None:
    net, x, qfn, params = setting("tensor", device)
    x = torch.randn_like(x)
    x[:, 7] *= 100
    params["0.weight"].data[:, 7] *= 0.05  # what meets it is small, and a grid for all is coarse there
    moments = teint8.second_moments(qfn, params, [x], progress=False)
    ready = teint8.awq(qfn, params, moments, progress=False)
    assert isinstance(ready["0.weight"], teint8.Conditioned)
    packed, plain = teint8.pack(qfn, ready)["0.weight"], teint8.pack(qfn, params)["0.weight"]
    assert error(packed, params["0.weight"], x) < 0.7 * error(plain, params["0.weight"], x)
    torch.testing.assert_close(teint8.quantize(net, Policy([]))(ready, x), net(x), rtol=1e-4, atol=1e-3)


def test_bad_input_is_refused(device: str) -> None:
    net, x, qfn, params = setting("row", device)
    moments = teint8.second_moments(qfn, params, [x], progress=False)
    in_float = teint8.quantize(net, Policy([]))
    small = {"0.weight": moments["2.weight"]}
    for error_type, match, call in (
        (ValueError, "not finite", lambda: teint8.second_moments(qfn, params, [x / 0], progress=False)),
        (
            ValueError,
            "nothing to look at",
            lambda: teint8.second_moments(in_float, params, [x], progress=False),
        ),
        (ValueError, "'other', which params do not have", lambda: teint8.gptq(qfn, params, {"other": x}, progress=False)),
        (ValueError, "has 48 features and its moment 64", lambda: teint8.adaround(qfn, params, small, progress=False)),
        (ValueError, "is packed", lambda: teint8.gptq(qfn, teint8.pack(qfn, params), moments, progress=False)),
        (ValueError, "is packed", lambda: teint8.awq(qfn, teint8.pack(qfn, params), moments, progress=False)),
    ):
        with pytest.raises(error_type, match=match):
            call()
