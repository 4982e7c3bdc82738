"""Write the tables and figures of README.md and of the pages in docs from the JSON in benchmarks/results: python benchmarks/tables.py.

Between the markers of these pages everything comes from here; tests/test_readme.py holds it to the JSON.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

from common import RESULTS
from quoted import FIGURES, H200, rows_of, times, value

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "notebooks" not in p.parts))
# in this order; a file that another version of its script wrote shows the columns it has
NAMES = (
    "gemm",
    "quantize",
    "linear",
    "mlp",
    "decode",
    "train_step",
    "block",
    "memory",
    "overhead",
    "conv",
    "norm_linear",
    "norm_conv",
    "gpt",
    "compile",
    "compile_times",
    "cpu_compile",
    "cpu_minilm",
    "efficientnet",
    "efficientnet_agreement",
    "qat",
    "files",
    "families",
    "attention",
    "accuracy_minilm",
    "accuracy_smollm2",
    "accuracy_rounding",
    "accuracy_sensitivity",
    "smoothing",
    "lora",
)


def cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def table(name: str, folder: pathlib.Path) -> str:
    """One benchmark: what it measures, where and when, and all of its rows. Lists (curves) are left to the plots."""
    found = json.loads((folder / f"{name}.json").read_text())
    rows = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in found["rows"]]
    columns = list(rows[0])
    versions = [f"{package} {found[package.lower()]}" for package in ("torch", "Triton") if found.get(package.lower())]
    place = ", ".join([found["device"], *versions, found["date"]])
    clocks = f"; clock, its limit, power, its limit right after: {found['clocks']}" if found.get("clocks") else ""
    script = name if (pathlib.Path(__file__).parent / f"{name}.py").exists() else "compile"
    script = "norm_linear" if name == "norm_conv" else script
    script = "efficientnet" if name == "efficientnet_agreement" else "accuracy" if name.startswith("accuracy_") else script
    lines = [f"### {name}", "", f"`benchmarks/{script}.py`; {place}{clocks}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def render(folder: pathlib.Path = RESULTS) -> str:
    """All tables that have results."""
    return "\n\n".join(table(name, folder) for name in NAMES if (folder / f"{name}.json").exists())


def _gemm() -> list[list[str]]:
    rows = [[f"{r['M']}, {r['N']}, {r['K']}", times(r["to bf16"]), times(r["to fp8"])] for r in rows_of("gemm")]
    return [["M, N, K", "to bf16", "to FP8 tensorwise"], *rows]


def _inference() -> list[list[str]]:
    linear = {(r["tokens"], r["in"], r["out"], r["way"]): r["to bf16"] for r in rows_of("linear")}
    mlp = {(r["tokens"], r["way"]): r["to compiled"] for r in rows_of("mlp")}
    rows = [[f"linear {i} to {o}", str(m), times(v), "", times(linear.get((m, i, o, "torchao fp8")))]
            for (m, i, o, way), v in linear.items() if way == "int8 module"]  # fmt: skip
    rows += [["SwiGLU MLP", str(m), times(v), times(mlp[m, "int8 fused"]), times(mlp.get((m, "torchao fp8")))]
             for (m, way), v in mlp.items() if way == "int8 module"]  # fmt: skip
    return [["work", "tokens", "module", "fused", "torchao fp8"], *rows]


def _decode() -> list[list[str]]:
    few = {(r["tokens"], r["way"]): r["to bf16"] for r in rows_of("decode")}
    rows = []
    for m in dict.fromkeys(m for m, _ in few):
        peers = [f"{way.removeprefix('torchao ')} {times(v)}" for (n, way), v in few.items() if n == m and way.startswith("torchao")]
        rows.append([str(m), times(few[m, "int8 fused"]), times(few[m, "int8 weights"]), ", ".join(peers)])
    return [["tokens", "INT8", "INT8 weights, float activations", "torchao"], *rows]


def _training() -> list[list[str]]:
    shown = [r for r in rows_of("train_step") if r["tokens"] == 16384 or r["step"] in ("int8 fused", "int8 module")]
    rows = [[f"{r['tokens']}, {r['width']}, {r['hidden']}", r["step"], times(r["to bf16 compiled"]), f"{r['gradient error']:.3f}",
             f"{r['kept to bf16']:.2f}"] for r in shown]  # fmt: skip
    return [["tokens, width, hidden", "step", "to bf16", "gradient error", "kept for the backward, to eager bf16"], *rows]


def _curves() -> list[list[str]]:
    rows = [[r["recipe"], f"{r['final to bf16']:.3f}", f"{r['held-out to bf16']:.3f}"] for r in rows_of("gpt")]
    return [["recipe", "last 50 steps", "held-out text"], *rows]


def _cpu() -> list[list[str]]:
    rows = [[str(r["threads"]), f"{r['batch']} x {r['tokens']}", times(r["teint8 / fp32"]), times(r["teint8 / quantize_dynamic"]),
             times(r["bf16 ms"] / r["teint8 ms"]), times(r["teint8 of bf16 / bf16"])] for r in rows_of("cpu_minilm")]  # fmt: skip
    return [["threads", "batch x tokens", "to fp32", "to quantize_dynamic", "to bf16", "a bf16 model, to bf16"], *rows]


def _efficientnet() -> list[list[str]]:
    rows = [[r["way"], times(r["fp32 eager / it"]), ""] for r in rows_of("efficientnet")]
    rows += [[r["what"], "", f"{r['top-1 agreement']:.3f}"] for r in rows_of("efficientnet_agreement")]
    return [["", "to fp32 eager", "top-1 agreement"], *rows]


def _qat() -> list[list[str]]:
    kinds = ["float", "INT8 without QAT", "INT8, QAT in the second half", "INT8, QAT throughout"]
    rows = [[r["work"], *(f"{r[kind]:.2f}" for kind in kinds)] for r in rows_of("qat") if r["seed"] == "mean"]
    return [["", *kinds], *rows]


def _accuracy() -> list[list[str]]:
    minilm = {(r["method"], r["activation"]): r for r in rows_of("accuracy_minilm")}
    smol = {(r["method"], r["activation"]): r for r in rows_of("accuracy_smollm2")}
    rows = []
    for key, r in minilm.items():
        if key[1] in ("a scale a token", "static, absmax", "static, mse"):
            s = smol[key]
            rows.append([*key, f"{r['mean']:.4f}", f"{r['least']:.4f}", f"{s['perplexity']:.3f}x", f"{100 * s['top-1']:.1f}%"])
    return [["method", "activation", "MiniLM: mean cosine", "least", "SmolLM2: perplexity", "same first choice"], *rows]


def _rounding() -> list[list[str]]:
    rows = [
        [r["method"], r["granularity"], f"{r['error to nearest']:.2f}", f"{r['worst layer']:.2f}"] for r in rows_of("accuracy_rounding")
    ]
    return [["method", "weight's scales by", "error", "worst layer"], *rows]


def _lora() -> list[list[str]]:
    rows = [[r["weights"], f"{r['loss first']:.3f}", f"{r['loss last']:.3f}", f"{r['gradient error']:.3f}", f"{r['weights MB']:.0f}",
             f"{r['kept MB']:.0f}"] for r in rows_of("lora")]  # fmt: skip
    return [["frozen weights", "first loss", "last", "adapters' gradient error", "MB of weights", "MB kept for the backward"], *rows]


def _compiled() -> list[list[str]]:
    rows = [[r["work"], r["way"], times(r["to bf16 compiled"])] for r in rows_of("compile") if r["way"].startswith("int8")]
    return [["work", "way", "to compiled bf16"], *rows]


def _headline() -> list[list[str]]:
    """What the README shows: the page of the benchmarks has every row."""
    gemm = next(r for r in rows_of("gemm") if (r["M"], r["N"], r["K"]) == (8192, 8192, 8192))
    f = {name: make() for name, make in FIGURES.items()}
    return [
        ["one H100", "teint8", "torchao INT8", "torchao FP8"],
        ["matmul 8192 cubed, to cuBLAS bf16", times(gemm["to bf16"]), "", f"{times(gemm['to bf16'] / gemm['to fp8'])} (cuBLAS FP8)"],
        ["SwiGLU MLP forward, 16384 tokens, to compiled bf16", f["mlp_fused"], f["mlp_torchao_w8a8"], f["mlp_torchao_fp8"]],
        ["the same MLP, one token, CUDA graphs", f["decode_1"], f"{f['decode_1_torchao']} (weights alone)", ""],
        ["training step, all matmuls in 8 bits, to compiled bf16", f["train_fused"], f["train_torchao_int8"], f["train_torchao_fp8"]],
        ["its largest gradient error", f["train_error"], "", f["train_torchao_fp8_error"]],
        ["QAT step (INT8 forward, float backward)", f["train_qat"], f["train_torchao_qat"], ""],
    ]


def _cards() -> list[list[str]]:
    """What there is of two cards: name of the benchmark, column, row."""
    wanted: list[tuple[str, str, str, dict[str, Any]]] = [
        ("matmul 8192 cubed, to cuBLAS bf16", "gemm", "to bf16", {"M": 8192, "N": 8192}),
        ("the same, to cuBLAS FP8", "gemm", "to fp8", {"M": 8192, "N": 8192}),
        ("SwiGLU MLP forward, 16384 tokens, fused", "mlp", "to compiled", {"tokens": 16384, "way": "int8 fused"}),
        ("SwiGLU MLP, one token, CUDA graphs", "decode", "to bf16", {"tokens": 1, "way": "int8 fused"}),
        ("training step, 16384 tokens, all matmuls INT8", "train_step", "to bf16 compiled", {"tokens": 16384, "step": "int8 fused"}),
        ("compiled: MLP forward, 16384 tokens", "compile", "to bf16 compiled", {"work": "MLP forward, 16384 tokens"}),
        ("compiled: MLP step, 16384 tokens", "compile", "to bf16 compiled", {"work": "MLP step, 16384 tokens"}),
        ("compiled: Llama block forward, 16384 tokens", "compile", "to bf16 compiled", {"work": "block forward, 16384 tokens"}),
        ("compiled: Llama block step, 16384 tokens", "compile", "to bf16 compiled", {"work": "block step, 16384 tokens"}),
        ("compiled: 8 MLPs in a row, one token", "compile", "to bf16 compiled", {"work": "8 MLPs in a row, 1 token, reduce-overhead"}),
    ]
    rows = []
    for work, name, column, which in wanted:
        if not (H200 / f"{name}.json").exists():
            continue
        which |= {"way": "int8 compiled"} if name == "compile" else {}
        rows.append([work, *(times(value(name, column, folder, **which)) for folder in (RESULTS, H200))])
    return [["to bf16, compiled where it can be", "H100", "H200"], *rows]


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "headline": _headline, "gemm": _gemm, "inference": _inference, "decode": _decode, "training": _training, "curves": _curves,
    "cpu": _cpu, "efficientnet": _efficientnet, "qat": _qat, "compiled": _compiled, "accuracy": _accuracy, "rounding": _rounding,
    "lora": _lora, "cards": _cards,
}  # fmt: skip
"""The tables of pages by the name in their markers, their first rows the heads."""

_TABLE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end of \1 -->", re.DOTALL)
_FIGURE = re.compile(r"<!-- f:(\w+) -->.*?<!-- / -->", re.DOTALL)


def _table_of(found: re.Match[str]) -> str:
    name = found[1]
    if name in ("tables", "tables_h200"):
        body = render(RESULTS if name == "tables" else H200)
    else:
        head, *rows = ["| " + " | ".join(cells) + " |" for cells in _known(TABLES, name)()]
        body = "\n".join([head, "|" + "---|" * (head.count(" | ") + 1), *rows])
    return f"<!-- {name} -->\n\n{body}\n\n<!-- end of {name} -->"


def _figure_of(found: re.Match[str]) -> str:
    return f"<!-- f:{found[1]} -->{_known(FIGURES, found[1])()}<!-- / -->"


def _known(makers: dict[str, Callable[[], Any]], name: str) -> Callable[[], Any]:
    if name not in makers:
        raise ValueError(f"a page has a marker {name!r}, which is none of {', '.join(makers)}")
    return makers[name]


def rendered(text: str) -> str:
    """A page with its tables and figures as they are to be."""
    return _FIGURE.sub(_figure_of, _TABLE.sub(_table_of, text))


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text()))


if __name__ == "__main__":
    main()
