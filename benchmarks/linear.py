"""A linear with its quantization, to bf16: in a context, packed, by cuBLAS's INT8, and torchao's; activations are quantized inside.

python benchmarks/linear.py [--out FOLDER]
"""

from collections.abc import Callable

import peers
import torch
from common import alternating, differing, output_folder, save
from torch import Tensor, nn

import teint8
from teint8 import QTensor, ops

SHAPES = ((16384, 14336, 4096), (16384, 4096, 14336), (4096, 14336, 4096), (512, 14336, 4096))


def runs_of(layer: nn.Linear, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    context, compiled = teint8.te_int8_autocast(training=False), torch.compile(layer)
    packed = QTensor.quantize(layer.weight.detach())
    codes, scale = packed.rows()

    def inside() -> Tensor:
        with context:
            return layer(x)

    def cublas() -> Tensor:
        return ops.int8_mm(*ops.quantize(x), codes, scale, layer.bias, x.dtype, "cublas")

    torchao = {
        name: (lambda peer=peer: peer(x))
        for name, peer in (peers.inference(layer) if (len(x), layer.in_features) == (16384, 4096) else {}).items()
    }
    mine = {"int8 module": inside, "int8 packed": lambda: ops.linear(x, packed, layer.bias)}
    return {"bf16": lambda: layer(x), "bf16 compiled": lambda: compiled(x), **mine, "cublas int8": cublas, **peers.usable(torchao)}


def main() -> None:
    rows: list[dict[str, object]] = []
    for m, n, k in SHAPES:
        torch._dynamo.reset()
        layer, x = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        runs = runs_of(layer, x)
        want = ops.linear(x[:64], layer.weight, layer.bias, impl="reference")
        assert all(differing(runs[name]()[:64], want) == 0 for name in ("int8 module", "int8 packed", "cublas int8"))
        took = alternating(runs)
        rows += [{"tokens": m, "in": k, "out": n, "way": name, "ms": ms, "to bf16": took["bf16"] / ms,
                  "to compiled": took["bf16 compiled"] / ms} for name, ms in took.items()]  # fmt: skip
    save("linear", rows, output_folder(__doc__))


if __name__ == "__main__":
    with torch.no_grad():
        main()
