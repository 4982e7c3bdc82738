"""Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before triton is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and what they start, share the cores: two threads on one wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers hold NaN and 77, so that an element that nobody writes shows."""
    fresh = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        buffer = fresh(*args, **kwargs)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
