"""Mixtures of experts: grouped matmuls against a loop of linears, forward, derivatives, routed and compiled."""

import pytest
import torch
import torch.nn.functional as F
from contract import different
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import teint8
from teint8 import Policy, QTensor, ops
from teint8.compile import backend
from teint8.ops import registry
from teint8.ops.raw_grouped import int8_grouped_mm

SIZES = st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 70), st.integers(1, 140), st.integers(0, 5))


def _case(lengths: list[int], n: int, k: int, tail: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    rows = sum(lengths) + tail
    x, w = torch.randn(rows, k, dtype=dtype, device=device), torch.randn(len(lengths), n, k, dtype=dtype, device=device)
    return x, w, torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _loop(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, **how: object) -> torch.Tensor:
    starts = [0, *ends.tolist()]
    parts = [ops.linear(x[a:b], matrix, **how) for a, b, matrix in zip(starts, starts[1:], w, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - starts[-1], w.shape[1])])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=SIZES)
def test_every_implementation_has_the_bits_of_the_linear(dtype: torch.dtype, device: str, size: object) -> None:
    lengths, n, k, tail = size  # type: ignore[misc]
    x, w, ends = _case(lengths, n, k, tail, dtype, device)
    want = _loop(x, w, ends, impl="reference")
    (xq, xs), (wq, ws) = ops.quantize(x), ops.quantize(w)
    problem = registry.Problem(device, dtype, len(lengths), len(x), n, k)
    ran = [i.name for i in registry.implementations("grouped_mm") if registry.why_not(i, problem) is None]
    assert len(ran) >= 2
    for name in ran if len(x) else []:
        assert different(int8_grouped_mm(xq, xs, wq, ws, ends, dtype, name), want) == 0, name
        assert different(int8_grouped_mm(xq, xs, wq, ws, ends.long(), dtype, name), want) == 0, name
    assert different(ops.grouped_linear(x, w, ends), want) == 0
    assert different(ops.grouped_linear(x, QTensor.quantize(w), ends), want) == 0


def test_a_bad_row_spoils_itself_and_a_bad_expert_its_group(device: str) -> None:
    x, w, ends = _case([5, 0, 7], 8, 16, 2, torch.float32, device)
    x[3, 2], w[2, 1, 0] = float("nan"), float("inf")
    y = ops.grouped_linear(x, w, ends)
    assert y[3].isnan().all() and y[5:12, 1].isnan().all()
    rest = y.clone()
    rest[3], rest[5:12, 1] = 0, 0
    assert rest.isfinite().all() and (y[12:] == 0).all()


@pytest.mark.parametrize("gradient", [None, "nearest"])
def test_gradients_are_those_of_the_linears(gradient: str | None, device: str) -> None:
    x, w, ends = _case([5, 0, 7, 11], 8, 16, 3, torch.float32, device)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    dy = torch.randn(len(x), 8, device=device)
    got = torch.autograd.grad(ops.grouped_linear(x, w, ends, gradient=gradient), leaves, dy)
    want = torch.autograd.grad(_loop(x, w, ends, gradient=gradient, wgrad="float"), leaves, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert float(a.norm()) > 0


def test_derivatives_under_torch_func(device: str) -> None:
    x, w, ends = _case([4, 6, 2], 5, 12, 1, torch.float32, device)
    tx, tw = torch.randn_like(x), torch.randn_like(w)

    def loss(run):
        return lambda x, w: run(x, w, ends).tanh().square().sum()

    mine, loop = loss(ops.grouped_linear), loss(_loop)

    def hvp(f):
        return torch.func.jvp(lambda x, w: torch.func.grad(f, (0, 1))(x, w), (x, w), (tx, tw))[1]

    def twice(f):
        inner = lambda x, w: sum((d * t).sum() for d, t in zip(torch.func.grad(f, (0, 1))(x, w), (tx, tw), strict=True))
        return torch.func.grad(inner, (0, 1))(x, w)

    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, w),
        lambda f: torch.func.jvp(f, (x, w), (tx, tw)),
        lambda f: torch.func.jvp(lambda x: f(x, w), (x,), (tx,)),
        hvp,
        twice,
    ):
        for a, b in zip(transform(mine), transform(loop), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert float(a.norm()) > 0
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: ops.grouped_linear(x, w, ends))(torch.stack((x, x)))


