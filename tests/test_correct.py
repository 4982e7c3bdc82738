"""correct_bias: means of layers, weights that round badly, and what comes back."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teint8
from teint8 import Policy, Rule


class Small(nn.Module):
    """ReLU gives inputs a mean, and an outlier in each kernel a coarse grid to the other taps: rounding shifts the outputs."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=not norm)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=not norm)
        self.after = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.after(self.depthwise(h))).mean((2, 3)))


def _model(norm: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Small(norm)
    with torch.no_grad():
        for conv in (model.first, model.depthwise):
            conv.weight[:, 0, 0, 0] = 12.0
        x = torch.rand(64, 3, 12, 12)
        if norm:
            model.train()
            for _ in range(20):
                model(x)
    return model.eval(), x, torch.rand(64, 3, 12, 12)


@pytest.mark.parametrize("norm", [False, True])
def test_outputs_come_nearer_to_the_float_model(norm: bool) -> None:
    model, x, fresh = _model(norm)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        exact = model(fresh)
        fixed, buffers = teint8.correct_bias(qfn, params, [x[:32], (x[32:],)], progress=False)
        plain, better = qfn(params, fresh), qfn((fixed, buffers), fresh)
    assert (better - exact).norm() < 0.5 * (plain - exact).norm()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    changed = {k for k, v in {**fixed, **buffers}.items() if not torch.equal(v, before[k])}
    assert changed == {"head.bias"} | ({"norm.running_mean", "after.running_mean"} if norm else {"first.bias", "depthwise.bias"})
    model.load_state_dict({**fixed, **buffers})
    with torch.no_grad(), teint8.te_int8_autocast(training=False):
        torch.testing.assert_close(model(fresh), better)


def test_means_of_each_layer_are_those_of_the_float_model() -> None:
    model, x, _ = _model(False)
    fixed, buffers = teint8.correct_bias(teint8.quantize(model), dict(model.named_parameters()), [x], progress=False)
    got = teint8.quantize(model)((fixed, buffers), x).mean(0)
    torch.testing.assert_close(got, model(x).mean(0), rtol=1e-4, atol=1e-4)


def test_layers_that_a_rule_leaves_in_float_are_not_touched_and_the_mode_comes_back() -> None:
    model, x, _ = _model(True)
    model.train()
    model.norm.eval()
    policy = Policy([Rule("head.*", weight=None), Rule()])
    params = dict(model.named_parameters())
    fixed, _ = teint8.correct_bias(teint8.quantize(model, policy), params, [x], progress=False)
    assert torch.equal(fixed["head.bias"], params["head.bias"])
    assert model.training and not model.norm.training


class Odd(nn.Module):
    """Tied weights with biases of their own, a bias that follows no product, a layer without one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.free = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.w1, self.bias, self.last = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        return self.last(F.relu(self.free(h) + h @ self.w1 + self.bias))


def test_batches_count_by_their_size() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.rand(64, 8)
    with torch.no_grad():
        model.weight[:, 0] = 30.0
    x[-1] += 30
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    both = teint8.correct_bias(qfn, params, [[x[:63]], x[63:]], progress=False)
    with torch.no_grad():
        exact = model(x).mean(0)
        assert (qfn(params, x).mean(0) - exact).norm() > 100 * (qfn(both, x).mean(0) - exact).norm()


def test_each_layer_has_the_leaf_that_it_adds() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.rand(64, 8)
    with torch.no_grad():
        for w in (model.a.weight, model.free.weight, model.w1, model.last.weight):
            w[:, 0] = 30.0  # the other columns get a coarse grid
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    fixed, buffers = teint8.correct_bias(qfn, params, [x], progress=False)
    changed = {k for k, v in fixed.items() if not torch.equal(v, params[k])}
    assert changed == {"a.bias", "b.bias", "last.bias"}
    with torch.no_grad():
        plain, better, exact = qfn(params, x), qfn((fixed, buffers), x), model(x)
    assert (better.mean(0) - exact.mean(0)).norm() < 0.01 * (plain.mean(0) - exact.mean(0)).norm()
    model.load_state_dict({**fixed, **buffers}, strict=False)


def test_bad_input() -> None:
    model, x, _ = _model(False)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    with pytest.raises(ValueError, match="there are no batches"):
        teint8.correct_bias(qfn, params, [], progress=False)
    with pytest.raises(TypeError, match="made from a function"):
        teint8.correct_bias(teint8.quantize(lambda p, x: x @ p), torch.ones(2, 2), [x], progress=False)
    with pytest.raises(TypeError, match="batches is a tensor"):
        teint8.correct_bias(qfn, params, x, progress=False)
    with pytest.raises(ValueError, match=r"'first\.weight' is packed; give the float"):
        teint8.correct_bias(qfn, teint8.pack(qfn, params), [x], progress=False)
    bare = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match="nothing to correct"):
        teint8.correct_bias(teint8.quantize(bare), dict(bare.named_parameters()), [torch.rand(2, 4)], progress=False)
