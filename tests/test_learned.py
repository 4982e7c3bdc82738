"""Learned scales and delayed ones: gradients against their formulas, bits against what serves."""

import pytest
import torch
from contract import different
from torch import nn

import teint8
from teint8 import Policy, Quant, Rule
from teint8.transforms.learned import Learned, static_policy


def setting(device: str) -> tuple:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).to(device)
    x = torch.randn(128, 32, device=device)
    params = {n: p.detach() for n, p in net.named_parameters()}
    qfn = teint8.quantize(net)
    return net, x, qfn, params, teint8.calibrate(qfn, params, [x], progress=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_lsq(compiled: bool, device: str) -> None:
    """Of one linear, against the paper's formulas in float64."""
    torch.manual_seed(0)
    model = nn.Linear(16, 4).to(device)
    params = {n: p.detach() for n, p in model.named_parameters()}
    x, g = torch.randn(10, 16, device=device), torch.randn(10, 4, device=device)
    scales = {"weight": Learned(torch.rand(4, 1, device=device) * 0.002 + 0.001, torch.tensor(0.01, device=device))}
    learn = teint8.lsq(teint8.quantize(model))

    def grads(both, x):
        return torch.func.grad(lambda b, x: (learn(b, x) * g).sum(), argnums=(0, 1))(both, x)

    (of_params, of_scales), of_x = (torch.compile(grads, fullgraph=True) if compiled else grads)((params, scales), x)

    def parts(v, s):
        ratio = v.double() / s.double()
        codes = ratio.clamp(-127, 127).round()
        inside = (ratio.abs() <= 127).double()
        return codes * s.double(), inside, codes - ratio * inside  # values, dx, ds

    x_hat, dx, ds_x = parts(x, scales["weight"].activation)
    w_hat, dw, ds_w = parts(params["weight"], scales["weight"].weight)
    gx, gw = g.double() @ w_hat, g.double().mT @ x_hat
    assert float(1 - dx.mean()) > 0 and float(1 - dw.mean()) > 0  # some of both are clipped
    for got, want in (
        (of_x, gx * dx),
        (of_params["weight"], gw * dw),
        (of_params["bias"], g.double().sum(0)),
        (of_scales["weight"].weight, (gw * ds_w).sum(1, keepdim=True) / (127 * 16) ** 0.5),
        (of_scales["weight"].activation, (gx * ds_x).sum() / (127 * 16) ** 0.5),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_learning_lowers_the_error_and_serves_its_bits(tmp_path, device: str) -> None:
    net, x, qfn, params, stats = setting(device)
    scales = teint8.learned_scales(qfn, params, stats)
    scales = {n: Learned(3 * s.weight, 3 * s.activation) for n, s in scales.items()}  # far too coarse
    learn = teint8.lsq(qfn)
    want = net(x).detach()

    def loss(both):
        return (learn(both, x) - want).square().mean()

    both = (params, scales)
    losses = []
    for _ in range(60):
        grads, value = torch.func.grad_and_value(loss)(both)
        losses.append(float(value))
        learned = {n: Learned(*(s - 0.02 * s * g.sign() for s, g in zip(both[1][n], grads[1][n], strict=True))) for n in scales}
        both = (both[0], learned)
    assert losses[-1] < 0.3 * losses[0]
    serve = teint8.quantize(net, static_policy(Policy.qat()), strict=True)
    packed = teint8.pack_learned(*both)
    assert different(serve(packed, x), learn(both, x)) == 0
    assert different(teint8.load_packed(teint8.save_packed(tmp_path / "learned.safetensors", packed)[0]).params["0.weight"].codes,
                     packed["0.weight"].codes) == 0  # fmt: skip


def test_what_is_not_finite_and_autocast(device: str) -> None:
    net, x, qfn, params, stats = setting(device)
    scales = teint8.learned_scales(qfn, params, stats)
    learn, packed = teint8.lsq(qfn), teint8.pack_learned(params, scales)
    serve = teint8.quantize(net, static_policy(Policy.qat()), strict=True)
    bad = x.clone()
    bad[3, 5], bad[7, 0] = float("nan"), float("inf")
    y = learn((params, scales), bad)
    assert different(y, serve(packed, bad)) == 0 and bool(y[[3, 7]].isnan().all()) and not bool(y[:3].isnan().any())
    with torch.autocast(device, torch.bfloat16):
        y = learn((params, scales), x)
        assert y.dtype == torch.bfloat16 and different(y, serve(packed, x)) == 0
    lost = {**scales, "0.weight": Learned(-scales["0.weight"].weight, scales["0.weight"].activation)}
    assert bool(learn((params, lost), x).isnan().any())  # a scale that learning made negative is seen at once


def test_delayed_scaling_outlives_infinity_and_empty_batches(device: str) -> None:
    net, x, qfn, params, _ = setting(device)
    step = teint8.delayed(qfn, steps=4)
    bad = x.clone()
    bad[3, 5] = float("inf")
    for history in ({}, step(params, {}, x)[1]):
        y, after = step(params, history, bad)
        assert bool(y[3].isnan().all()) and not bool(y[4:].isnan().any())
        good, _ = step(params, after, x)
        assert bool(good.isfinite().all()) and float((good - net(x)).norm() / net(x).norm()) < 0.03
    empty, after = step(params, after, x[:0])
    assert empty.shape == (0, 8) and after["0.weight"][0] == 0
    turned = teint8.rotate(qfn, params)
    _, history = step(turned, {}, x)
    top = float(turned["0.weight"].apply(x).abs().max())
    assert float(history["0.weight"][0]) == pytest.approx(top)  # of the activation as it is quantized
    clipped, _ = step(turned, history, 10 * x)
    assert float((clipped - net(10 * x)).norm() / net(10 * x).norm()) > 0.5


def test_delayed_scaling(device: str) -> None:
    net, x, qfn, params, _ = setting(device)
    step = teint8.delayed(qfn, steps=4)
    y, history = step(params, {}, x)
    assert float((y - net(x)).norm() / net(x).norm()) < 0.03
    top = float(x.abs().max())
    assert history["0.weight"].tolist() == [pytest.approx(top), 0, 0, 0]
    # the scale of a step is what the steps before saw: ten times larger inputs are clipped once
    clipped, after = step(params, history, 10 * x)
    assert float((clipped - net(10 * x)).norm() / net(10 * x).norm()) > 0.5
    assert after["0.weight"].tolist() == [pytest.approx(10 * top), pytest.approx(top), 0, 0]
    _, after = step(params, after, 10 * x)  # now the second layer has seen them, too
    again, _ = step(params, after, 10 * x)
    assert float((again - net(10 * x)).norm() / net(10 * x).norm()) < 0.03
    assert history["0.weight"].tolist() == [pytest.approx(top), 0, 0, 0]  # state is not written to
    for _ in range(4):
        _, after = step(params, after, x)
    assert after["0.weight"].tolist() == [pytest.approx(top)] * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_delayed_scaling_in_training(compiled: bool, device: str) -> None:
    """Under torch.func.grad with the history as aux: the bits of static scales given by hand, and gradients of the STE."""
    net, x, _, params, _ = setting(device)
    policy = Policy([Rule(gradient=Quant())])
    step = teint8.delayed(teint8.quantize(net, policy), steps=2)
    _, history = step(params, {}, x)

    def grads(params, history, x):
        return torch.func.grad(lambda p: (lambda y, h: (y.square().mean(), h))(*step(p, history, x)), has_aux=True)(params)

    got, new = (torch.compile(grads, fullgraph=True) if compiled else grads)(params, history, x)
    assert torch.equal(new["0.weight"], torch.stack([x.abs().max(), x.abs().max()]))
    static = teint8.quantize(net, static_policy(policy))
    ready = teint8.with_scales(params, {n: h[0] / 127 for n, h in history.items()})
    want = torch.func.grad(lambda p: static(p, x).square().mean())(ready)
    for n in params:
        b = want[n].weight if isinstance(want[n], teint8.Conditioned) else want[n]
        torch.testing.assert_close(got[n], b, rtol=1e-3, atol=1e-5)
        assert float(b.norm()) > 0


def test_bad_input_is_refused(device: str) -> None:
    _, x, qfn, params, stats = setting(device)
    scales = teint8.learned_scales(qfn, params, stats)
    bad = {**scales, "0.weight": Learned(-scales["0.weight"].weight, scales["0.weight"].activation)}
    for error, match, call in (
        (TypeError, r"a pair \(params, scales\)", lambda: teint8.lsq(qfn)(params, x)),
        (ValueError, "not positive", lambda: teint8.pack_learned(params, bad)),
        (ValueError, "is packed", lambda: teint8.learned_scales(qfn, teint8.pack(qfn, params), stats)),
        (ValueError, "'other', which params do not have", lambda: teint8.learned_scales(qfn, params, {"other": stats["0.weight"]})),
        (ValueError, r"0.weight is Conditioned", lambda: teint8.learned_scales(qfn, teint8.rotate(qfn, params), stats)),
        (ValueError, "steps is 0", lambda: teint8.delayed(qfn, steps=0)),
        (ValueError, "margin is -1", lambda: teint8.delayed(qfn, margin=-1)),
        (ValueError, "is packed", lambda: teint8.delayed(qfn)(teint8.pack(qfn, params), {}, x)),
        (TypeError, "not a quantized function", lambda: teint8.delayed(len)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_convolutions_keep_their_scales() -> None:
    """A CNN's linears learn; its convolutions are quantized by their rule."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)), torch.randn(5, 3, 6, 6)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    start = teint8.learned_scales(qfn, params, teint8.calibrate(qfn, params, [x], progress=False))
    assert list(start) == ["3.weight"]
    grads = torch.func.grad(lambda both: teint8.lsq(qfn)(both, x).square().mean())((params, start))
    assert float(grads[0]["0.weight"].norm()) > 0 and float(grads[1]["3.weight"].weight.norm()) > 0
