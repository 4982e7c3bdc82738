"""A SwiGLU MLP of few tokens, every way from a CUDA graph, so that no host is timed; ratios to the faster of bf16 and compiled bf16.

python benchmarks/decode.py [--out FOLDER]
"""

from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from common import alternating, differing, graphed, output_folder, relative_error, save
from mlp import K, N, SwiGLU, packed_of

from teint8 import QTensor, ops

TOKENS = (1, 4, 16, 64, 512)


def weights_alone(x: torch.Tensor, gate: QTensor, up: QTensor, down: QTensor) -> torch.Tensor:
    """W8A16: float activations."""
    h = F.silu(ops.linear(x, gate, activation=None)) * ops.linear(x, up, activation=None)
    return ops.linear(h, down, activation=None)


def main() -> None:
    rows: list[dict[str, object]] = []
    model = SwiGLU(K, N)
    packed = packed_of(model)
    for m in TOKENS:
        torch._dynamo.reset()
        compiled, x = torch.compile(model), torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        assert differing(ops.gated_mlp(x, *packed), ops.gated_mlp(x, *packed, impl="reference")) == 0
        torchao: dict[str, Callable[[], torch.Tensor]] = {}
        if m in (1, 512):  # at 512 tokens a call of torchao's INT8 weights took 0.2 s
            torchao = {name: (lambda peer=peer: peer(x)) for name, peer in peers.inference(model, weights=m == 1).items()}
        runs = {"bf16": lambda: model(x), "bf16 compiled": lambda: compiled(x), "int8 fused": lambda: ops.gated_mlp(x, *packed),
                "int8 weights": lambda: weights_alone(x, *packed), **peers.usable(torchao)}  # fmt: skip
        assert relative_error(runs["int8 weights"](), model(x)) < 0.02
        took = alternating({name: graphed(run) for name, run in runs.items()}, rounds=5, seconds=0.15)
        base = min(took["bf16"], took["bf16 compiled"])
        rows += [{"tokens": m, "way": name, "us": ms * 1e3, "to bf16": base / ms} for name, ms in took.items()]
    save("decode", rows, output_folder(__doc__))


if __name__ == "__main__":
    with torch.no_grad():
        main()
