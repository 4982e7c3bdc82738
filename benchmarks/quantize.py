"""Quantization kernels against a copy of the same memory: the share of copy bandwidth over the bytes that each must move.

python benchmarks/quantize.py [--out FOLDER]
"""

import torch
from common import differing, graphed, kernel_microseconds, milliseconds, output_folder, save

from teint8 import activations, ops
from teint8.ops.raw_both import activation

M, N = 16384, 14336


@torch.compile
def inductor_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch.compile makes of row quantization."""
    scale = x.float().abs().amax(1, keepdim=True) / 127
    return (x.float() / scale).round().to(torch.int8), scale


@torch.compile
def inductor_columns(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """And of the transposed codes of columns."""
    scale = x.float().abs().amax(0, keepdim=True) / 127
    return (x.float() / scale).round().to(torch.int8).t().contiguous(), scale


def main() -> None:
    g, u, d = (torch.randn(M, N, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    head = slice(0, 64)
    want = ops.quantize(activations.value("silu", g[head], u[head]), impl="reference")
    assert differing(activation(g, u, kind="silu", rows=True)[0][head], want[0]) == 0
    copied = torch.empty_like(g)
    bandwidth = 4e-6 * M * N / milliseconds(graphed(lambda: copied.copy_(g)))
    rows: list[dict[str, object]] = [
        {"work": "copy", "kernel": "copy", "us": 4e-3 * M * N / bandwidth, "GB/s": bandwidth, "share": 1.0}
    ]
    seed = torch.tensor(7, device="cuda")
    # work, what runs, and the bytes an element that each kernel moves
    works = (
        ("rows", lambda: ops.quantize(g), {"_quantize_kernel": 3}),
        ("rows and columns", lambda: ops.quantize_both(g), {"_absmax_kernel": 2, "_both_kernel": 4}),
        ("rows and columns, stochastic", lambda: ops.quantize_both(g, seed=seed), {"_both_kernel": 4}),
        ("rows of silu(g) * u", lambda: activation(g, u, kind="silu", rows=True), {"_activation_rows_kernel": 5}),
        ("both of silu(g) * u", lambda: activation(g, u, kind="silu", rows=True, columns=True),
         {"_absmax_kernel": 4, "_both_kernel": 6}),
        ("gradients of silu(g) * u, both", lambda: activation(g, u, d, kind="silu", rows=True, columns=True),
         {"_absmax_kernel": 6, "_both_kernel": 10}),
        ("gradients of silu(g) * u, values", lambda: activation(g, u, d, kind="silu", values=True), {"_activation_rows_kernel": 10}),
    )  # fmt: skip
    for work, run, kernels in works:
        times = kernel_microseconds(run)
        for kernel, size in kernels.items():
            speed = 1e-3 * size * M * N / times[kernel]
            rows.append({"work": work, "kernel": kernel, "us": times[kernel], "GB/s": speed, "share": speed / bandwidth})
    for work, peer in (("rows, Inductor", inductor_rows), ("transposed columns alone, Inductor", inductor_columns)):
        took = sum(kernel_microseconds(lambda peer=peer: peer(g)).values())
        rows.append({"work": work, "kernel": "all", "us": took, "GB/s": 3e-3 * M * N / took, "share": 3e-3 * M * N / took / bandwidth})
    save("quantize", rows, output_folder(__doc__))


if __name__ == "__main__":
    main()
