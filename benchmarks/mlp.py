"""A SwiGLU MLP's forward to compiled bf16, all eager: as a module in a context, by the fused op, and torchao's; weights packed.

python benchmarks/mlp.py [--out FOLDER]
"""

import peers
import torch
import torch.nn.functional as F
from common import alternating, differing, output_folder, relative_error, save
from torch import nn

import teint8
from teint8 import QTensor, ops

K, N = 4096, 14336


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*s, bias=False, device="cuda", dtype=torch.bfloat16) for s in ((k, n), (k, n), (n, k))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def packed_of(model: SwiGLU) -> list[QTensor]:
    return [QTensor.quantize(p.detach()) for p in (model.gate.weight, model.up.weight, model.down.weight)]


def main() -> None:
    rows: list[dict[str, object]] = []
    context = teint8.te_int8_autocast(training=False)
    for m in (16384, 4096):
        torch._dynamo.reset()
        model, x = SwiGLU(K, N), torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        compiled, packed = torch.compile(model), packed_of(model)

        def inside() -> torch.Tensor:
            with context:
                return model(x)

        torchao = {name: (lambda peer=peer: peer(x)) for name, peer in (peers.inference(model) if m == 16384 else {}).items()}
        runs = {"bf16": lambda: model(x), "bf16 compiled": lambda: compiled(x), "int8 module": inside,
                "int8 fused": lambda: ops.gated_mlp(x, *packed), **peers.usable(torchao)}  # fmt: skip
        assert differing(runs["int8 fused"]()[:64], ops.gated_mlp(x[:64], *packed, impl="reference")) == 0
        exact = runs["bf16"]()
        errors = {name: relative_error(run(), exact) for name, run in runs.items()}
        took = alternating(runs, rounds=5)
        rows += [{"tokens": m, "way": name, "ms": ms, "to bf16": took["bf16"] / ms, "to compiled": took["bf16 compiled"] / ms,
                  "error": errors[name]} for name, ms in took.items()]  # fmt: skip
    save("mlp", rows, output_folder(__doc__))


if __name__ == "__main__":
    with torch.no_grad():
        main()
