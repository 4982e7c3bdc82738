"""Calibration, smoothing, rotation, outliers: against closed forms, and on nets with planted outliers."""

import math
import weakref

import pytest
import torch
from contract import different
from torch import nn

import teint8
from teint8 import Policy, Quant, Rule
from teint8.transforms.calibrate import BINS
from teint8.transforms.static import METHODS

STATIC = Policy([Rule(activation=Quant(scale="static"))])


class Gated(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, k: int = 32, n: int = 64, layer: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(k) if layer else nn.RMSNorm(k)
        self.gate, self.up, self.down = nn.Linear(k, n, bias=False), nn.Linear(k, n), nn.Linear(n, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def spoiled(device: str, layer: bool = False) -> tuple[nn.Module, torch.Tensor, dict]:
    """A net whose norm makes one channel 60 times larger, and whose up makes another 200 times."""
    torch.manual_seed(0)
    net = Gated(layer=layer).to(device)
    with torch.no_grad():
        net.norm.weight[5] *= 60
        net.gate.weight[:, 5] /= 60
        net.up.weight[:, 5] /= 60
        net.up.weight[9] *= 200
        net.up.bias[9] *= 200
        net.down.weight[:, 9] /= 200
    return net, torch.randn(64, 32, device=device), dict(net.named_parameters())


def error(net: nn.Module, y: torch.Tensor, x: torch.Tensor) -> float:
    want = net(x) - x
    return float((y - x - want).norm() / want.norm())


def test_statistics_are_those_of_the_activation(device: str) -> None:
    model = nn.Linear(8, 4).to(device)
    x = torch.randn(3, 10, 8, device=device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    found = teint8.calibrate(qfn, params, list(x), progress=False)["weight"]
    rows = x.view(-1, 8).abs()
    assert torch.equal(found.channels, rows.amax(0)) and int(found.tokens) == 30 and int(found.batches) == 3
    torch.testing.assert_close(found.sums, rows.sum(0))
    a, b, c = (float(part.abs().max()) for part in x)
    assert math.isclose(float(found.moving), 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c, rel_tol=1e-5)
    assert found.counts.shape == (BINS,) and int(found.counts.sum()) == 240
    assert all(p.grad is None for p in params.values())


def test_statistics_go_on_and_add_up(device: str) -> None:
    model, x = nn.Linear(8, 4).to(device), torch.randn(4, 10, 8, device=device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())

    def see(parts, state=None):
        return teint8.calibrate(qfn, params, list(parts), state=state, progress=False)

    whole, first = see(x), see(x[:2])
    kept = {name: tuple(t.clone() for t in stats) for name, stats in first.items()}
    for other in (see(x[2:], first), teint8.merge(first, see(x[2:]))):
        for name in ("counts", "channels", "tokens", "batches"):
            assert torch.equal(getattr(other["weight"], name), getattr(whole["weight"], name)), name
        torch.testing.assert_close(other["weight"].sums, whole["weight"].sums)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], kept[name], strict=True))  # state is not written to
    assert all(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(whole))


