"""Sensitivity by every method, and the policies that come of it."""

import pytest
import torch
from torch import nn

import teint8
from teint8 import Policy, Quant, Rule
from teint8.transforms.sensitivity import METHODS


def planted(bad: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    """Six layers, in one of which a few weights are huge, and the channels that they meet small."""
    torch.manual_seed(bad)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh()))).to(device)
    with torch.no_grad():
        net[3 * bad].weight[:, ::16] *= 40
    return net, torch.randn(32, 32, device=device)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_the_planted_layer_comes_first(bad: int, method: str, device: str) -> None:
    net, x = planted(bad, device)
    qfn, params = teint8.quantize(net, Policy([Rule(weight=Quant("tensor"))])), dict(net.named_parameters())
    scores = teint8.sensitivity(qfn, params, x.split(16), method, progress=False)
    assert next(iter(scores)) == f"{3 * bad}.weight" and len(scores) == 6
    assert list(scores.values()) == sorted(scores.values(), reverse=True) and all(v > 0 for v in scores.values())


def test_second_order_is_what_the_loss_adds(device: str) -> None:
    """Of weights alone, with a loss of one's own: d^T H d / 2 against the loss itself, whose gradient vanishes at the float weights."""
    net, x = planted(1, device)
    params = dict(net.named_parameters())
    qfn = teint8.quantize(net, Policy([Rule(weight=Quant("tensor"), activation=None)]))
    want = net(x).detach()

    def loss(y, x):
        return (y - want).square().sum()

    exact = teint8.sensitivity(qfn, params, [x], "loss", loss=loss, progress=False)
    second = teint8.sensitivity(qfn, params, [x], "taylor", loss=loss, progress=False)
    assert set(exact) == set(second)
    for path in exact:
        assert abs(second[path] - exact[path]) < 0.25 * exact[path], path


def test_the_trace_is_that_of_the_hessian(device: str) -> None:
    """Of one linear and a squared loss the Hessian is known: its diagonal is twice the inputs' second moments."""
    torch.manual_seed(0)
    model, x = nn.Linear(24, 8, bias=False).to(device), torch.randn(64, 24, device=device)
    params = {"weight": model.weight.detach()}
    qfn = teint8.quantize(model)
    found = teint8.sensitivity(qfn, params, [x], "hessian", loss=lambda y, x: y.square().sum(), progress=False)["weight"]
    off = teint8.pack(qfn, params)["weight"].dequantize() - params["weight"]
    exact = float(2 * x.square().sum() / 24) * float(off.square().sum())
    assert abs(found / exact - 1) < 0.2  # four probes


