"""A norm and the linear that follows: one kernel writes the codes, against the norm and an INT8 linear one after the other; all eager.

python benchmarks/norm_linear.py [--out FOLDER]    16384 x 4096 to 4096, weights packed
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import alternating, differing, output_folder, save

import teint8
from teint8 import QTensor, ops

M, K, N = 16384, 4096, 4096


def main() -> None:
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    norm_weight, norm_bias = torch.randn(K, device="cuda", dtype=torch.bfloat16), torch.randn(K, device="cuda", dtype=torch.bfloat16)
    layer = torch.nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    packed = QTensor.quantize(layer.weight.detach())
    context = teint8.te_int8_autocast(training=False)
    rows: list[dict[str, object]] = []
    for kind, bias in (("layer", norm_bias), ("rms", None)):

        def normed(kind: str = kind, bias: torch.Tensor | None = bias) -> torch.Tensor:
            return F.layer_norm(x, (K,), norm_weight, bias) if kind == "layer" else F.rms_norm(x, (K,), norm_weight, 1e-6)

        def fused(impl: str = "", x: torch.Tensor = x, kind: str = kind, bias: torch.Tensor | None = bias) -> torch.Tensor:
            eps = 1e-5 if kind == "layer" else 1e-6
            return ops.norm_linear(x, norm_weight, [packed], norm_bias=bias, kind=kind, eps=eps, impl=impl)[0]

        def module() -> torch.Tensor:
            with context:
                return layer(normed())

        assert differing(fused()[:512], fused("reference", x[:512])) == 0
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "bf16": lambda: layer(normed()),
            "INT8, one after the other": lambda: ops.linear(normed(), packed),
            "INT8 module in a context": module,
            "INT8 fused": fused,
        }
        took = alternating(runs, rounds=5)
        pair = took["INT8, one after the other"]
        rows += [
            {"norm": kind, "way": name, "ms": ms, "to bf16": took["bf16"] / ms, "to the pair": pair / ms} for name, ms in took.items()
        ]
    save("norm_linear", rows, output_folder(__doc__))


if __name__ == "__main__":
    with torch.no_grad():
        main()
