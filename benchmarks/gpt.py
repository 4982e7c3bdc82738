"""Training curves: a GPT of four layers on bytes of real text (``pydoc_data.topics``), bf16 against the INT8 recipes, several seeds.

python benchmarks/gpt.py [--out FOLDER] [--steps 500] [--seeds 3]    the recipes run side by side, a process each

Weights and optimizer are float32, matmuls bf16 by torch.autocast or INT8 by te_int8_autocast inside of it. A seed fixes the weights
and the batches, so that recipes differ in nothing but their arithmetic. The last tenth of the text is held out.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import pathlib
import pydoc_data.topics
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from common import OUT, save
from torch import Tensor, nn

import teint8
from teint8 import Policy, Quant, Rule

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 384, 6, 4, 256, 32
EVERY = 10  # steps of which a curve's point is the mean
RECIPES: dict[str, Policy | None] = {
    "bf16": None,
    "qat": Policy.qat(),
    "switchback": Policy.switchback(),
    "int8 nearest": Policy.training(),
    "int8 stochastic": Policy([Rule(gradient=Quant(rounding="stochastic"))]),
}


class Block(nn.Module):
    """Causal attention and a GELU MLP, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes to the logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> Tensor:
    """The topics of Python's own help, as bytes."""
    whole = "\n".join(f"{name}\n{topic}" for name, topic in sorted(pydoc_data.topics.topics.items()))
    return torch.frombuffer(bytearray(whole.encode()), dtype=torch.uint8).long()


def batch(data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
    rows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def train(recipe: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: a point of the curve every EVERY steps, the last point, and the loss on held-out text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model, generator = GPT().to(device), torch.Generator().manual_seed(seed)
    data = text()
    cut = len(data) * 9 // 10
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95))  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    policy = RECIPES[recipe]

    def loss_of(source: Tensor) -> Tensor:
        x, y = (t.to(device) for t in batch(source, generator))
        quantized: Any = contextlib.nullcontext() if policy is None else teint8.te_int8_autocast(policy=policy)
        with torch.autocast(device, torch.bfloat16), quantized:
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    losses = []
    for _ in range(steps):
        loss = loss_of(data[:cut])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    curve = torch.stack(losses).cpu()
    with torch.no_grad():
        generator.manual_seed(0)
        held_out = statistics.mean(float(loss_of(data[cut:])) for _ in range(16))
    points = curve[: steps // EVERY * EVERY].view(-1, EVERY).mean(1).tolist()
    return {"recipe": recipe, "seed": seed, "final loss": float(curve[-50:].mean()), "held-out loss": held_out,
            "curve": [round(p, 4) for p in points]}  # fmt: skip


def recipe_runs(recipe: str, seeds: int, steps: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(recipe, seed, steps) for seed in range(seeds)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    side_by_side = concurrent.futures.ProcessPoolExecutor(len(RECIPES), mp_context=multiprocessing.get_context("spawn"))
    with side_by_side as pool:
        jobs = {recipe: pool.submit(recipe_runs, recipe, arguments.seeds, arguments.steps) for recipe in RECIPES}
        runs = {recipe: job.result() for recipe, job in jobs.items()}
    mean = {r: {key: statistics.mean(run[key] for run in runs[r]) for key in ("final loss", "held-out loss")} for r in RECIPES}
    rows = [{"recipe": r, "seeds": arguments.seeds, "steps": arguments.steps, **mean[r],
             "final to bf16": mean[r]["final loss"] / mean["bf16"]["final loss"],
             "held-out to bf16": mean[r]["held-out loss"] / mean["bf16"]["held-out loss"]} for r in RECIPES]  # fmt: skip
    save("gpt", rows, arguments.out, curves=[run for r in RECIPES for run in runs[r]], every=EVERY)
