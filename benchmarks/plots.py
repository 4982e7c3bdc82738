"""Draw the figures of the docs from the JSON in benchmarks/results: python benchmarks/plots.py [--out FOLDER]."""

import argparse
import json
import pathlib
from typing import Any

import matplotlib as mpl
from common import RESULTS

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "teint8"  # the same file for the same figures
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks" / "figures"


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return loaded


def where(found: dict[str, Any]) -> str:
    return f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, {found['date']}"


def bars(axes: Any, groups: list[str], series: dict[str, list[float | None]], title: str, label: str) -> None:
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        drawn = axes.bar(at, [v or 0 for v in values], width, label=name)
        axes.bar_label(drawn, [f"{v:.2f}" if v else "" for v in values], fontsize=6, rotation=90, padding=2)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(groups)), groups, fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=8)
    axes.margins(y=0.18)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def gemm(axes: Any) -> str:
    found = load("gemm")
    rows = found["rows"]
    series = {name: [r[f"{name} T"] and r[f"{name} T"] / r["bf16 T"] for r in rows]
              for name in ("int8", "fp8", "fp8 rowwise", "cublas int8, no epilogue")}  # fmt: skip
    bars(axes, [f"{r['M']}\n{r['N']}\n{r['K']}" for r in rows], series, "Matmul, operands quantized before", "speed to bf16")
    return where(found)


def training(axes: Any) -> str:
    found = load("train_step")
    rows = found["rows"]
    sizes = list(dict.fromkeys((r["tokens"], r["width"], r["hidden"]) for r in rows))
    ways = [w for w in dict.fromkeys(r["step"] for r in rows) if w != "bf16 compiled"]
    known = {((r["tokens"], r["width"], r["hidden"]), r["step"]): r["to bf16 compiled"] for r in rows}
    series = {way: [known.get((size, way)) for size in sizes] for way in ways}
    groups = [f"{m} tokens\n{k} to {n}" for m, k, n in sizes]
    bars(axes, groups, series, "Forward and backward of a SwiGLU MLP", "speed to compiled bf16")
    return where(found)


def decode(axes: Any) -> str:
    found = load("decode")
    rows = found["rows"]
    tokens = list(dict.fromkeys(r["tokens"] for r in rows))
    ways = [w for w in dict.fromkeys(r["way"] for r in rows) if not w.startswith("bf16")]
    known = {(r["tokens"], r["way"]): r["to bf16"] for r in rows}
    series = {way: [known.get((m, way)) for m in tokens] for way in ways}
    bars(axes, [f"{m} tokens" for m in tokens], series, "SwiGLU MLP of few tokens, CUDA graphs", "speed to bf16")
    return where(found)


def curves(axes: Any) -> str:
    found = load("gpt")
    every = found["every"]
    for recipe in dict.fromkeys(c["recipe"] for c in found["curves"]):
        seeds = [c["curve"] for c in found["curves"] if c["recipe"] == recipe]
        mean = [sum(points) / len(points) for points in zip(*seeds, strict=True)]
        axes.plot([(i + 0.5) * every for i in range(len(mean))], mean, label=recipe, linewidth=0.9)
    axes.set_title("A GPT of four layers on bytes of text, mean of three seeds", fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.legend(fontsize=7)
    return where(found)


def headline(axes: Any) -> str:
    """Three works side by side, the peers in grey."""
    mlp = {r["way"]: r["to compiled"] for r in load("mlp")["rows"] if r["tokens"] == 16384}
    step = {r["step"]: r["to bf16 compiled"] for r in load("train_step")["rows"] if r["tokens"] == 16384}
    one = {r["way"]: r["to bf16"] for r in load("decode")["rows"] if r["tokens"] == 1}
    works = (
        ("forward, 16384 tokens", mlp, ("int8 fused", "int8 module", "torchao fp8", "torchao w8a8")),
        ("training step, 16384 tokens", step,
         ("int8 fused", "int8 module", "torchao fp8 tensorwise", "torchao fp8 rowwise", "torchao int8")),
        ("one token, CUDA graph", one, ("int8 fused", "int8 weights", "torchao int8 weights", "torchao fp8")),
    )  # fmt: skip
    figure = axes.figure
    axes.remove()
    for place, (title, found, ways) in zip(figure.subplots(1, 3), works, strict=True):
        names = [w if w.startswith("torchao") else f"teint8 {w}" for w in ways]
        colors = ["#b0b4bb" if w.startswith("torchao") else "#3f51b5" for w in ways]
        drawn = place.barh(names[::-1], [found[w] for w in ways][::-1], color=colors[::-1])
        place.bar_label(drawn, [f"{found[w]:.2f}x" for w in ways][::-1], fontsize=8, padding=2)
        place.axvline(1, color="black", linewidth=0.8)
        place.set_title(title, fontsize=9)
        place.tick_params(labelsize=8)
        place.set_xlim(0, 2.4)
        place.spines[["top", "right"]].set_visible(False)
    return f"SwiGLU MLP 4096 to 14336 to 4096, speed to compiled bf16 (the line); {where(load('train_step'))}"


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (headline, gemm, training, decode, curves):
        figure, axes = plt.subplots(figsize=(10, 2.6) if draw is headline else (8, 3.6))
        figure.text(0.99, 0.005, draw(axes), ha="right", fontsize=6)
        figure.tight_layout()
        figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close(figure)
        print(folder / f"{draw.__name__}.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=FIGURES)
    main(parser.parse_args().out)
