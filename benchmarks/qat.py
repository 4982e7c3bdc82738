"""QAT from scratch on real images, three seeds: accuracy in float, of that model in INT8, and of one trained with an INT8 forward.

python benchmarks/qat.py [--out FOLDER] [--data FOLDER]    FOLDER holds the IDX files of Fashion-MNIST (Debian's dataset-fashion-mnist
puts them under /usr/share/datasets/fashion-mnist); without them the digits of scikit-learn are what is left
"""

import argparse
import gzip
import pathlib
import statistics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import OUT, save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import teint8
from teint8.demo import SimpleTransformer

SEEDS = (0, 1, 2)
Data = tuple[Tensor, Tensor, Tensor, Tensor]


class CNN(nn.Module):
    """Two convolutions and two linears, written for floats."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(64 * 7 * 7, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


def fashion(folder: pathlib.Path) -> Data:
    """Images (N, 1, 28, 28) and labels, to train on and to test on."""

    def read(name: str, skip: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(gzip.open(folder / name).read(), np.uint8, offset=skip).copy())

    def images(name: str) -> Tensor:
        return (read(name, 16).view(-1, 1, 28, 28).float() / 255 - 0.2860) / 0.3530

    return (images("train-images-idx3-ubyte.gz"), read("train-labels-idx1-ubyte.gz", 8).long(),
            images("t10k-images-idx3-ubyte.gz"), read("t10k-labels-idx1-ubyte.gz", 8).long())  # fmt: skip


def digits() -> Data:
    found = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(found.target)))
    x, y = torch.tensor(found.images, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]
    return x[360:], y[360:], x[:360], y[:360]


def trained(make: Any, data: Data, seed: int, epochs: int, int8_from: float) -> nn.Module:
    """The same start, batches and rates; INT8 from a share of the steps on: 0 for all, 1 for none."""
    torch.manual_seed(seed)
    model, (x, y) = make(), data[:2]
    optimizer = torch.optim.Adam(model.parameters())
    batches = [b for _ in range(epochs) for b in torch.randperm(len(x)).split(128 if len(x) > 5000 else 64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(batches))
    for step, batch in enumerate(tqdm(batches, desc=f"{make.__name__}, seed {seed}, INT8 from {int8_from:.0%} on", mininterval=5)):
        optimizer.zero_grad()
        with teint8.te_int8_autocast(training=True, enabled=step >= int8_from * len(batches)):
            loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, data: Data, int8: bool) -> float:
    """Percent."""
    with torch.no_grad(), teint8.te_int8_autocast(training=False, enabled=int8):
        right = [(model(x).argmax(-1) == y).sum() for x, y in zip(data[2].split(500), data[3].split(500), strict=True)]
    return 100 * float(torch.stack(right).sum()) / len(data[3])


def rows_of(name: str, make: Any, data: Data, epochs: int) -> list[dict[str, object]]:
    found: list[dict[str, Any]] = []
    for seed in SEEDS:
        plain, late, whole = (trained(make, data, seed, epochs, share) for share in (1.0, 0.5, 0.0))
        found.append({"work": name, "seed": seed, "float": accuracy(plain, data, False),
                      "INT8 without QAT": accuracy(plain, data, True),
                      "INT8, QAT in the second half": accuracy(late, data, True),
                      "INT8, QAT throughout": accuracy(whole, data, True)})  # fmt: skip
        print(found[-1], flush=True)
    kinds = [k for k in found[0] if k not in ("work", "seed")]
    return [*found, {"work": name, "seed": "mean", **{k: statistics.mean(r[k] for r in found) for k in kinds}}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    arguments = parser.parse_args()
    rows = rows_of("digits, transformer", SimpleTransformer, digits(), 20)
    if (arguments.data / "train-images-idx3-ubyte.gz").exists():
        rows += rows_of("Fashion-MNIST, CNN", CNN, fashion(arguments.data), 2)
    else:
        print(f"no Fashion-MNIST in {arguments.data}: apt-get install dataset-fashion-mnist, or --data FOLDER")
    save("qat", rows, arguments.out)
