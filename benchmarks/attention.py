"""INT8 attention against torch's scaled_dot_product_attention in bf16, normal values; CUDA-graph replays.

python benchmarks/attention.py [--out FOLDER]    "kernel": codes in, bf16 out; "whole": bf16 in and out, quantization included
"""

import math

import torch
import torch.nn.functional as F
from common import alternating, differing, graphed, output_folder, relative_error, save

from teint8 import ops
from teint8.ops.raw_attention import int8_attention

HEADS, TOKENS = 16, 32768


def row(s: int, d: int, causal: bool) -> dict[str, object]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(TOKENS // s, HEADS, s, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    codes = (*ops.quantize(q), *ops.quantize(k), *ops.quantize(v.mT))

    def alone(codes: tuple[torch.Tensor, ...] = codes, impl: str = "") -> torch.Tensor:
        y: torch.Tensor = int8_attention(*codes, None, causal, d**-0.5, q.dtype, impl)  # type: ignore[call-arg, arg-type]
        return y

    rows = slice(0, 256)  # of one head: scores of all would not fit
    part = tuple(t[:1, :1, rows] if i < 2 else t[:1, :1] for i, t in enumerate(codes))
    y = alone()[:1, :1, rows]
    wrong = differing(y, alone(part, "reference"))
    assert wrong == 0, f"{wrong} elements differ from the contract at {(s, d, causal)}"
    scores = (q[:1, :1, rows].double() @ k[:1, :1].double().mT) / math.sqrt(d)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").tril(), -math.inf)
    error = relative_error(y, scores.softmax(-1) @ v[:1, :1].double())
    assert error < 0.02, error
    runs = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "kernel": alone,
        "whole": lambda: ops.attention(q, k, v, is_causal=causal),
    }
    took = alternating({name: graphed(run) for name, run in runs.items()}, rounds=3, seconds=0.05)
    base = took["sdpa"]
    return {"keys": s, "width": d, "causal": causal, "sdpa bf16 ms": base, "kernel, to sdpa": base / took["kernel"],
            "whole, to sdpa": base / took["whole"], "error": error}  # fmt: skip


if __name__ == "__main__":
    with torch.no_grad():
        sizes = [(s, d, causal) for d in (64, 128) for causal in (False, True) for s in (1024, 4096, 16384, 32768)]
        save("attention", [row(*size) for size in sizes], output_folder(__doc__))
