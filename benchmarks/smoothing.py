"""Gradients of an all-INT8 step on heavy-tailed data, as they are and smoothed, against FP8: RMSNorm and a SwiGLU MLP.

python benchmarks/smoothing.py [--out FOLDER]

8 channels of x are 20 times larger, channels and tokens log-normal. ``teint8.smooth`` folds powers of two into the norm's weight, the
rows of the gate's factor and the columns of the weights behind them; gradients are taken back to the first parameters to be compared.
"""

from typing import Any

import peers
import torch
import torch.nn.functional as F
from common import alternating, output_folder, relative_error, save
from torch import Tensor, nn

import teint8
from teint8 import Policy, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WIDTH, HIDDEN = (16384, 4096, 14336) if DEVICE == "cuda" else (256, 128, 384)
LINEARS = ("gate", "up", "down")


class Mlp(nn.Module):
    """down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        how: dict[str, Any] = {"bias": False, "device": DEVICE, "dtype": torch.bfloat16}
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5, device=DEVICE, dtype=torch.bfloat16)
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, HIDDEN, **how),
            nn.Linear(WIDTH, HIDDEN, **how),
            nn.Linear(HIDDEN, WIDTH, **how),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


def heavy() -> Tensor:
    x = torch.randn(TOKENS, WIDTH, device=DEVICE) * (0.5 * torch.randn(WIDTH, device=DEVICE)).exp()
    x = x * (0.5 * torch.randn(TOKENS, 1, device=DEVICE)).exp()
    x[:, torch.randperm(WIDTH, device=DEVICE)[:8]] *= 20
    return x.bfloat16()


Leaves = dict[str, Tensor]


def forward(leaves: Leaves, gradient: str | None) -> Tensor:
    h = F.rms_norm(leaves["x"], (WIDTH,), leaves["norm.weight"], 1e-5)
    weights = [leaves[f"{name}.weight"] for name in LINEARS]
    if gradient is None:
        return F.linear(F.silu(F.linear(h, weights[0])) * F.linear(h, weights[1]), weights[2])
    return ops.gated_mlp(h, *weights, gradient=gradient)


def leaves_of(x: Tensor, tree: Leaves) -> Leaves:
    return {name: t.clone().requires_grad_() for name, t in {"x": x, **tree}.items()}


def smoothed(model: nn.Module, params: Leaves, x: Tensor) -> Leaves:
    qfn = teint8.quantize(model, Policy.training())
    folded: Leaves = teint8.smooth(qfn, params, teint8.calibrate(qfn, params, [x], progress=False), x)
    assert all(isinstance(leaf, Tensor) for leaf in folded.values()), "all of it can be folded"
    return folded


def main() -> list[dict[str, object]]:
    torch.manual_seed(0)
    model, x = Mlp(), heavy()
    dy = torch.randn_like(x) * 0.01
    params = {name: p.detach() for name, p in model.named_parameters()}
    folded = smoothed(model, params, x)
    factors = {name: (folded[name].float() / params[name].float()).nan_to_num(1.0) for name in params}
    leaves = {"bf16": leaves_of(x, params), "int8": leaves_of(x, params), "int8, smoothed": leaves_of(x, folded)}
    runs: dict[str, Any] = {
        name: lambda of=of, name=name: forward(of, None if name == "bf16" else "nearest") for name, of in leaves.items()
    }
    for name, peer in (peers.training(model, "torchao fp8 tensorwise") if DEVICE == "cuda" else {}).items():
        leaves[name] = {"x": x.clone().requires_grad_(), **{n.removeprefix("_orig_mod."): p for n, p in peer.named_parameters()}}
        runs[name] = lambda peer=peer, source=leaves[name]["x"]: peer(source)

    def step(name: str) -> None:
        for leaf in leaves[name].values():
            leaf.grad = None
        runs[name]().backward(dy)

    def gradients(name: str) -> Leaves:
        step(name)
        back = factors if name == "int8, smoothed" else {}
        return {n: leaf.grad.float() * back.get(n, 1) for n, leaf in leaves[name].items()}  # type: ignore[union-attr]

    exact = gradients("bf16")
    errors = {name: {n: relative_error(g, exact[n]) for n, g in gradients(name).items()} for name in runs}
    took = alternating({name: lambda name=name: step(name) for name in runs}, rounds=5, seconds=0.2)
    return [{"step": name, "ms": took[name], "to int8": took["int8"] / took[name], "largest error": max(errors[name].values()),
             **{f"d{n.removesuffix('.weight')}": e for n, e in errors[name].items()}} for name in runs]  # fmt: skip


if __name__ == "__main__":
    save("smoothing", main(), output_folder(__doc__))
