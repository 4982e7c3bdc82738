"""Tiles that are kept on disk: what is measured is found again, what is broken raises, and no bit depends on it."""

import json
import pathlib

import pytest
import torch
from contract import different

from teint8 import ops
from teint8.__main__ import main

triton = pytest.importorskip("triton")
from teint8.kernels import hopper, int8_mm, tuned  # noqa: E402


@pytest.fixture(autouse=True)
def _cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU, 80 GB")
    yield tuned._table.cache_clear()
    tuned._table.cache_clear()
    int8_mm.chosen.cache_clear()
    hopper.forget_plans()


def test_what_is_kept_is_found_for_like_problems_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned.found("triton", 0, 100, 64, 32) is None
    tuned._keep(0, {tuned._key("triton", 100, 64, 32, True): list(int8_mm.Config(64, 128, 128, 8, 3))})
    tuned._keep(0, {tuned._key("hopper", 1, 64, 32, False): list(hopper.SMALL)})
    assert tuned.path(0).name == f"tiles-1-A-GPU-80-GB-triton-{triton.__version__}.json"
    for m in (65, 100, 128):
        assert int8_mm.Config(*tuned.found("triton", 0, m, 64, 32)) == int8_mm.Config(64, 128, 128, 8, 3)
    assert hopper.Tile(*tuned.found("hopper", 0, 1, 64, 32, plain=False)) == hopper.SMALL
    assert int8_mm.chosen.__wrapped__(0, 1, 100, 64, 32, True) == int8_mm.Config(64, 128, 128, 8, 3)
    monkeypatch.setattr(int8_mm, "major_of", lambda device: 8)
    assert int8_mm.chosen.__wrapped__(0, 2, 100, 64, 32, True) == int8_mm.config_of(100, 8)  # a batch has no entry
    for problem in ((64, 64, 32), (129, 64, 32), (100, 65, 32), (100, 64, 33)):
        assert tuned.found("triton", 0, *problem) is None
    assert tuned.found("triton", 0, 100, 64, 32, plain=False) is None and tuned.found("triton", None, 100, 64, 32) is None


def test_cublas_is_chosen_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from teint8.ops import cuda_reasons, registry

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_reasons, "why_not_triton", lambda: None)
    monkeypatch.setattr(hopper, "why_not", lambda device, k: "not here")
    problem = registry.Problem("cuda", torch.bfloat16, 1, 128, 64, 32)
    registry.choose_anew()
    try:
        assert registry.select("int8_mm", problem).name != "cublas-measured"
        for entry, name in (([tuned.CUBLAS], "cublas-measured"), (None, registry.select("int8_mm", problem).name)):
            tuned._keep(0, {tuned._key(tuned.CUBLAS, 128, 64, 32, True): entry})
            registry.choose_anew()
            assert registry.select("int8_mm", problem).name == name
            assert registry.select("int8_mm", problem._replace(k=40)).name != "cublas-measured"
    finally:
        registry.choose_anew()


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[1, 2]",
        json.dumps({"triton 128x64x32": 5}),
        json.dumps({"triton 128x64x32": [1, 2, 3]}),
        json.dumps({"hopper 128x64x32": ["a"] * 8}),
    ],
)
def test_a_broken_file_names_itself(text: str) -> None:
    tuned.path(0).parent.mkdir(parents=True)
    tuned.path(0).write_text(text)
    with pytest.raises(ValueError, match=r"tiles-1-A-GPU.*delete it"):
        tuned.found("triton", 0, 1, 1, 1)


def test_bad_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("5", "1,2", "1,2,x", "1,2,0", "1,2,3,4"):
        with pytest.raises(SystemExit):
            main(["tune", text])
        assert "M,N,K" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "16,16,16"]) == 1
    assert "there is no GPU" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("m", [5, 200])
def test_tuned_tiles_have_the_same_bits(m: int, capsys: pytest.CaptureFixture[str]) -> None:
    x, w = torch.randn(m, 256, device="cuda").bfloat16(), torch.randn(384, 256, device="cuda").bfloat16()
    before = ops.linear(x, w)
    assert main(["tune", f"{m},384,256"]) == 0
    assert " us" in capsys.readouterr().out and tuned.path(0).exists()
    assert tuned.found("triton", 0, m, 384, 256) is not None
    assert different(ops.linear(x, w), before) == 0
