"""INT8 GEMM and eager INT8 linear on a GPU, against bf16 cuBLAS in the same run, as ratios.

python benchmarks/gpu_linear.py [--sweep] [--out FOLDER]
"""

import argparse
import pathlib

import torch
import torch.nn.functional as F
from common import RESULTS, alternating, milliseconds, save

import teint8
from teint8 import ops
from teint8.kernels.int8_mm import Config, int8_mm

GEMMS = (
    (8192, 8192, 8192),
    (16384, 14336, 4096),
    (16384, 4096, 14336),
    (4096, 4096, 4096),
    (2048, 4096, 4096),
    (512, 4096, 4096),
)
SMALL = ((128, 4096, 4096), (16, 4096, 4096), (1, 4096, 4096))
CANDIDATES = [
    Config(bm, bn, bk, warps, stages)
    for bm, bn, bk, warps, stages in (
        (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 4),
        (64, 256, 128, 4, 3), (64, 128, 128, 4, 4), (64, 128, 256, 4, 3), (64, 64, 128, 4, 5), (64, 64, 256, 4, 4), (32, 64, 256, 4, 4),
        (16, 64, 256, 4, 4), (16, 32, 512, 4, 4), (16, 128, 256, 4, 3), (16, 64, 512, 8, 3), (128, 256, 128, 8, 4),
    )
]  # fmt: skip


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    x, w = (torch.randn(r, k, device="cuda", dtype=torch.bfloat16) for r in (m, n))
    (xq, xs), (wq, ws) = ops.quantize(x), ops.quantize(w)
    return x, w, xq, xs, wq, ws


def gemm_rows() -> list[dict[str, object]]:
    rows = []
    for m, n, k in (*GEMMS, *SMALL):
        x, w, xq, xs, wq, ws = operands(m, n, k)
        head = slice(0, min(m, 256))
        got, want = (
            ops.int8_mm(xq, xs, wq, ws, None, x.dtype),
            ops.int8_mm(xq[head], xs[head], wq, ws, None, x.dtype, "reference"),
        )
        wrong = int((got[head] != want).sum())
        assert wrong == 0, f"{wrong} elements differ from the contract at {(m, n, k)}"
        runs = {
            "bf16": lambda: F.linear(x, w),
            "int8": lambda: ops.int8_mm(xq, xs, wq, ws, None, x.dtype),
        }
        took = alternating(runs)
        tera = 2e-9 * m * n * k
        rows.append({"M": m, "N": n, "K": k, "bf16 ms": took["bf16"], "int8 ms": took["int8"], "bf16 TFLOPS": tera / took["bf16"],
                     "int8 TOPS": tera / took["int8"], "int8 / bf16": took["bf16"] / took["int8"]})  # fmt: skip
    return rows


def linear_rows() -> list[dict[str, object]]:
    """Eager nn.Linear under te_int8_autocast, quantization of the activations included."""
    rows = []
    for m, n, k in ((16384, 14336, 4096), (16384, 4096, 14336), (4096, 14336, 4096), (512, 14336, 4096)):
        layer = torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        ctx = teint8.te_int8_autocast(training=False)

        def int8(layer=layer, x=x, ctx=ctx) -> torch.Tensor:
            with ctx:
                return layer(x)

        with torch.inference_mode():
            exact = F.linear(x[:64].double(), layer.weight.double(), layer.bias.double())
            error = float((int8()[:64].double() - exact).norm() / exact.norm())
            assert error < 0.02, f"relative error {error}"
            took = alternating({"bf16": lambda layer=layer, x=x: layer(x), "int8": int8})
        rows.append({"tokens": m, "in": k, "out": n, "bf16 eager ms": took["bf16"], "int8 eager ms": took["int8"],
                     "int8 / bf16": took["bf16"] / took["int8"], "error": error})  # fmt: skip
    return rows


def sweep() -> None:
    """Every candidate tile at every shape, the fastest first: what the table in kernels/int8_mm.py is read off."""
    for m, n, k in (*GEMMS, *SMALL):
        x, _, xq, xs, wq, ws = operands(m, n, k)
        times = []
        for c in CANDIDATES:
            if c.block_m > 2 * max(m, 16):
                continue
            try:
                run = lambda c=c: int8_mm(xq[None], xs[None], wq[None], ws[None], None, x.dtype, c)
                times.append((milliseconds(run, 0.1), c))
            except Exception as error:  # too much shared memory for this chip
                print(tuple(c), str(error)[:80])
        best = sorted(times)[:4]
        print((m, n, k), "  ".join(f"{tuple(c)} {t:.4f} ms {2e-9 * m * n * k / t:.0f} TOPS" for t, c in best), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
    save("gpu_gemm", gemm_rows(), arguments.out)
    save("gpu_linear", linear_rows(), arguments.out)
