"""A SwiGLU MLP of few tokens, every way from a CUDA graph, so that no host is timed; ratios to the faster of bf16 and compiled bf16.

python benchmarks/decode.py [--out FOLDER]
"""

import peers
import torch
from common import alternating, differing, graphed, output_folder, save
from mlp import K, N, SwiGLU, packed_of

import teint8
from teint8 import Policy, ops

TOKENS = (1, 4, 16, 64, 512)


def main() -> None:
    rows: list[dict[str, object]] = []
    model = SwiGLU(K, N)
    packed, halves = packed_of(model), teint8.quantize(model, Policy.weight_only())
    weights = teint8.pack(halves, dict(model.named_parameters()))
    for m in TOKENS:
        torch._dynamo.reset()
        compiled, x = torch.compile(model), torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        assert differing(ops.gated_mlp(x, *packed), ops.gated_mlp(x, *packed, impl="reference")) == 0
        torchao = (
            {name: (lambda peer=peer: peer(x)) for name, peer in peers.inference(model, weights=True).items()}
            if m in (1, 16, 512)
            else {}
        )
        runs = {"bf16": lambda: model(x), "bf16 compiled": lambda: compiled(x), "int8 fused": lambda: ops.gated_mlp(x, *packed),
                "int8 weights": lambda: halves(weights, x), **peers.usable(torchao)}  # fmt: skip
        took = alternating({name: graphed(run) for name, run in runs.items()}, rounds=5, seconds=0.15)
        base = min(took["bf16"], took["bf16 compiled"])
        rows += [{"tokens": m, "way": name, "us": ms * 1e3, "to bf16": base / ms} for name, ms in took.items()]
    save("decode", rows, output_folder(__doc__))


if __name__ == "__main__":
    with torch.no_grad():
        main()
