"""``fold_batchnorm``: the same values in float and in INT8, and what cannot be folded."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import teint8
from teint8 import Policy, Quant, Rule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.c, self.bn_c = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4, eps=1e-3)
        self.d, self.bn_d = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.e, self.bn_e = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)  # its output is used twice
        self.bn_0 = nn.BatchNorm2d(3)  # behind no layer

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(self.bn_0(x))))
        e = self.e(x)
        x = F.relu(self.bn_b(self.b(x))) + self.bn_e(e) + e
        x = F.relu(self.bn_c(self.c(x)))
        y: Tensor = self.bn_d(self.d(x.mean((2, 3))))
        return y


def _net() -> tuple[Net, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return net, torch.randn(4, 3, 9, 9), dict(net.named_parameters())


def test_values_stay_and_four_of_five_are_folded() -> None:
    net, x, params = _net()
    folded, buffers = teint8.fold_batchnorm(teint8.quantize(net), params, x)
    assert net.training  # as it was
    net.eval()
    torch.testing.assert_close(functional_call(net, (folded, buffers), (x,)), net(x), rtol=1e-4, atol=1e-4)
    still = {name for name, b in buffers.items() if name.endswith("running_mean") and b.abs().max() > 0}
    assert still == {"bn_0.running_mean", "bn_e.running_mean"}
    for name in "abcd":
        assert torch.all(buffers[f"bn_{name}.running_var"] == 1) and not torch.equal(folded[f"{name}.weight"], params[f"{name}.weight"])
    for name, p in net.named_parameters():
        assert torch.equal(p, params[name])  # nothing was changed in place
    net.load_state_dict(folded | buffers)


def test_codes_by_channel_do_not_change() -> None:
    net, x, params = _net()
    qfn = teint8.quantize(net.eval())
    folded = teint8.fold_batchnorm(qfn, params, x)
    before, after = teint8.pack(qfn, params), teint8.pack(qfn, folded)[0]
    for name in ("a.weight", "d.weight"):
        # where gamma is negative the signs turn; a value at half a step may go the other way
        assert (before[name].codes.abs().int() - after[name].codes.abs().int()).abs().max() <= 1
    want = qfn(params, x)
    assert float((qfn(folded, x) - want).norm() / want.norm()) < 0.01


def test_one_scale_in_all_sees_the_scale_of_serving() -> None:
    """A channel that BatchNorm makes small has coarse codes once it is folded: the net trains for what serves."""
    net, x, params = _net()
    policy = Policy([Rule(weight=Quant(granularity="tensor"))])
    qfn = teint8.quantize(net.eval(), policy)
    folded = teint8.fold_batchnorm(qfn, params, x)
    assert not torch.equal(teint8.pack(qfn, params)["a.weight"].codes.abs(), teint8.pack(qfn, folded)[0]["a.weight"].codes.abs())
    grads = torch.func.grad(lambda p: qfn((p, folded[1]), x).square().sum())(folded[0])
    assert all(float(g.norm()) > 0 for name, g in grads.items() if name.endswith("weight") and name[0] in "abd")


def test_a_weight_of_two_layers_and_no_statistics() -> None:
    conv = nn.Conv2d(3, 3, 1)
    tied = nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))
    loose = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False))

    class Odd(nn.Module):
        """What is used in another way, too."""

        def __init__(self, how: str) -> None:
            super().__init__()
            self.l, self.bn, self.how = nn.Linear(4, 4), nn.BatchNorm1d(4), how
            nn.init.uniform_(self.bn.weight, 2, 3)

        def forward(self, x: Tensor) -> object:
            y = self.l(x)
            z = self.bn(y)
            return {
                "returned": lambda: (z, y),
                "product": lambda: z @ y.mT,
                "attention": lambda: F.scaled_dot_product_attention(y, y, y) + z,
                "addmm": lambda: torch.addmm(y, z, self.l.weight.detach()),
                "tied": lambda: z @ self.l.weight,
                "table": lambda: F.embedding(torch.tensor([1]), self.l.weight) + z,
                "weight": lambda: (z, self.l.weight),
                "bias": lambda: z + self.l.bias,
                "twice": lambda: self.bn(F.relu(z)),
            }[self.how]()

    odd = [Odd(how) for how in ("returned", "product", "attention", "addmm", "tied", "table", "weight", "bias", "twice")]
    for net in odd:
        with pytest.raises(ValueError, match="no BatchNorm with running statistics follows"):
            teint8.fold_batchnorm(teint8.quantize(net), dict(net.named_parameters()), torch.randn(4, 4))
    tokens = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # over the tokens, not over the linear's channels
    with pytest.raises(ValueError, match="no BatchNorm with running statistics follows"):
        teint8.fold_batchnorm(teint8.quantize(tokens), dict(tokens.named_parameters()), torch.randn(2, 4, 3))
    for net in (tied, loose, plain):
        with pytest.raises(ValueError, match="no BatchNorm with running statistics follows"):
            teint8.fold_batchnorm(teint8.quantize(net), dict(net.named_parameters()), torch.randn(2, 3, 4, 4))


def test_bad_input() -> None:
    net, x, params = _net()
    qfn = teint8.quantize(net)
    with pytest.raises(ValueError, match="there are no inputs"):
        teint8.fold_batchnorm(qfn, params)
    with pytest.raises(ValueError, match="is packed"):
        teint8.fold_batchnorm(qfn, teint8.pack(qfn, params), x)
    with pytest.raises(TypeError, match="was made from a function"):
        teint8.fold_batchnorm(teint8.quantize(lambda p, x: x), params, x)
