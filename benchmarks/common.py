"""What every benchmark shares: timing, a table of ratios, and a JSON file with device, versions and date."""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

RESULTS = pathlib.Path(__file__).parent / "results"
"""What the docs quote: written only by ``--out benchmarks/results``."""
OUT = pathlib.Path(__file__).parent.parent / "build" / "benchmarks"


def milliseconds(run: Callable[[], Any], seconds: float = 0.4) -> float:
    """Median time of one call, after a warm-up; on a GPU by events, back to back, so that the card is at its sustained clocks."""
    for _ in range(3):
        run()
    if torch.cuda.is_available():
        return _on_gpu(run, seconds)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _on_gpu(run: Callable[[], Any], seconds: float) -> float:
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(8):
            run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 8)
    return statistics.median(times)


def graphed(run: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """So many calls as a CUDA graph's replay: what the GPU takes, without the host's part.

    A replay itself costs one to two microseconds between graphs, and the host about ten: of what takes less than a hundred put several
    calls in a graph, as a model does.
    """
    for _ in range(3):
        run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def queued_milliseconds(run: Callable[[], Any], calls: int = 16, rounds: int = 30) -> float:
    """Median time of one call on the GPU alone: the host is ahead, for the GPU has milliseconds of other work to do first."""
    other = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times: list[float] = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            torch.mm(other, other)
        first.record()
        for _ in range(calls):
            run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return statistics.median(times)


def host_microseconds(run: Callable[[], Any], calls: int = 200) -> float:
    """What the host spends on one call, the GPU's work left to itself: the fastest of five rounds."""
    for _ in range(10):
        run()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // 5):
            run()
        best = min(best, (time.perf_counter() - start) / (calls // 5))
    torch.cuda.synchronize()
    return best * 1e6


def kernel_microseconds(run: Callable[[], Any], rounds: int = 10) -> dict[str, float]:
    """Mean time on the GPU of each kernel that a call launches, by name."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    return {e.key: e.device_time_total / rounds for e in trace.key_averages() if e.device_time_total > 0}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` in float32."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements differ; NaN is NaN."""
    return int((~((a == b) | (a.isnan() & b.isnan()))).sum())


def alternating(runs: dict[str, Callable[[], Any]], rounds: int = 3, seconds: float = 0.3) -> dict[str, float]:
    """Median over rounds, each in an order of its own: what drifts drifts for all, and nothing runs always after the hottest.

    On a GPU each is warmed up for half of its time first, until the clock is the one that its own power leaves.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffled = list(runs), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            _warm_up(runs[name], seconds / 2)
            times[name].append(milliseconds(runs[name], seconds))
    return {name: statistics.median(values) for name, values in times.items()}


def _warm_up(run: Callable[[], Any], seconds: float) -> None:
    start = time.perf_counter()
    while torch.cuda.is_available() and time.perf_counter() - start < seconds:
        run()
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """Device, versions and date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "clocks": _clocks() if gpu else None,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clocks() -> str:
    """Clock, its limit, power and its limit of the card in use, as nvidia-smi tells them right after the work."""
    query = "clocks.sm,clocks.max.sm,power.draw,power.limit"
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties().uuid}", f"--query-gpu={query}", "--format=csv,noheader"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.splitlines()[0] if ran.returncode == 0 and ran.stdout else ""


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as text."""
    cells = [list(rows[0]), *[[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def save(name: str, rows: list[dict[str, Any]], folder: pathlib.Path = OUT, **more: Any) -> None:
    """Print the table and write ``folder/name.json``, with what else is given."""
    print(table(rows), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**environment(), "rows": rows, **more}, indent=1) + "\n")


def output_folder(doc: str | None) -> pathlib.Path:
    """The folder that ``--out`` names, OUT unless given."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    folder: pathlib.Path = parser.parse_args().out
    return folder
