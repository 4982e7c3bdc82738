"""What the backend adds up in a matmul's kernel: gradients of an input that several linears share; the same bits."""

import contextlib
import re
from typing import Any

import pytest
import torch
from contract import different
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from teint8 import Policy, te_int8_autocast
from teint8.compile import backend
from teint8.ops import raw_sums
from teint8.ops.raw import int8_mm, quantize
from teint8.ops.raw_sums import int8_mm_add_

WIDTH = 128


@pytest.fixture(autouse=True)
def adding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel adds, the op multiplies and adds: the graphs are the same ones."""
    adds = raw_sums.adds
    where = [d for d in ("cpu", "cuda") if d == "cpu" or not (torch.cuda.is_available() and adds(d, torch.bfloat16, 64, 64, 64))]
    monkeypatch.setattr(raw_sums, "adds", lambda device, *sizes: device in where or adds(device, *sizes))


class Shared(nn.Module):
    """So many linears of one input, of which the results meet otherwise than as a sum."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, 160, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linears[0](x)
        for linear in self.linears[1:]:
            y = torch.maximum(y, linear(x))  # rounds nothing
        return y


def gradients(model: nn.Module, x: Tensor, compiled: bool) -> tuple[list[Tensor], str]:
    """The result, gradients of the input and the parameters, and the code that Inductor wrote."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch._dynamo.reset()
    options: Any = {"policy": Policy.training(), "fx_graph_cache": False}
    run = torch.compile(model, backend=backend, fullgraph=True, options=options) if compiled else model

    def step() -> Tensor:
        with contextlib.nullcontext() if compiled else te_int8_autocast(policy=Policy.training()):
            y: Tensor = run(x)
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
        return y

    y, code = run_and_get_code(step)
    return [y, x.grad, *(p.grad for p in model.parameters())], "\n".join(code)  # type: ignore[list-item]


def calls(code: str, op: str) -> int:
    return len(re.findall(rf"torch\.ops\.teint8\.{op}\.default\(", code))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40,), (2, 20)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_of_a_shared_input(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    model = Shared(count).to(device, dtype)
    x = torch.randn(*shape, WIDTH, device=device, dtype=dtype)
    got, code = gradients(model, x, compiled=True)
    want, _ = gradients(model, x, compiled=False)
    assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * len(want)
    assert want[1].count_nonzero() > x.numel() // 2
    assert (calls(code, "int8_mm_add_"), calls(code, "int8_mm")) == (count - 1, 3 * count - (count - 1))


def test_float64_and_products_that_others_take_stay(device: str) -> None:
    x = torch.randn(40, WIDTH, device=device)
    got, code = gradients(Shared(2).to(device).double(), x.double(), compiled=True)
    assert calls(code, "int8_mm_add_") == 0 and all(t.isfinite().all() for t in got)

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            a, b = self.a(x), self.b(x)
            c = self.b(x + 1)
            return a + b, a, b.relu(), c + c

    model = Seen().to(device)
    torch._dynamo.reset()
    with torch.no_grad():
        got, code = run_and_get_code(torch.compile(model, backend=backend, options={"fx_graph_cache": False}), x)
        with te_int8_autocast(training=False):
            want = model(x)
    assert calls("\n".join(code), "int8_mm_add_") == 0
    assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * 4


def test_biases_views_and_chains(device: str) -> None:
    """The sum of a forward: the one with a bias holds it; both may be seen in other shapes."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=i == 1) for i in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x) + self.b(x.flip(-1))
            three, two = (-1, 2, WIDTH), (2 * x.shape[0], WIDTH // 2)
            other = self.c(x * 2).view(three) + self.a(x - 1).view(three)
            flat = self.c(x + 3).view(two) + self.a(x - 3).view(two)
            chain = (self.a(x + 1) + self.c(x + 2)) + (self.c(x - 2) + self.a(x * 3))
            return y.view(other.shape) * other, flat * chain.view(flat.shape)

    model, x = Sums().to(device), torch.randn(40, WIDTH, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(model, backend=backend, options={"fx_graph_cache": False}), x)
        with te_int8_autocast(training=False):
            want = model(x)
    assert [different(a, b) for a, b in zip(y, want, strict=True)] == [0, 0]
    if device == "cuda":  # on a CPU these are merged with their quantization
        assert calls("\n".join(code), "int8_mm_add_") == 5


def test_sizes_that_are_symbols(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left alone: nothing may be asked of a size that depends on data."""
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor, picked: Tensor) -> Tensor:
            y: Tensor = x[picked]
            return self.a(y) + self.b(y + 1)

    model, x = Picked().to(device), torch.randn(40, WIDTH, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"policy": Policy.qat(), "training": True})
    for rows in (x[:, 0] > 0, x[:, 1] > 0):
        with te_int8_autocast(policy=Policy.qat()):
            want = model(x, rows)
        assert different(compiled(x, rows), want) == 0


def test_the_op(device: str) -> None:
    for m, n, k in ((5, 7, 9), (64, 128, 64), (300, 96, 130), (0, 4, 8), (5, 0, 8), (3, 4, 0)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x, w = (quantize(torch.randn(rows, k, device=device)) for rows in (m, n))
            total = torch.randn(m, n, device=device, dtype=dtype)
            want = int8_mm(*x, *w, None, dtype) + total
            assert int8_mm_add_(*x, *w, total) is None  # type: ignore[func-returns-value]
            assert different(total, want) == 0, (m, n, k, dtype)
    with pytest.raises(ValueError, match=r"the total has shape \(4, 5\), the product \(4, 6\)"):
        int8_mm_add_(*quantize(torch.randn(4, 8)), *quantize(torch.randn(6, 8)), torch.zeros(4, 5))