def test_a_second_derivative_through_codes_raises() -> None:
    x, w, ends = _case([4, 6], 5, 12, 0, torch.float32, "cpu")
    (dx,) = torch.autograd.grad(ops.grouped_linear(x.requires_grad_(), w, ends).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


class _Experts(nn.Module):
    """Weights (G, N, K) and (G, N, K) again, the second in the layout of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 32, 16) / 4), nn.Parameter(torch.randn(3, 32, 16) / 4)

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(F.relu(F.grouped_mm(x, self.up.mT, offs=ends)), self.down, offs=ends)


def _same(x: torch.Tensor, model: _Experts, ends: torch.Tensor) -> torch.Tensor:
    return _loop(F.relu(_loop(x, model.up, ends)), model.down.mT, ends)


def test_routes_take_it_over(device: str) -> None:
    model, (x, _, ends) = _Experts().to(device), _case([5, 9, 2], 1, 16, 0, torch.float32, device)
    want = _same(x, model, ends)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    assert different(qfn(params, x, ends), want) == 0
    receipt = teint8.explain(qfn, params, x, ends)
    assert [(r.path, r.m, r.n, r.k, r.batch, r.int8) for r in receipt] == [("up", 16, 32, 16, 3, True), ("down", 16, 16, 32, 3, True)]
    packed = teint8.pack(teint8.quantize(lambda p, x, ends: torch.func.functional_call(model, p, (x, ends))), params, x, ends)
    assert [isinstance(leaf, QTensor) for leaf in packed.values()] == [True, True]
    assert different(qfn(packed, x, ends), want) == 0
    for training in (False, True):
        with torch.set_grad_enabled(training), teint8.te_int8_autocast(training=training):
            assert different(model(x, ends), want) == 0
    with teint8.te_int8_autocast(policy=Policy.training()) as context:
        got = torch.autograd.grad(model(x, ends).square().sum(), list(model.parameters()))
    assert [r.mode for r in context.receipt] == ["W8A8 dX"] * 2
    exact = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    for a, b in zip(got, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1
    assert different(got[0], exact[0]) > 0  # behind a dX in INT8; down's own dW is in float
    with teint8.te_int8_autocast(policy=Policy.weight_only(), training=False) as context, torch.no_grad():
        torch.testing.assert_close(model(x, ends), model.forward(x, ends))
    assert [(r.int8, "W8A16" in r.reason) for r in context.receipt] == [(False, True)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype, device: str) -> None:
    model, (x, _, ends) = _Experts().to(device, dtype), _case([5, 9, 2], 1, 16, 0, dtype, device)
    params, receipt = dict(model.named_parameters()), teint8.Receipt()
    qfn, want = teint8.quantize(model), _same(x, model, ends)
    exact = torch.autograd.grad(want.float().square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    ways = {"quantized": lambda x, ends: torch.compile(qfn, fullgraph=True)(params, x, ends)}
    if dtype == torch.bfloat16:  # Dynamo itself wants no other of a float model
        ways["backend"] = torch.compile(model, backend=backend, fullgraph=True, options={"receipt": receipt})
    for name, run in ways.items():
        y = run(x, ends)
        assert different(y, want) == 0, name
        got = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b)
            assert float(b.norm()) > 0
        with torch.no_grad():
            assert different(run(x, ends), want) == 0, name
    assert receipt.int8_calls == receipt.calls == (4 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize(
    "change,error,words",
    [
        (lambda x, w, ends: (x, w[0], ends), ValueError, "do not fit"),
        (lambda x, w, ends: (x[:, 1:], w, ends), ValueError, "do not fit"),
        (lambda x, w, ends: (x, w, ends[1:]), ValueError, "do not fit"),
        (lambda x, w, ends: (x, w, ends.float()), TypeError, "int32"),
        (lambda x, w, ends: (x.double(), w, ends), TypeError, "float64"),
        (lambda x, w, ends: (x, w, ends.flip(0)), ValueError, "must not decrease"),
        (lambda x, w, ends: (x, w, ends + 1), ValueError, "nor pass the last"),
    ],
)
def test_bad_input(change: object, error: type[Exception], words: str) -> None:
    x, w, ends = _case([2, 3], 4, 8, 0, torch.float32, "cpu")
    with pytest.raises(error, match=words):
        ops.grouped_linear(*change(x, w, ends))  # type: ignore[operator]


def test_shapes_that_are_no_experts_stay_float_and_say_so() -> None:
    x, ends = torch.randn(16, 8), torch.tensor([5, 16], dtype=torch.int32)
    with teint8.te_int8_autocast(), teint8.te_int8_autocast() as context:
        y = F.grouped_mm(x.mT.contiguous(), torch.randn(16, 4), offs=ends)
    assert y.shape == (2, 8, 4) and [(r.int8, "another dimension" in r.reason) for r in context.receipt] == [(False, True)]