def test_a_sensitive_layer_hides_no_other(device: str) -> None:
    """What two layers share in the Hessian is far larger than the trace of the one: probes of both at once would drown it."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)).to(device),
        torch.randn(64, 12, device=device),
    )
    with torch.no_grad():
        model[0].weight *= 100  # large inputs of the second layer, whose weights are small
        model[1].weight *= 1e-2
    params = {n: p.detach() for n, p in model.named_parameters()}
    qfn = teint8.quantize(model)
    want = model(x).detach()

    def loss(y, x):
        return (y - want).square().sum()

    found = teint8.sensitivity(qfn, params, [x, x], "hessian", loss=loss, progress=False)
    for name in params:
        off = teint8.pack(qfn, params)[name].dequantize() - params[name]
        of = lambda w, name=name: loss(torch.func.functional_call(model, {**params, name: w}, (x,)), x)
        trace = float(torch.func.hessian(of)(params[name]).reshape(144, 144).diagonal().sum())
        assert abs(found[name] / (trace / 144 * float(off.square().sum())) - 1) < 0.4, name


def test_what_rounds_exactly_loses_nothing(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(device)
    with torch.no_grad():
        model[0].weight.copy_(3 * torch.eye(4))
    qfn, params, x = teint8.quantize(model), dict(model.named_parameters()), torch.full((2, 4), 1e30, device=device)
    scores = teint8.sensitivity(qfn, params, [x], "hessian", loss=lambda y, x: y.square().sum(), progress=False)
    assert scores["0.weight"] == 0.0 and scores["1.weight"] == float("inf")


def test_the_searched_policy_beats_others_of_the_same_bytes(device: str) -> None:
    net, x = planted(3, device)
    qfn, params = teint8.quantize(net, Policy([Rule(weight=Quant("tensor"))])), dict(net.named_parameters())
    scores = teint8.sensitivity(qfn, params, [x], "taylor", progress=False)
    policy = teint8.search(qfn, params, scores, share=0.17)
    assert [rule.path for rule in policy.rules if rule.weight is None] == ["9.weight"]

    def error(policy: Policy) -> float:
        return float((teint8.quantize(net, policy)(params, x) - net(x)).norm())

    others = [error(Policy([Rule(f"{3 * i}.weight", weight=None), *qfn.policy.rules])) for i in range(6) if i != 3]
    assert error(policy) < min(others)
    everything = sum(p.nbytes for n, p in params.items() if n in scores)
    assert teint8.search(qfn, params, scores, share=0) == qfn.policy
    assert teint8.search(qfn, params, scores, nbytes=everything) == teint8.search(qfn, params, scores, share=1)
    assert eval(repr(policy), {"Policy": Policy, "Rule": Rule, "Quant": Quant}) == policy  # a person can edit it


def test_weights_of_the_other_layout_and_rules_of_other_ops(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16, device=device)
    w = torch.randn(16, 24, device=device)
    w[3] *= 50
    straight, turned = (lambda p, x: nn.functional.linear(x, p["w"])), (lambda p, x: x @ p["w"])
    rules = [Rule(ops=("conv",), weight=None), Rule(weight=Quant("tensor"), activation=None)]
    for method in METHODS:
        a, b = (
            teint8.sensitivity(teint8.quantize(f, Policy(rules)), {"w": v}, [x], method, progress=False)["w"]
            for f, v in ((straight, w.mT.contiguous()), (turned, w))
        )
        plain = teint8.sensitivity(teint8.quantize(straight, Policy(rules[1:])), {"w": w.mT.contiguous()}, [x], method, progress=False)[
            "w"
        ]
        assert 0 < a == pytest.approx(plain, rel=1e-4), method
        assert b == pytest.approx(a, rel=0.6 if method == "hessian" else 1e-3), method  # its random signs lie otherwise


def test_conditioned_params_and_real_bytes(device: str) -> None:
    net, x = planted(2, device)
    params = dict(net.named_parameters())
    for qfn in (teint8.quantize(net), teint8.quantize(net, Policy([Rule(weight=Quant("block", block=32))]))):
        ready = teint8.rotate(qfn, params)
        for tree in (params, ready):
            scores = teint8.sensitivity(qfn, tree, [x], progress=False)
            packed = teint8.pack(qfn, tree)
            least = sum(packed[path].nbytes for path in scores)
            assert len(teint8.search(qfn, tree, scores, nbytes=least).rules) == 1
            with pytest.raises(ValueError, match=f"in INT8 these weights take {least}"):
                teint8.search(qfn, tree, scores, nbytes=least - 1)
            one = teint8.search(qfn, tree, scores, share=0.2)
            assert [rule.path for rule in one.rules[:-1]] == list(scores)[:1]


def test_bad_input_is_refused(device: str) -> None:
    net, x = planted(0, device)
    qfn, params = teint8.quantize(net), dict(net.named_parameters())
    for error_type, match, call in (
        (ValueError, "method is 'fisher'", lambda: teint8.sensitivity(qfn, params, [x], "fisher")),
        (ValueError, "is packed", lambda: teint8.sensitivity(qfn, teint8.pack(qfn, params), [x])),
        (TypeError, "a list of batches", lambda: teint8.sensitivity(qfn, params, x)),
        (ValueError, "no linear or matmul", lambda: teint8.sensitivity(teint8.quantize(net, Policy([])), params, [x])),
        (ValueError, "one of them is needed", lambda: teint8.search(qfn, params, {"0.weight": 1.0})),
        (ValueError, "share 3", lambda: teint8.search(qfn, params, {"0.weight": 1.0}, share=3)),
        (ValueError, "in INT8 these weights take 1152", lambda: teint8.search(qfn, params, {"0.weight": 1.0}, nbytes=10)),
        (ValueError, "which params do not have", lambda: teint8.search(qfn, params, {"nobody": 1.0}, share=0.5)),
    ):
        with pytest.raises(error_type, match=match):
            call()
