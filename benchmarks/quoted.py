"""The figures that pages quote within a sentence: each is looked up in the JSON that its benchmark wrote.

A page writes ``<!-- f:NAME -->1.80x<!-- / -->``; ``tables.py`` puts the figure there, and tests/test_readme.py holds it to the JSON.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from common import RESULTS

H200 = RESULTS / "h200"
"""What a second card measured."""


def rows_of(name: str, folder: pathlib.Path = RESULTS) -> list[dict[str, Any]]:
    """The rows that a benchmark wrote."""
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["rows"]
    return rows


def times(ratio: float | None, digits: int = 2) -> str:
    """A ratio of times."""
    return "" if ratio is None else f"{ratio:.{digits}f}x"


def value(name: str, column: str, folder: pathlib.Path = RESULTS, **wanted: Any) -> float:
    """The one value of a column in the row with these values."""
    found = [r[column] for r in rows_of(name, folder) if all(r[k.replace("_", " ")] == v for k, v in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{name}: {len(found)} rows with {wanted}; one is needed")
    return float(found[0])


def _step(step: str, column: str = "to bf16 compiled") -> float:
    return value("train_step", column, tokens=16384, step=step)


def _of(name: str, field: str) -> str:
    return str(json.loads((RESULTS / f"{name}.json").read_text())[field])


def _means(column: str) -> float:
    return float(json.loads((RESULTS / "conv.json").read_text())["means"][column])


def _linear_of_4096() -> float:
    return value("linear", "to bf16", tokens=4096, way="int8 module", out=14336)


def _range(name: str, column: str, digits: int = 2, **wanted: Any) -> str:
    values = [r[column] for r in rows_of(name) if all(r[k] == v for k, v in wanted.items())]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _range_of_many() -> str:
    values = [r["to bf16"] for r in rows_of("linear") if r["tokens"] >= 4096 and r["way"] == "int8 module"]
    return f"{min(values):.2f} to {max(values):.2f}"


def _above(call: str) -> str:
    return f"{value('overhead', 'above F.linear', call=call):.0f} us"


def _pt2e() -> float:
    ms = {way: value("cpu_compile", "ms", way=way) for way in ("torchao pt2e", "int8 compiled")}
    return ms["torchao pt2e"] / ms["int8 compiled"]


def _percent_lost(recipe: str) -> str:
    return f"{100 * (value('gpt', 'final to bf16', recipe=recipe) - 1):.1f}%"


_NORMED = "INT8, the norm's codes"
FIGURES: dict[str, Callable[[], str]] = {
    "train_fused": lambda: times(_step("int8 fused")),
    "train_module": lambda: times(_step("int8 module")),
    "train_error": lambda: f"{_step('int8 fused', 'gradient error'):.3f}",
    "train_qat": lambda: times(_step("qat fused")),
    "train_torchao_int8": lambda: times(_step("torchao int8")),
    "train_torchao_qat": lambda: times(_step("torchao qat")),
    "train_torchao_fp8": lambda: times(_step("torchao fp8 tensorwise")),
    "train_torchao_fp8_error": lambda: f"{_step('torchao fp8 tensorwise', 'gradient error'):.3f}",
    "linear_4096": lambda: times(_linear_of_4096()),
    "linear_many": lambda: f"{_range_of_many()} times",
    "linear_512": lambda: times(value("linear", "to bf16", tokens=512, way="int8 module")),
    "mlp_fused": lambda: times(value("mlp", "to compiled", tokens=16384, way="int8 fused")),
    "mlp_torchao_w8a8": lambda: times(value("mlp", "to compiled", tokens=16384, way="torchao w8a8")),
    "mlp_torchao_fp8": lambda: times(value("mlp", "to compiled", tokens=16384, way="torchao fp8")),
    "decode_1": lambda: times(value("decode", "to bf16", tokens=1, way="int8 fused")),
    "decode_1_torchao": lambda: times(value("decode", "to bf16", tokens=1, way="torchao int8 weights")),
    "weights": lambda: f"{value('memory', 'to bf16', what='weights, bf16 to packed'):.2f}",
    "conv": lambda: times(_means("to cudnn")),
    "conv_quantized": lambda: times(_means("with quantization, to cudnn")),
    "above_context": lambda: _above("F.linear in a context"),
    "above_module": lambda: _above("nn.Linear in a context"),
    "nearest": lambda: _percent_lost("int8 nearest"),
    "stochastic": lambda: times(value("gpt", "final to bf16", recipe="int8 stochastic"), 3),
    "minilm_plain": lambda: f"{value('accuracy_minilm', 'mean', method='plain', activation='static, absmax'):.3f}",
    "minilm_token": lambda: f"{value('accuracy_minilm', 'mean', method='plain', activation='a scale a token'):.4f}",
    "minilm_best": lambda: f"{value('accuracy_minilm', 'mean', method='smooth, rotate', activation='static, mse'):.4f}",
    "smollm_plain": lambda: times(value("accuracy_smollm2", "perplexity", method="plain", activation="static, absmax")),
    "smollm_best": lambda: times(value("accuracy_smollm2", "perplexity", method="smooth, rotate", activation="static, mse"), 3),
    "compile_times": lambda: f"{_compile_times()} times",
    "cpu_device": lambda: _of("cpu_minilm", "device"),
    "cpu_date": lambda: _of("cpu_minilm", "date"),
    "cpu_compile": lambda: f"{value('cpu_compile', 'to int8 eager', way='int8 compiled'):.2f} times",
    "cpu_pt2e": lambda: f"{_pt2e():.2f} times",
    "cpu_pt2e_error": lambda: f"{value('cpu_compile', 'error', way='torchao pt2e'):.3f}",
    "cpu_int8_error": lambda: f"{value('cpu_compile', 'error', way='int8 compiled'):.3f}",
    "cpu_bf16": lambda: f"{_range('cpu_minilm', 'teint8 of bf16 / bf16')} times",
    "outliers_plain": lambda: f"{value('smoothing', 'largest error', step='int8'):.3f}",
    "outliers_smooth": lambda: f"{value('smoothing', 'largest error', step='int8, smoothed'):.3f}",
    "outliers_speed": lambda: times(value("smoothing", "to int8", step="int8, smoothed")),
    "outliers_fp8": lambda: f"{value('smoothing', 'largest error', step='torchao fp8 tensorwise'):.3f}",
    "norm_group": lambda: f"{_range('norm_conv', 'to the pair', norm='group', way=_NORMED)} times",
    "norm_group_bf16": lambda: f"{_range('norm_conv', 'to bf16', norm='group', way=_NORMED)} times",
    "norm_batch_bf16": lambda: times(value("norm_conv", "to bf16", norm="batch", way=_NORMED)),
    "norm_batch": lambda: times(value("norm_conv", "to the pair", norm="batch", way=_NORMED)),
    "attention_speed": lambda: f"{_range('attention', 'whole, to sdpa')} times",
}


def _compile_times() -> str:
    ratios = [r["to floats"] for r in rows_of("compile_times") if r["compiled"] != "floats"]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"
