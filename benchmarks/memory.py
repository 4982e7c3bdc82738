"""Bytes on a GPU: packed weights, and the peak of a training step of a SwiGLU MLP, against bf16.

python benchmarks/memory.py [--out FOLDER]    what a forward keeps for its backward is in benchmarks/train_step.py
"""

import peers
import torch
from common import output_folder, save
from mlp import SwiGLU
from train_step import SIZES, steps

import teint8

RUNS = ("bf16", "bf16 compiled", "int8 module", "int8 fused", "qat fused")


def weights() -> dict[str, object]:
    model = SwiGLU(4096, 14336)
    params = dict(model.named_parameters())
    packed = teint8.pack(teint8.quantize(model), params)
    floats = sum(p.nbytes for p in params.values())
    return {"what": "weights, bf16 to packed", "MB bf16": floats / 1e6, "MB": sum(w.nbytes for w in packed.values()) / 1e6,
            "to bf16": sum(w.nbytes for w in packed.values()) / floats}  # fmt: skip


def peaks() -> list[dict[str, object]]:
    """Peak above what is allocated before the step: activations, gradients, codes."""
    m, k, n = SIZES[0]
    model, x = SwiGLU(k, n), torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    runs, found = steps(model, x), {}
    leaves = {name: [x, *model.parameters()] for name in RUNS}
    for name, peer in peers.training(model, "torchao fp8 tensorwise", "torchao qat").items():
        runs[name], leaves[name] = (lambda peer=peer: peer(x)), [x, *peer.parameters()]
    for name in leaves:
        for _ in range(2):  # the first compiles
            for leaf in leaves[name]:
                leaf.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            runs[name]().backward(dy)
            torch.cuda.synchronize()
            found[name] = torch.cuda.max_memory_allocated() - before
    return [{"what": f"peak of a step, {name}", "MB bf16": found["bf16"] / 1e6, "MB": found[name] / 1e6,
             "to bf16": found[name] / found["bf16"]} for name in found]  # fmt: skip


if __name__ == "__main__":
    save("memory", [weights(), *peaks()], output_folder(__doc__))
