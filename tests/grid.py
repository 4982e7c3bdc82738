"""The programs and transforms of the transform grid, and the STE written in plain torch that they are compared with."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import teint8
from teint8 import numerics

Program = tuple[Callable[..., Tensor], Any, Tensor]
"""(qfn, params, x)"""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 10))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5))


def function(params: Any, x: Tensor) -> Tensor:
    h = torch.tanh(x @ params["layers"][0]["w"] + params["layers"][0]["b"])
    h = torch.tanh(F.linear(h, params["layers"][1]["w"], params["layers"][1]["b"]))
    return h @ params["head"].t()


def function_params() -> Any:
    first = {"w": torch.randn(24, 33) / 5, "b": torch.randn(33)}
    second = {"w": torch.randn(20, 33) / 5, "b": torch.randn(20)}
    return {"layers": [first, second], "head": torch.randn(7, 20) / 4}


def programs(name: str, policy: teint8.Policy | None = None, device: str = "cpu") -> Program:
    if name == "function":
        params, x = function_params(), torch.randn(6, 24)
        qfn = teint8.quantize(function, policy)
    else:
        model, x = (mlp(), torch.randn(6, 24)) if name == "mlp" else (encoder(), torch.randn(6, 3, 16))
        params = {k: v.detach() for k, v in model.named_parameters()}
        qfn = teint8.quantize(model.to(device), policy)
    move = lambda t: t.to(device)
    return qfn, pytree.tree_map(move, params), move(x)


def loss_of(qfn: Callable[..., Tensor], x: Tensor) -> Callable[[Any], Tensor]:
    return lambda params: qfn(params, x).square().mean()


def directions(params: Any) -> Any:
    return pytree.tree_map(lambda p: torch.linspace(-1, 1, p.numel(), device=p.device).reshape(p.shape).to(p), params)


def stacked(params: Any) -> Any:
    return pytree.tree_map(lambda p: torch.stack([p, p * 0.5, -p]), params)


def dot(a: Any, b: Any) -> Tensor:
    return sum((u * v).sum() for u, v in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


TRANSFORMS: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "grad": lambda q, p, x: grad(loss_of(q, x))(p),
    "value_and_grad": lambda q, p, x: grad_and_value(loss_of(q, x))(p),
    "jvp": lambda q, p, x: jvp(lambda p: q(p, x), (p,), (directions(p),)),
    "vmap_x": lambda q, p, x: vmap(lambda v: q(p, v[None])[0])(x),
    "vmap_params": lambda q, p, x: vmap(lambda p: q(p, x))(stacked(p)),
    "vmap_grad": lambda q, p, x: vmap(lambda v: grad(loss_of(q, v[None]))(p))(x),
    "jacrev": lambda q, p, x: jacrev(lambda p: q(p, x[:2]).sum(-1).flatten())(p),
    "jvp_grad": lambda q, p, x: jvp(grad(loss_of(q, x)), (p,), (directions(p),)),
    "grad_grad": lambda q, p, x: grad(lambda p: dot(grad(loss_of(q, x))(p), directions(p)))(p),
    "checkpoint": lambda q, p, x: _checkpointed(q, p, x),
}

FORWARD: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "forward": lambda q, p, x: q(p, x),
    "backward": lambda q, p, x: _backward_of_params(q, p, x),
}

# of packed weights, which have no gradient: by the input
OF_INPUTS: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "forward": lambda q, p, x: q(p, x),
    "backward": lambda q, p, x: _backward(lambda x: q(p, x), x),
    "grad": lambda q, p, x: grad(lambda x: q(p, x).square().mean())(x),
    "value_and_grad": lambda q, p, x: grad_and_value(lambda x: q(p, x).square().mean())(x),
    "jvp": lambda q, p, x: jvp(lambda x: q(p, x), (x,), (torch.ones_like(x),)),
    "vmap_x": lambda q, p, x: vmap(lambda v: q(p, v[None])[0])(x),
    "vmap_grad": lambda q, p, x: vmap(grad(lambda v: q(p, v[None]).square().mean()))(x),
    "grad_grad": lambda q, p, x: grad(lambda x: grad(lambda x: q(p, x).square().mean())(x).square().sum())(x),
}


def _backward_of_params(qfn: Any, params: Any, x: Tensor) -> Any:
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(qfn(pytree.tree_unflatten(leaves, spec), x).square().mean(), leaves)


def _backward(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(run(leaf).square().mean(), leaf)[0]


def _checkpointed(qfn: Any, params: Any, x: Tensor) -> Any:
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = checkpoint(lambda x, *leaves: qfn(pytree.tree_unflatten(leaves, spec), x), x, *leaves, use_reentrant=False)
    return torch.autograd.grad(y.square().mean(), leaves)


def relative_error(got: Any, want: Any) -> float:
    """The largest ||got - want|| / ||want|| over the leaves; leaves that should be zero count by their own norm."""
    worst = 0.0
    gots, wants = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(gots) == len(wants)
    whole = max(float(w.double().norm()) for w in wants)
    for g, w in zip(gots, wants, strict=True):
        assert g.shape == w.shape
        # a leaf that is zero by mathematics (a key's bias in attention) is rounding noise on both sides
        scale = max(float(w.double().norm()), 1e-4 * whole)
        error = float((g.double() - w.double()).norm()) / scale
        assert error == error, "NaN"
        worst = max(worst, error)
    return worst


def ste_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """The QAT linear in plain torch: x + (x_hat - x).detach(), with codes by the numerics contract."""
    return F.linear(_fake(x), _fake(w), bias)


def _fake(x: Tensor) -> Tensor:
    plain = x.detach()
    a = plain.float().abs().amax(-1)
    hat = numerics.dequantize(numerics.codes_of(plain, numerics.multiplier_of(a)), numerics.scale_of(a), x.dtype)
    return x + (hat - plain).detach()
