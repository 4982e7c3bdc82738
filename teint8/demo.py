"""The demo: a transformer like the quick start's, wider, on scikit-learn's real digits; float, INT8 as it is, QAT, INT8 after QAT."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import teint8


class SimpleTransformer(nn.Module):
    """A classifier of images read row by row: nothing in it knows of INT8."""

    def __init__(self, d_model: int = 128, nhead: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.rows = nn.Linear(8, d_model)
        self.position = nn.Parameter(torch.randn(8, d_model) * 0.02)
        layer = nn.TransformerEncoderLayer(d_model, nhead, d_model * 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers)
        self.output_layer = nn.Linear(d_model, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 8, 8) to logits (B, 10)."""
        memory = self.encoder(self.rows(images) + self.position)
        logits: Tensor = self.output_layer(memory[:, 0, :])
        return logits


def run(epochs: int) -> int:
    """Train, quantize, fine-tune, compare; returns 0 if training and serving gave the same bits."""
    try:
        from sklearn.datasets import load_digits
        from tqdm import tqdm
    except ImportError as error:
        print(f"The demo needs {error.name}: pip install 'transformer-engine-int8[demo]'", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = (torch.tensor(digits.images, dtype=torch.float32) / 16).to(device)[order]
    labels = torch.tensor(digits.target).to(device)[order]
    train, test = (images[360:], labels[360:]), (images[:360], labels[:360])
    model = SimpleTransformer().to(device)
    print(f"{len(train[0])} images of handwritten digits to train on, {len(test[0])} to test on, {device}")

    _fit(model, train, epochs, 1e-3, "float", tqdm, enabled=False)
    rows = [_row("float", model, test, enabled=False), _row("INT8 as it is", model, test, enabled=True)]
    _fit(model, train, max(epochs // 4, 1), 2e-4, "QAT", tqdm, enabled=True)
    rows.append(_row("INT8 after QAT", model, test, enabled=True))
    print()
    _print_table(rows)

    same, elements = _train_equals_serve(model.eval(), test[0])
    print(f"\ntrain = serve: {same} of {elements} logits have the same bits under float parameters and packed ones")
    return 0 if same == elements else 1


def _fit(model: nn.Module, data: Any, epochs: int, rate: float, name: str, tqdm: Any, enabled: bool) -> None:
    """Adam with a one-cycle rate; INT8 forward where enabled."""
    images, labels = data
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    batches = [order for _ in range(epochs) for order in torch.randperm(len(images)).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    with tqdm(batches, desc=f"training, {name}", file=sys.stdout) as progress:
        for chosen in progress:
            optimizer.zero_grad()
            with teint8.te_int8_autocast(training=True, enabled=enabled):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _row(name: str, model: nn.Module, data: Any, enabled: bool) -> tuple[str, ...]:
    images, labels = data
    model.eval()
    with torch.no_grad(), teint8.te_int8_autocast(training=False, enabled=enabled) as ctx:
        accuracy = (model(images).argmax(-1) == labels).float().mean().item()
        calls = f"{ctx.receipt.int8_calls} of {ctx.receipt.calls}"
        took = _milliseconds(lambda: model(images))
    params: Any = dict(model.named_parameters())
    packed = teint8.pack(teint8.quantize(model), params)
    weights = [k for k, v in packed.items() if isinstance(v, teint8.QTensor)]
    held = sum((packed if enabled else params)[k].nbytes for k in weights)
    return name, f"{accuracy:.1%}", f"{held:,}", f"{took:.2f}", calls


def _milliseconds(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(15):
        start = time.perf_counter()
        run().sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _print_table(rows: list[tuple[str, ...]]) -> None:
    rows = [("", "accuracy", "bytes of weights", "ms for 360 images", "INT8 calls"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _train_equals_serve(model: nn.Module, images: Tensor) -> tuple[int, int]:
    qfn = teint8.quantize(model)
    params = dict(model.named_parameters())
    trained = qfn(params, images).detach()
    served = qfn(teint8.pack(qfn, params), images).detach()
    return int((trained == served).sum()), trained.numel()
