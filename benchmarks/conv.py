"""Conv2d at the layer shapes of ResNet-50, channels last, batch 64, against cuDNN's bf16; CUDA-graph replays.

python benchmarks/conv.py [--out FOLDER]    "kernel": codes in, bf16 out; "whole": bf16 in and out, quantization included
"""

import math

import torch
import torch.nn.functional as F
from common import alternating, differing, graphed, output_folder, relative_error, save

from teint8 import QTensor, ops
from teint8.ops.conv_layout import activation_codes, kernel_codes
from teint8.ops.raw_conv import Window, int8_conv

BATCH = 64
# channels in, channels out, kernel, stride, pixels a side: each distinct one of the 53 convolutions
LAYERS = (
    (3, 64, 7, 2, 224),
    (64, 64, 1, 1, 56), (64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56),
    (256, 128, 1, 1, 56), (128, 128, 3, 2, 56), (128, 512, 1, 1, 28), (256, 512, 1, 2, 56), (512, 128, 1, 1, 28),
    (128, 128, 3, 1, 28),
    (512, 256, 1, 1, 28), (256, 256, 3, 2, 28), (256, 1024, 1, 1, 14), (512, 1024, 1, 2, 28), (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (1024, 512, 1, 1, 14), (512, 512, 3, 2, 14), (512, 2048, 1, 1, 7), (1024, 2048, 1, 2, 14), (2048, 512, 1, 1, 7),
    (512, 512, 3, 1, 7),
)  # fmt: skip


def row(c: int, n: int, kernel: int, stride: int, size: int) -> dict[str, object]:
    torch.manual_seed(0)
    last = torch.channels_last
    x = torch.randn(BATCH, c, size, size, device="cuda", dtype=torch.bfloat16).to(memory_format=last)
    w = (torch.randn(n, c, kernel, kernel, device="cuda") / math.sqrt(c * kernel**2)).bfloat16().to(memory_format=last)
    where = {"stride": stride, "padding": kernel // 2}
    packed = QTensor.quantize(w, axis=(-3, -2, -1))
    if kernel == 1:  # each pixel is a token
        codes, scales = ops.quantize(x[:, :, ::stride, ::stride].movedim(1, -1).flatten(0, 2))

        def alone(impl: str = "") -> torch.Tensor:
            return ops.int8_mm(codes, scales, packed.codes.flatten(1), packed.scale.flatten(), None, x.dtype, impl)

    else:
        window = Window((stride,) * 2, (kernel // 2,) * 4, (1, 1))
        sample, w_codes = activation_codes(x, "row", None, 1, ""), kernel_codes(w, "row", False, 1)

        def alone(impl: str = "") -> torch.Tensor:
            return int8_conv(*sample, *w_codes, None, window, x.dtype, impl)

    wrong = differing(alone(), alone("reference"))
    assert wrong == 0, f"{wrong} elements differ from the contract at {(c, n, kernel, stride, size)}"
    error = relative_error(ops.conv(x, packed, **where), F.conv2d(x, w, **where))
    assert error < 0.05, error
    runs = {
        "cudnn bf16": lambda: F.conv2d(x, w, **where),
        "kernel": lambda: alone(),
        "whole": lambda: ops.conv(x, packed, **where),
    }
    took = alternating({name: graphed(run) for name, run in runs.items()}, rounds=3, seconds=0.1)
    base = took["cudnn bf16"]
    return {"in": c, "out": n, "kernel": kernel, "stride": stride, "size": size, "cudnn bf16 us": base * 1e3,
            "int8 us": took["kernel"] * 1e3, "to cudnn": base / took["kernel"], "with quantization, to cudnn": base / took["whole"],
            "error": error}  # fmt: skip


def main() -> None:
    torch.backends.cudnn.benchmark = True
    rows = [row(*layer) for layer in LAYERS]
    names = ("to cudnn", "with quantization, to cudnn")
    means = {name: math.exp(sum(math.log(r[name]) for r in rows) / len(rows)) for name in names}  # type: ignore[arg-type]
    save("conv", rows, output_folder(__doc__), means=means)
    print("geometric means", means)


if __name__ == "__main__":
    with torch.no_grad():
        main()
