"""Train a classifier of digits with every matmul in INT8, forward and backward: python examples/training_loop.py [--epochs 15]."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from teint8 import Policy, Quant, Rule, te_int8_autocast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=15)
epochs = parser.parse_args().epochs

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
digits = load_digits()
order = torch.randperm(len(digits.target))
images = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order].to(device)
labels = torch.tensor(digits.target)[order].to(device)
train, test = slice(360, None), slice(0, 360)

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
batches = [batch for _ in range(epochs) for batch in torch.randperm(1437, device=device).split(64)]
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(batches))

# the output layer keeps a float backward; everywhere else gradients are rounded stochastically, and dX and dW run in INT8
policy = Policy([Rule("4.*"), Rule(gradient=Quant(rounding="stochastic"))])
for batch in (progress := tqdm(batches)):
    optimizer.zero_grad()
    with te_int8_autocast(training=True, policy=policy) as ctx:
        loss = nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])
    loss.backward()
    optimizer.step()
    schedule.step()
    progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

print(ctx.receipt)
model.eval()
with torch.no_grad(), te_int8_autocast(training=False, policy=policy):
    accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean().item()
print(f"accuracy in INT8: {accuracy:.1%}")
