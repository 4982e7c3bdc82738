"""A Llama-style block (RMSNorm, grouped attention with rotary positions, SwiGLU), forward and training step, INT8 to bf16.

python benchmarks/block.py [--out FOLDER]    4 sequences of 4096 tokens, width 4096, 32 heads, 8 of keys and values
"""

from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from common import alternating, output_folder, relative_error, save
from mlp import SwiGLU
from torch import Tensor, nn

import teint8
from teint8 import Policy, QTensor, ops

BATCH, TOKENS, WIDTH, HIDDEN, HEADS, PAIRS = 4, 4096, 4096, 14336, 32, 8
Linears = Callable[..., tuple[Tensor, ...]]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)); ``fused`` calls teint8's ops instead of the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(WIDTH, eps=1e-5, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        narrow = WIDTH // HEADS * PAIRS
        self.q, self.k, self.v, self.o = (
            nn.Linear(WIDTH, n, bias=False, device="cuda", dtype=torch.bfloat16) for n in (WIDTH, narrow, narrow, WIDTH)
        )
        self.mlp = SwiGLU(WIDTH, HIDDEN)
        angles = torch.arange(TOKENS, device="cuda")[:, None] * 10000.0 ** -(torch.arange(0, 1, 2 * HEADS / WIDTH, device="cuda"))
        self.cos, self.sin = (f(torch.cat((angles, angles), -1)).bfloat16() for f in (torch.cos, torch.sin))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.view(BATCH, TOKENS, -1, WIDTH // HEADS).transpose(1, 2) for t in (q, k, v))
        q, k = rotated(q, self.cos, self.sin), rotated(k, self.cos, self.sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(BATCH, TOKENS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.o(self.attend(self.q(h), self.k(h), self.v(h)))
        return x + self.mlp(self.norm2(x))

    def fused(self, x: Tensor, gradient: str | None = None, packed: dict[str, QTensor] | None = None) -> Tensor:
        def weight(name: str) -> Tensor | QTensor:
            return self.get_parameter(name) if packed is None else packed[name]

        how = {"gradient": gradient}
        q, k, v = ops.merged_linear(self.norm1(x), [weight(f"{n}.weight") for n in "qkv"], **how)
        x = x + ops.linear(self.attend(q, k, v), weight("o.weight"), **how)
        return x + ops.gated_mlp(self.norm2(x), *(weight(f"mlp.{n}.weight") for n in ("gate", "up", "down")), **how)


def rows() -> list[dict[str, object]]:
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block)
    x = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x) * 0.01
    serving, training = teint8.te_int8_autocast(training=False), teint8.te_int8_autocast(policy=Policy.training())
    packed = {n: QTensor.quantize(p.detach()) for n, p in block.named_parameters() if p.ndim == 2}

    def inside(context: teint8.te_int8_autocast) -> Tensor:
        with context:
            return block(x)

    forwards = {"bf16": lambda: block(x), "compiled": lambda: compiled(x), "module": lambda: inside(serving),
                "fused": lambda: block.fused(x, packed=packed)}  # fmt: skip
    steps = {"bf16": lambda: block(x), "compiled": lambda: compiled(x), "module": lambda: inside(training),
             "fused": lambda: block.fused(x, "nearest")}  # fmt: skip
    leaves = {name: [x, *block.parameters()] for name in steps}
    with torch.no_grad():
        forwards |= peers.usable({name: lambda peer=peer: peer(x) for name, peer in peers.inference(block).items()})
    for name, peer in peers.training(block, "torchao fp8 tensorwise").items():
        steps[name], leaves[name] = (lambda peer=peer: peer(x)), [x, *peer.parameters()]

    def step(name: str) -> None:
        for leaf in leaves[name]:
            leaf.grad = None
        steps[name]().backward(dy)

    with torch.no_grad():
        exact = block(x)
        errors = {name: relative_error(run(), exact) for name, run in forwards.items()}
        took = {"forward": alternating(forwards, rounds=3)}
    step("bf16")
    gradients = [leaf.grad.clone() for leaf in leaves["bf16"] if leaf.grad is not None]
    worst = {}
    for name in steps:
        step(name)
        worst[name] = max(relative_error(leaf.grad, g) for leaf, g in zip(leaves[name], gradients, strict=True))  # type: ignore[arg-type]
    mine = ("module", "fused")
    assert max(errors[n] for n in mine) < 0.05 and max(worst[n] for n in mine) < 0.15, (errors, worst)
    took["step"] = alternating({name: lambda name=name: step(name) for name in steps}, rounds=3)
    return [{"work": work, "way": name, "ms": ms, "to bf16 compiled": took[work]["compiled"] / ms,
             "error": (errors if work == "forward" else worst)[name]} for work in took for name, ms in took[work].items()]  # fmt: skip


if __name__ == "__main__":
    save("block", rows(), output_folder(__doc__))
