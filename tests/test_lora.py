"""LoRA: gradients through frozen packed weights to adapters and inputs."""

import pytest
import torch
from contract import different
from torch import nn

import teint8
from teint8 import Policy, QTensor, Rule

POLICIES = {
    "qat": Policy([Rule("*.down", weight=None), Rule("*.up", weight=None), *Policy.qat().rules]),
    "training": Policy([Rule("*.down", weight=None), Rule("*.up", weight=None), *Policy.training().rules]),
}


class Adapted(nn.Module):
    """A linear, and beside it one of low rank (Hu et al., 2022)."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def setting(device: str) -> tuple[nn.Module, torch.Tensor, dict, dict]:
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(nn.Linear(32, 64)), nn.GELU(), Adapted(nn.Linear(64, 8))).to(device)
    params = dict(net.named_parameters())
    adapters = {n: p.detach() for n, p in params.items() if "linear" not in n}
    return net, torch.randn(128, 32, device=device), {n: p.detach() for n, p in params.items() if "linear" in n}, adapters


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_packed_weights(name: str, compiled: bool, device: str) -> None:
    net, x, frozen, adapters = setting(device)
    qfn = teint8.quantize(net, POLICIES[name], strict=True)
    packed = teint8.pack(qfn, {**frozen, **adapters})
    base = {n: packed[n] for n in frozen}
    assert sum(isinstance(leaf, QTensor) for leaf in base.values()) == 2
    codes = {n: leaf.codes.clone() for n, leaf in base.items() if isinstance(leaf, QTensor)}

    def loss(f, adapters, x):
        return f({**base, **adapters}, x).square().mean()

    def grads(f):
        return torch.func.grad(lambda a, x: loss(f, a, x), argnums=(0, 1))

    got = (torch.compile(grads(qfn), fullgraph=True) if compiled else grads(qfn))(adapters, x)
    in_float = teint8.quantize(net, Policy())
    exact = torch.func.grad(
        lambda a, x: in_float({**{n: leaf.dequantize() if isinstance(leaf, QTensor) else leaf for n, leaf in base.items()}, **a}, x)
        .square().mean(), argnums=(0, 1),
    )(adapters, x)  # fmt: skip
    pairs = [(got[1], exact[1]), *((got[0][n], exact[0][n]) for n in adapters)]
    for a, b in pairs:
        assert 0 < float((a - b).norm()) < 0.04 * float(b.norm())
    assert all(torch.equal(base[n].codes, codes[n]) for n in codes)


def test_training_adapters_in_a_loop(device: str) -> None:
    """With .backward() and an optimizer, as most people train; the codes stay, the loss falls, serving has the bits of training."""
    net, x, frozen, adapters = setting(device)
    qfn = teint8.quantize(net, POLICIES["training"])
    base = {n: leaf for n, leaf in teint8.pack(qfn, {**frozen, **adapters}).items() if n in frozen}
    leaves = {n: t.clone().requires_grad_() for n, t in adapters.items()}
    target = torch.tanh(x[:, :8])
    optimizer, losses = torch.optim.AdamW(leaves.values(), lr=3e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (qfn({**base, **leaves}, x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        again = qfn(teint8.pack(qfn, {**base, **leaves}), x)
    assert different(again, qfn({**base, **leaves}, x).detach()) == 0


def test_rotated_and_smoothed_weights_take_adapters_too(device: str) -> None:
    net, x, frozen, adapters = setting(device)
    qfn = teint8.quantize(net, POLICIES["training"])
    ready = teint8.rotate(qfn, {**frozen, **adapters}, x)
    packed = teint8.pack(qfn, ready)
    assert isinstance(packed["0.linear.weight"], teint8.Conditioned) and isinstance(packed["0.up.weight"], torch.Tensor)
    base = {n: packed[n] for n in frozen}
    got = torch.func.grad(lambda a: qfn({**base, **a}, x).square().mean())(adapters)
    want = torch.func.grad(lambda a: torch.func.functional_call(net, {**frozen, **a}, (x,)).square().mean())(adapters)
    for n in adapters:
        assert 0 < float((got[n] - want[n]).norm()) < 0.05 * float(want[n].norm())
