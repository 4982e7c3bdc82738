"""The doctor finds every usable implementation right, and one that is wrong."""

import pytest
import torch

from teint8 import numerics
from teint8.__main__ import main
from teint8.ops import registry


def test_every_usable_implementation_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in set(registry.OPS) - {"mlp"}:  # which only GPUs have
        assert any(line.split()[:1] == [op] for line in lines), op
    assert not any("bits wrong" in line for line in lines)
    assert sum("ok, the contract's bits" in line for line in lines) >= 10


def test_a_wrong_implementation_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(x: torch.Tensor, seed: torch.Tensor | None, scale: torch.Tensor | None):
        codes, scales = numerics.quantize(x, seed)
        codes[0, 0] += 1
        return codes, scales

    registry.register("quantize", "wrong", wrong, device="cpu", priority=-1)
    try:
        assert main(["doctor"]) == 1
        assert any(line.split()[:5] == ["quantize", "wrong", "1", "bits", "wrong"] for line in capsys.readouterr().out.splitlines())
    finally:
        registry._implementations["quantize"] = [i for i in registry.implementations("quantize") if i.name != "wrong"]
        registry.choose_anew()


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """With an epoch in place of 36; it returns 0 only if training and serving gave the same bits."""
    from teint8 import demo

    assert demo.run(1) == 0
    assert "train = serve: 3600 of 3600 logits" in capsys.readouterr().out
