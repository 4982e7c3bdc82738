"""Cells of recurrent networks: float formulas against torch's, INT8 projections, derivatives, compiled."""

import pytest
import torch
import torch.nn.functional as F
from contract import different
from torch import nn

import teint8
from teint8 import Policy, Rule, te_int8_autocast
from teint8.transforms.recurrent import CELLS

MODULES = {
    "lstm": lambda: nn.LSTMCell(12, 20),
    "lstm without bias": lambda: nn.LSTMCell(12, 20, bias=False),
    "gru": lambda: nn.GRUCell(12, 20),
    "tanh": lambda: nn.RNNCell(12, 20),
    "relu": lambda: nn.RNNCell(12, 20, nonlinearity="relu"),
}
FUNCTIONS = {"lstm": torch.lstm_cell, "gru": torch.gru_cell, "tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}


def _flat(y: object) -> torch.Tensor:
    return torch.cat(y, -1) if isinstance(y, tuple) else y  # type: ignore[return-value]


def _steps(cell: nn.Module, xs: torch.Tensor) -> torch.Tensor:
    state = None
    for x in xs:
        state = cell(x, state)
    return _flat(state)


@pytest.mark.parametrize("name", MODULES)
def test_the_formulas_are_those_of_torch(name: str, device: str) -> None:
    cell, function = MODULES[name]().double().to(device), FUNCTIONS[name.split()[0]]
    x, h = torch.randn(7, 12, dtype=torch.float64, device=device), torch.randn(7, 20, dtype=torch.float64, device=device)
    state = (h, h.cos()) if "lstm" in name else h
    bias = (cell.bias_ih, cell.bias_hh) if cell.bias else ()
    got = CELLS[function](F.linear, x, state, cell.weight_ih, cell.weight_hh, *bias)
    torch.testing.assert_close(_flat(got), _flat(cell(x, state)))


@pytest.mark.parametrize("name", MODULES)
def test_projections_run_in_int8(name: str, device: str) -> None:
    cell, xs = MODULES[name]().to(device), torch.randn(4, 7, 12, device=device)
    qfn, params = (
        teint8.quantize(lambda p, xs: _steps(lambda x, s: torch.func.functional_call(cell, p, (x, s)), xs)),
        dict(cell.named_parameters()),
    )
    y, exact = qfn(params, xs), _steps(cell, xs)
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.05
    receipt = teint8.explain(qfn, params, xs)
    assert {r.path: r.calls for r in receipt} == {"weight_ih": 4, "weight_hh": 4} and receipt.int8_calls == receipt.calls == 8
    packed = teint8.pack(qfn, params, xs)
    assert different(qfn(packed, xs), y) == 0
    with te_int8_autocast(training=True):
        assert different(_steps(cell, xs), y) == 0
    with torch.no_grad(), te_int8_autocast(training=False):
        assert different(_steps(cell, xs), y) == 0
    with te_int8_autocast(policy=Policy([Rule(weight=None)])):
        torch.testing.assert_close(_steps(cell, xs), exact)
    grads = torch.func.grad(lambda p: qfn(p, xs).square().sum())(params)
    assert grads.keys() == params.keys() and all(float(g.norm()) > 0 for g in grads.values())
    straight = teint8.quantize(qfn.__wrapped__, Policy.simulate())
    for a, b in zip(grads.values(), torch.func.grad(lambda p: straight(p, xs).square().sum())(params).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: torch.func.grad(lambda p: qfn(p, xs).square().sum())(p), fullgraph=True)(params)
    for a, b in zip(grads.values(), compiled.values(), strict=True):
        assert float((a - b).norm() / a.norm()) < 0.02  # tanh differs in the last bit, which moves a code now and then
