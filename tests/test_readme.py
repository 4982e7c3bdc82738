"""The README's code runs."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_every_block_runs() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


def test_every_figure_is_the_one_that_a_benchmark_wrote() -> None:
    text = (ROOT / "README.md").read_text()
    files = [ROOT / "benchmarks/results" / f"{name}.json" for name in ("gpu_gemm", "gpu_linear", "cpu_minilm")]
    gemm, linear, minilm = (json.loads(file.read_text())["rows"] for file in files)
    wanted = [f"| {r['M']}, {r['N']}, {r['K']} | {r['int8 / bf16']:.2f}x |" for r in gemm[:6]]
    wanted += [f"{r['int8 / bf16']:.2f}x with {r['M']}" for r in gemm[6:]]
    wanted += [f"| {r['tokens']}, {r['in']}, {r['out']} | {r['int8 / bf16']:.2f}x |" for r in linear]
    for r in minilm:
        ratios = f"{r['teint8 / fp32']:.2f}x | {r['teint8 / quantize_dynamic']:.2f}x |"
        wanted.append(f"| {r['threads']} | {r['batch']} x {r['tokens']} | {ratios}")
    assert [line for line in wanted if line not in text] == []
