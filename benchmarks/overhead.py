"""What the host spends on one quantized linear in eager mode, above F.linear; M = 1.

python benchmarks/overhead.py [--out FOLDER]
"""

from collections.abc import Callable
from typing import Any

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
    context = teint8.te_int8_autocast(training=False)

    def inside(run: Callable[[], Any]) -> float:
        with context:
            return host_microseconds(run)

    def functional() -> torch.Tensor:
        return F.linear(x, layer.weight, layer.bias)

    ways: dict[str, Callable[[], float]] = {
        "F.linear": lambda: host_microseconds(functional),
        "nn.Linear": lambda: host_microseconds(lambda: layer(x)),
        "F.linear in a context": lambda: inside(functional),
        "nn.Linear in a context": lambda: inside(lambda: layer(x)),
        "ops.linear, packed": lambda: host_microseconds(lambda: ops.linear(x, packed, layer.bias)),
    }
    times = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():
        for _ in range(5):  # the fastest of rounds that alternate: what warms up first is not charged for it
            times = {name: min(times[name], way()) for name, way in ways.items()}
    rows = [{"call": name, "us": t, "above F.linear": t - times["F.linear"]} for name, t in times.items()]
    save("overhead", rows, output_folder(__doc__))


if __name__ == "__main__":
    main()
