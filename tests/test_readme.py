"""The README's code runs."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_every_block_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})


def test_every_block_of_the_page_about_compiled_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/compile.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})


def test_every_block_of_the_page_about_accuracy_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/accuracy.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})
    plain, ready, static, better = (float(word) for word in capsys.readouterr().out.split() if re.fullmatch(r"0\.\d+", word))
    assert better < ready < 0.5 * plain and static < plain


def test_every_figure_is_the_one_that_a_benchmark_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from tables import OF_ACCURACY, rows_of, with_tables

    text = (ROOT / "README.md").read_text()
    assert with_tables(text) == text  # python benchmarks/tables.py writes the tables
    page = (ROOT / "docs/accuracy.md").read_text()
    assert with_tables(page, OF_ACCURACY) == page
    wanted = [f"{r['work']}, {r['way']} {r['to bf16 compiled']:.2f}x" for r in rows_of("block") if r["way"] in ("module", "fused")]
    above = {r["call"]: r["above F.linear"] for r in rows_of("overhead")}
    wanted.append(f"{above['ops.linear, packed']:.0f} us more than `F.linear`")
    wanted.append(f"{above['F.linear in a context']:.0f} us in a context")
    means = json.loads((ROOT / "benchmarks/results/conv.json").read_text())["means"]
    wanted.append(f"{means['to cudnn']:.2f}x of cuDNN's bf16; with the quantization of a bf16 input inside "
                  f"{means['with quantization, to cudnn']:.2f}x")  # fmt: skip
    norms = {(r["norm"], r["way"]): r for r in rows_of("norm_linear")}
    layer, rms = (norms[kind, "INT8 fused"] for kind in ("layer", "rms"))
    wanted.append(f"{layer['to the pair']:.2f}x (LayerNorm) and {rms['to the pair']:.2f}x (RMSNorm)")
    wanted.append(f"{layer['to bf16']:.2f}x and {rms['to bf16']:.2f}x of bf16")
    share = {r["what"]: r["to bf16"] for r in rows_of("memory")}
    wanted.append(f"take {share['weights, bf16 to packed']:.2f} of bf16's bytes")
    peak = {r["what"]: r["MB"] for r in rows_of("memory")}
    wanted.append(f"INT8 training step is {share['peak of a step, int8 fused']:.2f} of eager")
    wanted.append(f"{peak['peak of a step, int8 fused'] / peak['peak of a step, bf16 compiled']:.2f} of compiled bf16's")
    cosine = {(r["method"], r["activation"]): r["mean"] for r in rows_of("accuracy_minilm")}
    wanted.append(f"mean cosine {cosine['plain', 'static, absmax']:.3f} plain, {cosine['smooth, rotate', 'static, mse']:.4f} so")
    ratio = {(r["method"], r["activation"]): r["perplexity"] for r in rows_of("accuracy_smollm2")}
    wanted.append(f"perplexity {ratio['plain', 'static, absmax']:.2f}x of float's")
    wanted.append(f"as they are, {ratio['smooth, rotate', 'static, mse']:.3f}x so")
    text = " ".join(text.split())
    assert [line for line in wanted if line not in text] == []
    ratios = [r["to floats"] for r in rows_of("compile_times") if r["compiled"] != "floats"]
    speed = next(r["to int8 eager"] for r in rows_of("cpu_compile") if r["way"] == "int8 compiled")
    page = (ROOT / "docs/compile.md").read_text()
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in page and f"{speed:.2f} times as fast" in page


def test_the_tables_of_the_docs_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    assert f"{tables.BEGIN}\n\n{tables.render()}\n\n{tables.END}" in tables.PAGE.read_text()
