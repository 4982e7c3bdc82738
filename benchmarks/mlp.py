"""A SwiGLU MLP's forward and its linear, INT8 to bf16, eager and from CUDA graphs; weights packed, activations quantized inside.

python benchmarks/mlp.py [--out FOLDER]
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import alternating, differing, graphed, output_folder, save
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


def eager() -> list[dict[str, object]]:
    rows = []
    context = teint8.te_int8_autocast(training=False)

    def inside(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with context:
                return module(x)

        return run

    for m, n, k in ((16384, 14336, 4096), (16384, 4096, 14336), (4096, 14336, 4096), (512, 14336, 4096)):
        layer, x = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        head = slice(0, 64)
        assert differing(inside(layer, x)()[head], ops.linear(x[head], layer.weight, layer.bias, impl="reference")) == 0
        took = alternating({"bf16": lambda layer=layer, x=x: layer(x), "int8": inside(layer, x)})
        rows.append({"work": f"linear {k} to {n}", "tokens": m, "bf16 ms": took["bf16"], "bf16 compiled ms": None,
                     "int8 module ms": took["int8"],
                     "int8 fused ms": None, "module to bf16": took["bf16"] / took["int8"], "fused to compiled": None})  # fmt: skip
    model = SwiGLU(K, N)
    compiled = torch.compile(model)
    packed = [QTensor.quantize(w.detach()) for w in (model.gate.weight, model.up.weight, model.down.weight)]
    for m in (16384, 4096):
        x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        assert differing(ops.gated_mlp(x[:64], *packed), ops.gated_mlp(x[:64], *packed, impl="reference")) == 0
        runs = {"bf16": lambda x=x: model(x), "compiled": lambda x=x: compiled(x), "module": inside(model, x),
                "fused": lambda x=x: ops.gated_mlp(x, *packed)}  # fmt: skip
        took = alternating(runs)
        rows.append({"work": "SwiGLU MLP", "tokens": m, "bf16 ms": took["bf16"], "bf16 compiled ms": took["compiled"],
                     "int8 module ms": took["module"],
                     "int8 fused ms": took["fused"], "module to bf16": took["compiled"] / took["module"],
                     "fused to compiled": took["compiled"] / took["fused"]})  # fmt: skip
    return rows


def from_graphs() -> list[dict[str, object]]:
    """Few tokens: bf16 and INT8 both as CUDA graphs, so that no host is timed."""
    model, rows = SwiGLU(K, N), []
    compiled = torch.compile(model)
    packed = [QTensor.quantize(w.detach()) for w in (model.gate.weight, model.up.weight, model.down.weight)]
    for m in (1, 4, 16, 64, 512):
        x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        assert differing(ops.gated_mlp(x, *packed), ops.gated_mlp(x, *packed, impl="reference")) == 0
        runs = {"bf16": lambda x=x: model(x), "compiled": lambda x=x: compiled(x), "int8": lambda x=x: ops.gated_mlp(x, *packed)}
        took = alternating({name: graphed(run) for name, run in runs.items()}, seconds=0.2)
        rows.append({"tokens": m, "bf16 us": took["bf16"] * 1e3, "bf16 compiled us": took["compiled"] * 1e3,
                     "int8 us": took["int8"] * 1e3,
                     "to bf16": min(took["bf16"], took["compiled"]) / took["int8"]})  # fmt: skip
    return rows


if __name__ == "__main__":
    folder = output_folder(__doc__)
    with torch.no_grad():
        save("mlp", eager(), folder)
        save("decode", from_graphs(), folder)
