"""The README's code runs."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_every_block_runs() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


def test_every_figure_is_the_one_that_a_benchmark_wrote() -> None:
    text = (ROOT / "README.md").read_text()
    names = ("gemm", "mlp", "decode", "train_step", "gpt", "block", "memory", "overhead", "cpu_minilm")
    files = [ROOT / "benchmarks/results" / f"{name}.json" for name in names]
    gemm, mlp, decode, steps, gpt, block, memory, overhead, minilm = (json.loads(file.read_text())["rows"] for file in files)
    wanted = [f"| {r['M']}, {r['N']}, {r['K']} | {r['to bf16']:.2f}x | {r['to fp8']:.2f}x |" for r in gemm]
    wanted += [f"| {r['work']} | {r['tokens']} | {r['module to bf16']:.2f}x |" for r in mlp]
    wanted += [f"{r['fused to compiled']:.2f}x |" for r in mlp if r["fused to compiled"]]
    few = {(r["tokens"], r["way"]): r["to bf16"] for r in decode}
    wanted += [f"| {m} | {few[m, 'int8 fused']:.2f}x | {few[m, 'int8 weights']:.2f}x |" for m in (1, 4, 16, 64, 512)]
    wanted += [f"{way.removeprefix('torchao ')} {ratio:.2f}x" for (_, way), ratio in few.items()
               if way.startswith("torchao") and ratio > 0.1]  # one call took 0.2 s: no peer  # fmt: skip
    wanted += [f"{r['hidden']} | {r['step']} | {r['to bf16 compiled']:.2f}x | {r['gradient error']:.3f} | {r['kept to bf16']:.2f} |"
               for r in steps if r["tokens"] == 16384 or r["step"] in ("int8 fused", "int8 module")]  # fmt: skip
    wanted += [f"| {r['recipe']} | {r['final to bf16']:.3f} | {r['held-out to bf16']:.3f} |" for r in gpt]
    wanted += [f"{r['work']}, {r['way']} {r['to bf16 compiled']:.2f}x" for r in block if r["way"] in ("module", "fused")]
    above = {r["call"]: r["above F.linear"] for r in overhead}
    wanted.append(f"{above['ops.linear, packed']:.0f} us more than `F.linear`")
    wanted.append(f"{above['F.linear in a context']:.0f} us in a context")
    share = {r["what"]: r["to bf16"] for r in memory}
    wanted.append(f"take {share['weights, bf16 to packed']:.2f} of bf16's bytes")
    peak = {r["what"]: r["MB"] for r in memory}
    wanted.append(f"INT8 training step is {share['peak of a step, int8 fused']:.2f} of eager")
    wanted.append(f"{peak['peak of a step, int8 fused'] / peak['peak of a step, bf16 compiled']:.2f} of compiled bf16's")
    for r in minilm:
        ratios = f"{r['teint8 / fp32']:.2f}x | {r['teint8 / quantize_dynamic']:.2f}x |"
        wanted.append(f"| {r['threads']} | {r['batch']} x {r['tokens']} | {ratios}")
    assert [line for line in wanted if line not in text] == []


def test_the_tables_of_the_docs_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    assert f"{tables.BEGIN}\n\n{tables.render()}\n\n{tables.END}" in tables.PAGE.read_text()
