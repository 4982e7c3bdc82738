"""What the backend adds up in a matmul's kernel: gradients of an input that several linears share; the same bits."""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import different
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import teint8.compile
from teint8 import Policy, te_int8_autocast
from teint8.compile import backend
from teint8.ops import raw_sums
from teint8.ops.raw import int8_mm, quantize
from teint8.ops.raw_sums import int8_mm_add_
from teint8.transforms.sums import add_into

WIDTH = 128


@pytest.fixture(autouse=True)
def adding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel adds, the op multiplies and adds: the graphs are the same ones. Nothing is merged before."""
    monkeypatch.setattr(raw_sums, "adds", lambda *_: True)
    monkeypatch.setattr(teint8.compile, "_PASSES", (add_into,))


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


class Four(nn.Module):
    """Four linears, of which the second has a bias, in an expression."""

    def __init__(self, expression: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH, bias=i == 1) for i in range(4))
        self.expression = expression

    def forward(self, x: Tensor) -> Any:
        return self.expression(self, x)


def flat(y: Tensor) -> Tensor:
    return y.view(2 * y.shape[0], -1)


EXPRESSIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "a sum": (1, lambda m, x: m.a(x) + m.c(x + 1)),
    "three dimensions": (1, lambda m, x: m.a(x).view(-1, 2, WIDTH) + m.c(x + 1).view(-1, 2, WIDTH)),
    "another matrix": (1, lambda m, x: (flat(m.a(x)) + flat(m.c(x + 1))).sum(0)),
    "pairs": (2, lambda m, x: (m.a(x) + m.c(x + 1)) + (m.c(x + 2) + m.d(x + 3))),
    "a chain": (3, lambda m, x: m.a(x) + (m.c(x + 1) + (m.c(x + 2) + m.d(x + 3)))),
    "one bias": (1, lambda m, x: m.b(x) + m.a(x + 1)),
    "two biases": (0, lambda m, x: m.b(x) + m.b(x + 1)),
    "a result": (0, lambda m, x: (lambda a, c: (a + c, a))(m.a(x), m.c(x + 1))),
    "used again": (0, lambda m, x: (lambda a, c: (a + c).relu() * c)(m.a(x), m.c(x + 1))),
    "alpha": (0, lambda m, x: torch.add(m.a(x), m.c(x + 1), alpha=2)),
    "itself": (0, lambda m, x: (lambda a: a + a)(m.a(x))),
    "broadcast": (0, lambda m, x: m.a(x).view(-1, 1, WIDTH) + m.c(x[:1]).view(1, 1, WIDTH)),
    "dependent": (0, lambda m, x: (lambda a: a + m.c(a))(m.a(x))),
    "parts": (0, lambda m, x: m.a(x)[:, :64] + m.c(x + 1)[:, 64:]),
    "in place": (1, lambda m, x: m.a(x).add_(m.c(x + 1)).mul_(2)),
    "used by a matmul": (1, lambda m, x: m.d(m.a(x) + m.c(x + 1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name: str, dtype: torch.dtype, device: str) -> None:
    count, expression = EXPRESSIONS[name]
    model, x = Four(expression).to(device, dtype), torch.randn(40, WIDTH, device=device, dtype=dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        got, code = run_and_get_code(torch.compile(model, backend=backend, options={"fx_graph_cache": False}), x)
        with te_int8_autocast(training=False):
            want = model(x)
    pairs = list(zip(got, want, strict=True)) if isinstance(want, tuple) else [(got, want)]
    if name == "another matrix":  # a sum of floats, in an order of Inductor's own
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
    else:
        assert [different(a, b) for a, b in pairs] == [0] * len(pairs)
    assert calls("\n".join(code), "int8_mm_add_") == (0 if dtype == torch.float64 else count)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_graphs_with_nothing_to_add(device: str) -> None:
    """Numbers are added as well as tensors, sizes may depend on data, and a pass of the caller's need not sort."""
    x = torch.randn(40, 8, device=device)

    def late(graph: torch.fx.Graph) -> None:
        for n in graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
            with graph.inserting_before(graph.output_node()):
                other = graph.call_function(torch.ops.aten.cos.default, n.args)
                other.meta = dict(n.meta)
            n.replace_all_uses_with(other)
            graph.erase_node(n)

    for run, args, options in (
        (lambda x, n: x.abs() + n, (x, 3), {}),
        (lambda x: x[x[:, 0] > 0] + x[:1], (x,), {}),
        (lambda x: x.sin().neg() + 1, (x,), {"post_grad_custom_pre_pass": late}),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(run, backend=backend, dynamic=True, options={"fx_graph_cache": False, **options})  # type: ignore[dict-item]
        want = x.cos().neg() + 1 if options else run(*args)  # type: ignore[arg-type,call-arg]
        assert torch.allclose(compiled(*args), want, atol=1e-6)  # type: ignore[arg-type,call-arg]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_are_symbols(device: str) -> None:
    """They are left alone: nothing may be asked of a size that depends on data."""

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
            int8_mm_add_(*x, *w, total)
            assert different(total, want) == 0, (m, n, k, dtype)
    x, w, total = quantize(torch.randn(4, 8)), quantize(torch.randn(6, 8)), torch.zeros(4, 6)
    for args, message in (
        ((*x, *w, torch.zeros(4, 5)), r"the total has \(4, 5\); \(4,\), \(6,\) and \(4, 6\) are needed"),
        ((*x, w[0], w[1][:5], total), r"scales have shapes \(4,\) and \(5,\)"),
        ((*x, w[0][:, :4], w[1], total), r"codes have shapes \(4, 8\) and \(6, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            int8_mm_add_(*args)
    with pytest.raises(TypeError, match=r"the total is torch\.int32"):
        int8_mm_add_(*x, *w, total.int())


def test_where_it_is_worth_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not raw_sums.adds("cpu", torch.float32, 4096, 4096, 4096)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    assert raw_sums.adds("cuda", torch.bfloat16, 4096, 4096, 4096) is hopper
    assert not raw_sums.adds("cuda", torch.bfloat16, 128, 4096, 4096)
