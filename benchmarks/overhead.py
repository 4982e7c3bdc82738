"""What the host spends on one quantized linear in eager mode, above F.linear; M = 1.

python benchmarks/overhead.py [--out FOLDER]
"""

import torch
import torch.nn.functional as F
from common import host_microseconds, output_folder, save

import teint8
from teint8 import QTensor, ops


def main() -> None:
    layer, x = (
        torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16),
        torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16),
    )
    packed = QTensor.quantize(layer.weight.detach())
    with torch.no_grad():
        times = {
            "F.linear": host_microseconds(lambda: F.linear(x, layer.weight, layer.bias)),
            "nn.Linear": host_microseconds(lambda: layer(x)),
        }
        with teint8.te_int8_autocast(training=False):
            times["F.linear in a context"] = host_microseconds(lambda: F.linear(x, layer.weight, layer.bias))
            times["nn.Linear in a context"] = host_microseconds(lambda: layer(x))
        times["ops.linear, packed"] = host_microseconds(lambda: ops.linear(x, packed, layer.bias))
    rows = [{"call": name, "us": t, "above F.linear": t - times["F.linear"]} for name, t in times.items()]
    save("overhead", rows, output_folder(__doc__))


if __name__ == "__main__":
    main()
