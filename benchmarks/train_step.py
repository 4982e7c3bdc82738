"""Forward and backward of a SwiGLU MLP: INT8 in its three recipes against bf16 and torchao, gradients checked, times and bytes kept.

python benchmarks/train_step.py [--out FOLDER]    torchao is timed where it is installed
"""

from collections.abc import Callable

import peers
import torch
from common import alternating, output_folder, relative_error, save
from mlp import SwiGLU
from torch import nn

import teint8
from teint8 import Policy, ops

SIZES = ((16384, 4096, 14336), (4096, 4096, 14336), (8192, 2048, 8192))
Step = Callable[[], torch.Tensor]


def steps(model: SwiGLU, x: torch.Tensor) -> dict[str, Step]:
    weights = (model.gate.weight, model.up.weight, model.down.weight)
    compiled = torch.compile(model)

    def module(policy: Policy) -> Step:
        def run() -> torch.Tensor:
            with teint8.te_int8_autocast(policy=policy):
                return model(x)

        return run

    return {
        "bf16 compiled": lambda: compiled(x),
        "bf16": lambda: model(x),
        "int8 fused": lambda: ops.gated_mlp(x, *weights, gradient="nearest"),
        "int8 module": module(Policy.training()),
        "int8 stochastic, fused": lambda: ops.gated_mlp(x, *weights, gradient="stochastic"),
        "switchback fused": lambda: ops.gated_mlp(x, *weights, gradient="nearest", wgrad="float"),
        "qat fused": lambda: ops.gated_mlp(x, *weights),
    }


def kept_bytes(forward: Step) -> int:
    """Bytes that a forward keeps for its backward; each storage once, weights left out."""
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values())


def rows_of(m: int, k: int, n: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    model, x = SwiGLU(k, n), torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, k, device="cuda", dtype=torch.bfloat16) * 0.01
    runs = steps(model, x)
    leaves: dict[str, list[torch.Tensor]] = {name: [x, *model.parameters()] for name in runs}
    for name, peer in (peers.training(model) if m == SIZES[0][0] else {}).items():
        runs[name] = lambda peer=peer: peer(x)
        leaves[name] = [x, *peer.parameters()]

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves[name]:
                leaf.grad = None
            runs[name]().backward(dy)

        return run

    step("bf16")()
    exact = [leaf.grad.clone() for leaf in leaves["bf16"]]  # type: ignore[union-attr]
    errors, kept = {}, {}
    for name in runs:
        step(name)()
        errors[name] = max(relative_error(leaf.grad, e) for leaf, e in zip(leaves[name], exact, strict=True))  # type: ignore[arg-type]
        kept[name] = kept_bytes(runs[name])
        assert errors[name] < 0.12, (name, errors[name])
    took = alternating({name: step(name) for name in runs}, rounds=5, seconds=0.2)
    base, fp8 = took["bf16 compiled"], took.get("torchao fp8 tensorwise")
    return [{"tokens": m, "width": k, "hidden": n, "step": name, "ms": took[name], "to bf16 compiled": base / took[name],
             "to torchao fp8": fp8 / took[name] if fp8 else None,
             "gradient error": errors[name], "kept MB": kept[name] / 1e6,
             "kept to bf16": kept[name] / kept["bf16"]} for name in runs]  # fmt: skip


if __name__ == "__main__":
    folder = output_folder(__doc__)
    save("train_step", [row for size in SIZES for row in rows_of(*size)], folder)
