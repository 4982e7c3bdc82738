"""Quantization kernels against a copy of the same memory: the share of copy bandwidth over the bytes that each must move.

python benchmarks/quantize.py [--out FOLDER]
"""

import torch
from common import differing, kernel_microseconds, output_folder, save

from teint8 import ops
from teint8.ops.raw_both import activation
from teint8.ops.rotation import conditioned_codes

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


def check(g: torch.Tensor, u: torch.Tensor, d: torch.Tensor) -> None:
    """Every result against the reference, in parts of the tensors that leave the reference room."""
    seed, reference = torch.tensor(7, device="cuda"), next(i for i in ops.implementations("rotate") if i.name == "reference")
    part = slice(0, 1024)
    small = [t[part, part] for t in (g, u, d)]
    for tensors in (small, [t.contiguous() for t in small], [t[part] for t in (g, u, d)]):
        got: list[torch.Tensor] = []
        want: list[torch.Tensor] = []
        for impl, out in (("", got), ("reference", want)):
            first, second, third = tensors
            out += ops.quantize(first, impl=impl)
            out += ops.quantize_both(first, impl=impl) + ops.quantize_both(first, seed=seed, impl=impl)
            for grad in (None, third):
                for how in ({"rows": True}, {"rows": True, "columns": True}, {"values": True}):
                    out += activation(first, second, grad, kind="silu", impl=impl, **how)
        for powers, block in ((None, 1024), (torch.exp2(torch.arange(first.shape[1], device="cuda") % 5 - 2.0), 0)):
            got += conditioned_codes(first, powers, block)
            want += reference.run(first, powers, block, True, None)
        assert [differing(a, b) for a, b in zip(got, want, strict=True)] == [0] * len(want)


def main() -> None:
    g, u, d = (torch.randn(M, N, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    check(g, u, d)
    copied = torch.empty_like(g)
    bandwidth = 4e-3 * M * N / sum(kernel_microseconds(lambda: copied.copy_(g)).values())  # timed as the kernels are
    rows: list[dict[str, object]] = [
        {"work": "copy", "kernel": "copy", "us": 4e-3 * M * N / bandwidth, "GB/s": bandwidth, "share": 1.0}
    ]
    seed, powers = torch.tensor(7, device="cuda"), torch.exp2(torch.arange(N, device="cuda") % 5 - 2.0)
    # work, what runs, and the bytes an element that each kernel moves
    works = (
        ("rows", lambda: ops.quantize(g), {"_quantize_kernel": 3}),
        ("rows, stochastic", lambda: ops.quantize(g, seed=seed), {"_quantize_kernel": 3}),
        ("rows rotated by 1024", lambda: conditioned_codes(g, None, 1024), {"_rotate_kernel": 3}),
        ("rows divided by powers of two", lambda: conditioned_codes(g, powers, 0), {"_rotate_kernel": 3}),
        ("rows and columns", lambda: ops.quantize_both(g), {"_absmax_kernel": 2, "_both_kernel": 4}),
        ("rows and columns, stochastic", lambda: ops.quantize_both(g, seed=seed), {"_absmax_kernel": 2, "_both_kernel": 4}),
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
