"""A norm and the linear or convolution that follows: its codes come of the norm's kernels, against one after the other; all eager.

python benchmarks/norm_linear.py [--out FOLDER]    16384 x 4096 to 4096; GroupNorm and BatchNorm with a convolution; weights packed
"""

import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import alternating, differing, output_folder, relative_error, save

import teint8
from teint8 import Policy, QTensor, Rule, ops

M, K, N = 16384, 4096, 4096


def main(folder: pathlib.Path) -> None:
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
    save("norm_linear", rows, folder)


def of_channels(folder: pathlib.Path) -> None:
    rows: list[dict[str, object]] = []
    for kind, batch, c, size in (("group", 8, 320, 64), ("group", 8, 640, 32), ("group", 2, 320, 64), ("batch", 64, 256, 56)):
        norm = torch.nn.GroupNorm(32, c) if kind == "group" else torch.nn.BatchNorm2d(c).eval()
        conv = torch.nn.Conv2d(c, c, 3, padding=1)
        for layer in (norm, conv):
            layer.to(device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
        x = torch.randn(batch, c, size, size, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        apart, together = (
            teint8.te_int8_autocast(training=False, policy=Policy([Rule(ops=names)])) for names in (("conv",), ("conv", "norm"))
        )

        def under(
            context: teint8.te_int8_autocast, norm: torch.nn.Module = norm, conv: torch.nn.Module = conv, x: torch.Tensor = x
        ) -> Any:
            with context:
                return conv(norm(x))

        runs = {"bf16": lambda norm=norm, conv=conv, x=x: conv(norm(x)), "INT8, one after the other": lambda apart=apart: under(apart),
                "INT8, the norm's codes": lambda together=together: under(together)}  # fmt: skip
        assert relative_error(runs["INT8, the norm's codes"](), runs["bf16"]()) < 0.03
        took = alternating(runs, rounds=3)
        pair = took["INT8, one after the other"]
        rows += [{"norm": kind, "batch": batch, "channels": c, "size": size, "way": name, "ms": ms, "to bf16": took["bf16"] / ms,
                  "to the pair": pair / ms} for name, ms in took.items()]  # fmt: skip
    save("norm_conv", rows, folder)


if __name__ == "__main__":
    with torch.no_grad():
        out = output_folder(__doc__)
        main(out)
        of_channels(out)
