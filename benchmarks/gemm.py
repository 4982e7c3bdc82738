"""INT8 matmul with its epilogue against bf16, FP8 and INT8 of cuBLAS on a GPU, operands already quantized; CUDA-graph replays.

Of small shapes (under 1e11 operations) a graph holds twenty calls; the ratio to FP8 of graphs of one call stands beside it.

python benchmarks/gemm.py [--out FOLDER] [--sweep]
"""

import argparse
import pathlib

import torch
import torch.nn.functional as F
from common import OUT, alternating, differing, graphed, milliseconds, save

from teint8 import ops
from teint8.kernels import hopper

SHAPES = (
    (8192, 8192, 8192), (16384, 14336, 4096), (16384, 4096, 14336), (4096, 4096, 4096), (2048, 4096, 4096), (512, 4096, 4096),
    (128, 4096, 4096), (16, 4096, 4096),
)  # fmt: skip


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    x, w = (torch.randn(r, k, device="cuda", dtype=torch.bfloat16) for r in (m, n))
    return x, w, *ops.quantize(x), *ops.quantize(w)


def row(m: int, n: int, k: int) -> dict[str, object]:
    x, w, xq, xs, wq, ws = operands(m, n, k)
    got = ops.int8_mm(xq, xs, wq, ws, None, x.dtype)
    parts = (slice(i, i + 2048) for i in range(0, m, 2048))
    wrong = sum(differing(got[p], ops.int8_mm(xq[p], xs[p], wq, ws, None, x.dtype, "reference")) for p in parts)
    assert wrong == 0, f"{wrong} elements differ from the contract at {(m, n, k)}"
    fx, fw, one = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    ones = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")

    def fp8(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(fx, fw.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=True)

    runs = {
        "bf16": lambda: F.linear(x, w),
        "fp8": lambda: fp8(one, one),
        "fp8 rowwise": lambda: fp8(*ones),
        "int8": lambda: ops.int8_mm(xq, xs, wq, ws, None, x.dtype),
    }
    if m > 16:
        runs["cublas int8, no epilogue"] = lambda: torch._int_mm(xq, wq.t())
    calls = 20 if 2 * m * n * k < 1e11 else 1
    took = alternating({name: graphed(run, calls) for name, run in runs.items()}, rounds=5, seconds=0.1)
    alone = took if calls == 1 else alternating({name: graphed(runs[name]) for name in ("fp8", "int8")}, rounds=5, seconds=0.1)
    tera = 2e-9 * m * n * k * calls
    speeds = {f"{name} T": round(tera / took[name], 1) if name in took else None for name in (*runs, "cublas int8, no epilogue")}
    return {"M": m, "N": n, "K": k, **speeds, "to bf16": took["bf16"] / took["int8"], "to fp8": took["fp8"] / took["int8"],
            "calls in a graph": calls, "to fp8, a graph a call": alone["fp8"] / alone["int8"]}  # fmt: skip


def sweep() -> None:
    """Every tile at every shape, the fastest first: what RATES in kernels/hopper.py are read off."""
    for m, n, k in SHAPES:
        x, _, xq, xs, wq, ws = operands(m, n, k)
        times = []
        for name, tile in hopper.TILES.items():
            run = graphed(lambda tile=tile: hopper.int8_mm(xq, xs, wq, ws, None, x.dtype, tile=tile, split=1))
            times.append((milliseconds(run, 0.1), name))
        print((m, n, k), "  ".join(f"{name} {2e-9 * m * n * k / t:.0f}" for t, name in sorted(times)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
    save("gemm", [row(*shape) for shape in SHAPES], arguments.out)