def test_scales_of_every_method(device: str) -> None:
    model = nn.Linear(1, 4).to(device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    # 100000 normal numbers, and one of 50
    x = torch.cat([torch.randn(100000, 1, generator=torch.Generator().manual_seed(0)), torch.full((1, 1), 50.0)]).to(device)
    stats = teint8.calibrate(qfn, params, [x], progress=False)
    tops = {how: float(teint8.scales(stats, how)["weight"]) * 127 for how in METHODS}
    assert math.isclose(tops["absmax"], 50, rel_tol=1e-6) and math.isclose(tops["average"], 50, rel_tol=1e-6)
    assert math.isclose(tops["percentile"], float(x.abs().quantile(0.9999)), rel_tol=0.02)

    def squared(top: float) -> float:
        return float(((x / (top / 127)).round().clamp(-127, 127) * (top / 127) - x).double().square().sum())

    assert squared(tops["mse"]) < 1.02 * min(squared(top / 50) for top in range(100, 2500, 10))
    assert 2 < tops["entropy"] < 6
    uniform = torch.linspace(-1, 1, 100001, device=device)[:, None]
    stats = teint8.calibrate(qfn, params, [uniform], progress=False)
    for how in METHODS:
        assert math.isclose(float(teint8.scales(stats, how)["weight"]) * 127, 1, rel_tol=0.03), how
    nothing = teint8.calibrate(qfn, params, [torch.zeros(5, 1, device=device)], progress=False)
    assert all(math.isclose(float(teint8.scales(nothing, how)["weight"]) * 127, 1, rel_tol=1e-6) for how in METHODS)


@pytest.mark.parametrize("how", METHODS)
def test_static_serving(how: str, device: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).to(device)
    x, qfn, params = torch.randn(256, 32, device=device), teint8.quantize(net, STATIC, strict=True), dict(net.named_parameters())
    stats = teint8.calibrate(qfn, params, x.split(64), progress=False)
    packed = teint8.with_scales(teint8.pack(qfn, params), teint8.scales(stats, how))
    assert float((qfn(packed, x) - net(x)).norm() / net(x).norm()) < (0.15 if how == "entropy" else 0.04)


@pytest.mark.parametrize("layer", [False, True])
def test_smoothing_is_folded_where_it_can_be(layer: bool, device: str) -> None:
    net, x, params = spoiled(device, layer)
    qfn = teint8.quantize(net)
    before = {n: p.detach().clone() for n, p in params.items()}
    stats = teint8.calibrate(qfn, params, [x], progress=False)
    folded = teint8.smooth(qfn, params, stats, x)
    assert all(isinstance(leaf, torch.Tensor) for leaf in folded.values())
    torch.testing.assert_close(torch.func.functional_call(net, folded, (x,)), net(x), rtol=1e-5, atol=1e-5)
    apart = teint8.smooth(qfn, params, stats)
    assert [n for n, leaf in apart.items() if isinstance(leaf, teint8.Conditioned)] == ["gate.weight", "up.weight", "down.weight"]
    plain = error(net, qfn(params, x), x)
    for tree in (folded, apart, teint8.rotate(qfn, folded), teint8.rotate(qfn, apart)):
        assert error(net, qfn(tree, x), x) < 0.5 * plain
        assert different(qfn(teint8.pack(qfn, tree), x), qfn(tree, x)) == 0
    assert all(torch.equal(p, before[n]) for n, p in params.items())


def test_nothing_is_folded_that_others_use(device: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            u = self.a(h)
            return h + self.b(torch.tanh(u) * u)

    net, x = Residual().to(device), torch.randn(9, 16, device=device)
    qfn, params = teint8.quantize(net), dict(net.named_parameters())
    ready = teint8.smooth(qfn, params, teint8.calibrate(qfn, params, [x], progress=False), x)
    assert isinstance(ready["a.weight"], teint8.Conditioned) and isinstance(ready["b.weight"], teint8.Conditioned)
    torch.testing.assert_close(teint8.quantize(net, Policy([]))(ready, x), net(x))


def test_outliers_are_found_and_kept_in_float(device: str) -> None:
    net, x, params = spoiled(device)
    qfn = teint8.quantize(net)
    ready = teint8.keep_outliers(qfn, params, teint8.calibrate(qfn, params, [x], progress=False), threshold=20)
    assert {n: leaf.outliers for n, leaf in ready.items() if isinstance(leaf, teint8.Conditioned)} == {
        "gate.weight": (5,), "up.weight": (5,), "down.weight": (9,)
    }  # fmt: skip
    assert error(net, qfn(ready, x), x) < 0.5 * error(net, qfn(params, x), x)
    assert different(qfn(teint8.pack(qfn, ready), x), qfn(ready, x)) == 0


def test_functions_and_stages_compose(device: str) -> None:
    torch.manual_seed(0)
    params = {"w": torch.randn(8, 32, device=device), "head": [torch.randn(32, 4, device=device)]}
    x = torch.randn(20, 32, device=device)
    x[:, 7] *= 50

    def model(p, x):
        return nn.functional.linear(x, p["w"]).sum() + x @ p["head"][0]

    qfn = teint8.quantize(model)
    stats = teint8.calibrate(qfn, params, [x], progress=False)
    assert set(stats) == {"w", "head.0"}
    with pytest.warns(UserWarning, match=r"head.0: these weights are not \(N, K\)"):
        ready = teint8.smooth(qfn, params, stats)
    ready = teint8.rotate(qfn, ready, x)
    assert repr(ready["w"]) == "Conditioned(8x32 torch.float32, smoothed, rotated by 32)" and isinstance(ready["head"][0], torch.Tensor)
    assert different(qfn(teint8.pack(qfn, ready, x), x), qfn(ready, x)) == 0
    with pytest.raises(TypeError, match="give example inputs"):
        teint8.rotate(qfn, params)


def test_bad_input_is_refused(device: str) -> None:
    model, x = nn.Linear(8, 4).to(device), torch.randn(5, 8, device=device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    stats = teint8.calibrate(qfn, params, [x], progress=False)
    other = {"other": stats["weight"]}
    wide = {"weight": teint8.calibrate(teint8.quantize(nn.Linear(9, 4).to(device)), dict(nn.Linear(9, 4).to(device).named_parameters()),
            [torch.ones(1, 9, device=device)], progress=False)["weight"]}  # fmt: skip
    for error_type, match, call in (
        (TypeError, r"batches is a tensor \(5, 8\)", lambda: teint8.calibrate(qfn, params, x)),
        (TypeError, r"a dict; a list of batches is needed", lambda: teint8.calibrate(qfn, params, {"input": x})),
        (TypeError, "not a quantized function", lambda: teint8.calibrate(model, params, [x])),
        (ValueError, "no batches", lambda: teint8.calibrate(qfn, params, [])),
        (ValueError, "'weight' is packed", lambda: teint8.calibrate(qfn, teint8.pack(qfn, params), [x])),
        (ValueError, "not finite", lambda: teint8.calibrate(qfn, params, [x * float("nan")], progress=False)),
        (ValueError, "nothing to look at", lambda: teint8.calibrate(teint8.quantize(model, Policy([])), params, [x], progress=False)),
        (ValueError, "9 in state", lambda: teint8.calibrate(qfn, params, [x], state=wide, progress=False)),
        (ValueError, "of two models", lambda: teint8.merge(stats, wide)),
        (TypeError, "results of calibrate", lambda: teint8.merge({"weight": 1})),
        (ValueError, "method is 'max'", lambda: teint8.scales(stats, "max")),
        (ValueError, "percentile is 0", lambda: teint8.scales(stats, "percentile", percentile=0)),
        (ValueError, "'other' is not in params", lambda: teint8.with_scales(teint8.pack(qfn, params), {"other": torch.ones(())})),
        (ValueError, "one positive finite number", lambda: teint8.with_scales(teint8.pack(qfn, params), {"weight": torch.zeros(())})),
        (ValueError, "alpha is 2", lambda: teint8.smooth(qfn, params, stats, alpha=2)),
        (ValueError, "'other', which params do not have", lambda: teint8.smooth(qfn, params, other)),
        (ValueError, "threshold is 0.5", lambda: teint8.keep_outliers(qfn, params, stats, threshold=0.5)),
    ):
        with pytest.raises(error_type, match=match):
            call()


def test_static_scales_of_float_weights(device: str) -> None:
    """What trains by static scales has the bits of what serves, and clipped activations get no gradient."""
    torch.manual_seed(0)
    model, x = nn.Linear(32, 8).to(device), torch.randn(64, 32, device=device)
    qfn, params = teint8.quantize(model, STATIC), dict(model.named_parameters())
    static = teint8.scales(teint8.calibrate(qfn, params, [x], progress=False), "percentile", percentile=95.0)
    ready = teint8.with_scales(params, static)
    packed = teint8.pack(qfn, ready)
    assert packed["weight"].weight.activation_scale is not None and packed["weight"].activation_scale is None
    assert (
        different(qfn(packed, x), qfn(ready, x))
        == 0
        == different(qfn(teint8.with_scales(teint8.pack(qfn, params), static), x), qfn(ready, x))
    )
    assert different(qfn(teint8.unpack(packed), x), qfn(ready, x)) == 0
    gradient = torch.func.grad(lambda x: qfn(ready, x).sum())(x)
    top = float(static["weight"]) * 127
    assert bool((gradient[x.abs() > top * 1.01] == 0).all()) and bool((gradient[x.abs() < top * 0.99] != 0).all())
    weight = torch.func.grad(lambda p: qfn(p, x).square().sum())(ready)["weight"]
    assert float(weight.weight.norm()) > 0 and float(weight.activation_scale.abs()) == 0
    compiled = torch.compile(lambda p, x: qfn(p, x), fullgraph=True)
    assert different(compiled(ready, x), qfn(ready, x)) == 0


@pytest.mark.parametrize("kernel", [1, 3])
def test_static_scales_of_convolutions(kernel: int, device: str) -> None:
    """As of linears: training by a static scale has the bits of serving, and what is clipped gets no gradient."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, kernel)).to(device), torch.randn(4, 3, 9, 9, device=device)
    qfn, params = teint8.quantize(model, STATIC), dict(model.named_parameters())
    static = teint8.scales(teint8.calibrate(qfn, params, [x], progress=False), "percentile", percentile=95.0)
    ready = teint8.with_scales(params, static)
    want = teint8.quantize(model, Policy([Rule(activation=Quant(scale="static"), compute="simulate")]))(ready, x)
    assert different(qfn(ready, x), want) == 0 == different(qfn(teint8.pack(qfn, ready), x), want)
    assert different(qfn(teint8.with_scales(teint8.pack(qfn, params), static), x), want) == 0
    gradient = torch.func.grad(lambda x: qfn(ready, x).sum())(x)
    inside = x.abs() < float(static["0.weight"]) * 127 * 0.99
    assert bool((gradient[inside] != 0).all()) and bool((gradient[x.abs() > float(static["0.weight"]) * 127 * 1.01] == 0).all())
    compiled = torch.compile(lambda p, x: qfn(p, x), fullgraph=True)
    assert different(compiled(ready, x), want) == 0
    (record,) = teint8.explain(qfn, ready, x)
    assert record.int8 and record.saturated == pytest.approx(0.05, abs=0.01)


def test_static_scales_where_a_weight_is_tied(device: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.table(ids)))

    model, ids = Tied().to(device), torch.arange(20, device=device)
    qfn, params = teint8.quantize(model, STATIC, strict=True), dict(model.named_parameters())
    stats = teint8.calibrate(qfn, params, [ids], progress=False)
    ready = teint8.with_scales(params, teint8.scales(stats, "absmax"))
    assert float((qfn(ready, ids) - model(ids)).norm() / model(ids).norm()) < 0.02


def test_nothing_is_folded_into_a_weight_that_is_used_transposed(device: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)
            self.norm.weight.data[3] = 40

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.norm(x)) + torch.tanh(x) @ self.a.weight.T

    net, x = Twice().to(device), torch.randn(9, 16, device=device)
    qfn, params = teint8.quantize(net), dict(net.named_parameters())
    ready = teint8.smooth(qfn, params, teint8.calibrate(qfn, params, [x], progress=False), x)
    assert isinstance(ready["a.weight"], teint8.Conditioned) and torch.equal(ready["norm.weight"], net.norm.weight)
    torch.testing.assert_close(teint8.quantize(net, Policy([]))(ready, x), net(x))


class Square(nn.Module):
    """x @ w, as GPT-2 multiplies, with a weight whose shape does not tell which way round it is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16) * torch.logspace(-2, 1, 16)[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def test_square_weights_of_the_other_layout(device: str) -> None:
    torch.manual_seed(0)
    net, x = Square().to(device), torch.randn(64, 16, device=device)
    x[:, 2] *= 50
    qfn, params = teint8.quantize(net), {"w": next(net.parameters()).detach()}
    stats = teint8.calibrate(qfn, params, [x], progress=False)
    assert int(stats["w"].axis) == -2
    want = qfn(params, x)
    for prepare in (teint8.smooth, teint8.keep_outliers):
        with pytest.warns(UserWarning, match=r"not \(N, K\)"):
            assert different(qfn(prepare(qfn, params, stats), x), want) == 0
    moments = teint8.second_moments(qfn, params, [x], progress=False)
    assert different(qfn(teint8.awq(qfn, params, moments, progress=False), x), want) == 0
    with pytest.raises(ValueError, match=r"\(N, K\) as nn.Linear has it"):
        teint8.learned_scales(qfn, params, stats)
    serve = teint8.quantize(net, STATIC, strict=True)
    x[:, 2] /= 50
    static = teint8.scales(teint8.calibrate(qfn, params, [x], progress=False), "absmax")
    ready = teint8.with_scales(params, static)  # a static scale serves any layout
    packed = teint8.with_scales(teint8.pack(serve, params, x), static)
    assert different(serve(ready, x), serve(packed, x)) == 0
    assert float((serve(ready, x) - net(x)).norm() / net(x).norm()) < 0.05
    assert different(serve(teint8.pack(serve, ready, x), x), serve(ready, x)) == 0


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**20, 2.0**100, 1e-30, 1e6, 1e30])
@pytest.mark.parametrize("how", METHODS)
def test_scales_of_any_size(how: str, size: float, device: str) -> None:
    """A power of two moves every bin of a histogram, and so every scale, by itself; another factor moves values among bins."""
    model = nn.Linear(16, 4).to(device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    x = torch.randn(4096, 16, device=device, generator=torch.Generator(device).manual_seed(0))
    top, other = (float(teint8.scales(teint8.calibrate(qfn, params, [t], progress=False), how)["weight"]) for t in (x, x * size))
    exact = math.frexp(size)[0] == 0.5
    # the divergence of KL is flat near its least value: over 60 draws of x the place of that moved by up to a third
    assert math.isclose(other / size, top, rel_tol=1e-6 if exact else 0.35 if how == "entropy" else 0.05)


def test_functions_of_a_tuple_of_dicts(device: str) -> None:
    """Their paths have the place in the tuple; of a module's (parameters, buffers) they have not."""
    x = torch.randn(20, 16, device=device)
    params = ({"w": torch.randn(8, 16, device=device)}, {"w": torch.randn(4, 8, device=device)})
    qfn = teint8.quantize(lambda p, x: nn.functional.linear(nn.functional.linear(x, p[0]["w"]).relu(), p[1]["w"]), STATIC)
    dynamic = teint8.quantize(qfn.__wrapped__)
    stats = teint8.calibrate(dynamic, params, [x], progress=False)
    assert list(stats) == ["0.w", "1.w"]
    packed = teint8.with_scales(teint8.pack(qfn, params, x), teint8.scales(stats))
    assert [leaf.activation_scale is not None for group in packed for leaf in group.values()] == [True, True]
    assert float((qfn(packed, x) - dynamic(params, x)).norm() / dynamic(params, x).norm()) < 0.05
    ready = teint8.rotate(dynamic, teint8.smooth(dynamic, params, stats), x)
    assert all(isinstance(leaf, teint8.Conditioned) for group in ready for leaf in group.values())
    assert different(dynamic(teint8.pack(dynamic, ready, x), x), dynamic(ready, x)) == 0
    assert isinstance(
        teint8.gptq(dynamic, params, teint8.second_moments(dynamic, params, [x], progress=False), x)[1]["w"], teint8.QTensor
    )
    assert set(teint8.sensitivity(dynamic, params, [x], progress=False)) == {"0.w", "1.w"}
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).to(device).eval()
    groups = (dict(net.named_parameters()), dict(net.named_buffers()))
    of_net = teint8.quantize(net)
    stats = teint8.calibrate(of_net, groups, [x], progress=False)
    assert list(stats) == ["0.weight"] and isinstance(teint8.smooth(of_net, groups, stats)[0]["0.weight"], teint8.Conditioned)
    assert isinstance(teint8.with_scales(groups, teint8.scales(stats))[0]["0.weight"], teint8.Conditioned)


def test_batches_are_taken_one_after_the_other(device: str) -> None:
    model = nn.Linear(8, 4).to(device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    alive: weakref.WeakSet = weakref.WeakSet()
    most = []

    def batches():
        for _ in range(12):
            x = torch.randn(5, 8, device=device)
            alive.add(x)
            most.append(len(alive))
            yield x

    for look in (teint8.calibrate, teint8.second_moments):
        most.clear()
        assert list(look(qfn, params, batches(), progress=False)) == ["weight"]
        assert len(most) == 12 and max(most) <= 3
    with pytest.raises(ValueError, match="no batches"):
        teint8.calibrate(qfn, params, iter(()), progress=False)


def test_a_weight_that_is_used_twice_in_a_batch(device: str) -> None:
    shared = nn.Linear(8, 8).to(device)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(5, 8, device=device)
    qfn, params = teint8.quantize(net), dict(net.named_parameters())
    found = teint8.calibrate(qfn, params, [x, x], progress=False)["0.weight"]
    assert (int(found.batches), int(found.tokens)) == (2, 20)
    assert float(found.moving) == pytest.approx(float(found.absmax))
