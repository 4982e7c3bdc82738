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


LAYERS = {
    "lstm": lambda: nn.LSTM(12, 20),
    "lstm, two ways, batch first": lambda: nn.LSTM(12, 20, 2, bidirectional=True, batch_first=True),
    "lstm, projected, without bias": lambda: nn.LSTM(12, 20, 2, bias=False, proj_size=8),
    "gru": lambda: nn.GRU(12, 20, 3, bidirectional=True),
    "tanh": lambda: nn.RNN(12, 20, batch_first=True),
    "relu": lambda: nn.RNN(12, 20, 2, nonlinearity="relu", bias=False),
}
STEPS = Policy([Rule(ops=("recurrent",))])


def _all(result: object) -> list[torch.Tensor]:
    y, state = result  # type: ignore[misc]
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return [y, *(state if isinstance(state, tuple) else (state,))]


def _inputs(layer: nn.RNNBase, packed: bool, given: bool) -> tuple:
    p = next(layer.parameters())
    xs = torch.randn(3, 5, 12, dtype=p.dtype, device=p.device)
    batch = 3 if layer.batch_first else 5
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or 20, 20) if isinstance(layer, nn.LSTM) else (20,)
    state = tuple(torch.randn(count, batch, n, dtype=p.dtype, device=p.device) for n in sizes)
    if packed:
        lengths = [2, 5, 1] if layer.batch_first else [3, 1, 2, 3, 3]
        xs = nn.utils.rnn.pack_padded_sequence(xs, lengths, layer.batch_first, enforce_sorted=False)
    return (xs, state if len(sizes) > 1 else state[0]) if given else (xs,)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_of_layers_are_those_of_torch(name: str, packed: bool, given: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from teint8.transforms import route

    layer = LAYERS[name]().double().to(device)
    inputs = _inputs(layer, packed, given)
    want = _all(layer(*inputs))

    class Float:
        select, Problem = teint8.ops.select, teint8.ops.Problem
        linear = staticmethod(lambda x, w, bias=None, **_: F.linear(x, w, bias))

    with monkeypatch.context() as patch:
        patch.setattr(route, "ops", Float)
        with te_int8_autocast(policy=STEPS):
            got = _all(layer(*inputs))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_int8(name: str, device: str) -> None:
    layer = LAYERS[name]().to(device)
    (xs,) = _inputs(layer, False, False)
    qfn, params = teint8.quantize(layer, STEPS), dict(layer.named_parameters())
    y, exact = _all(qfn(params, xs)), _all(layer(xs))
    assert 0 < float((y[0] - exact[0]).norm() / exact[0].norm()) < 0.05
    receipt = teint8.explain(qfn, params, xs)
    weights = [n for n in params if n.startswith("weight")]
    assert (
        {r.path for r in receipt} == set(weights) and receipt.int8_calls == receipt.calls and {r.op for r in receipt} == {"recurrent"}
    )
    for packed in (teint8.pack(qfn, params), teint8.pack(qfn, params, xs)):
        assert all(isinstance(packed[n], teint8.QTensor) for n in weights)
        assert [different(a, b) for a, b in zip(_all(qfn(packed, xs)), y, strict=True)] == [0] * len(y)
    with torch.no_grad(), te_int8_autocast(training=False, policy=STEPS):
        assert different(_all(layer(xs))[0], y[0]) == 0
    grads = torch.func.grad(lambda p: _all(qfn(p, xs))[0].square().sum())(params)
    straight = teint8.quantize(layer, Policy([Rule(ops=("recurrent",), compute="simulate")]))
    for a, b in zip(grads.values(), torch.func.grad(lambda p: _all(straight(p, xs))[0].square().sum())(params).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert float(a.norm()) > 0
    with te_int8_autocast() as context:  # no rule names them: torch's own call
        assert torch.equal(_all(layer(xs))[0], exact[0])
    assert context.receipt.int8_calls == 0 and all("a rule names 'recurrent'" in r.reason for r in context.receipt)


def test_a_layer_in_training_drops_out_between_its_layers(device: str) -> None:
    layer = nn.GRU(12, 20, 2, dropout=0.5).to(device)
    xs = torch.randn(3, 5, 12, device=device)
    qfn, params = teint8.quantize(layer, STEPS), dict(layer.named_parameters())
    assert not torch.equal(qfn(params, xs)[0], qfn(params, xs)[0])
    layer.eval()
    assert torch.equal(qfn(params, xs)[0], qfn(params, xs)[0])


def test_laying_weights_out_for_cudnn_is_no_use_of_them() -> None:
    """On a GPU nn.LSTM asks where its weights lie before it calls: an abstract run must not take that for a use in float."""

    class Asks(nn.LSTM):
        def forward(self, x: torch.Tensor, state: object = None) -> object:
            weights = [getattr(self, name) for name in self._flat_weights_names]
            assert len({w.data_ptr() for w in weights}) and self.weight_ih_l0.get_device() == -1
            if self.lays_out:
                torch._cudnn_rnn_flatten_weight(weights, 4, 12, 2, 20, 0, 1, False, False)
            return super().forward(x, state)

    layer, xs = Asks(12, 20), torch.randn(3, 5, 12)
    layer.lays_out = False
    qfn, params = teint8.quantize(layer, STEPS), dict(layer.named_parameters())
    packed = teint8.pack(qfn, params, xs)
    assert isinstance(packed["weight_ih_l0"], teint8.QTensor) and isinstance(packed["weight_hh_l0"], teint8.QTensor)
    want = _all(qfn(params, xs))
    layer.lays_out = True  # cuDNN is not asked to do that with codes
    assert [different(a, b) for a, b in zip(_all(qfn(packed, xs)), want, strict=True)] == [0] * 3
    # torch itself raises under torch.func there: what grad wraps has no address of its own
    grads = torch.func.grad(lambda p: _all(qfn(p, xs))[0].square().sum())(params)
    plain = nn.LSTM(12, 20)
    plain.load_state_dict(params)
    of_plain = torch.func.grad(lambda p: _all(teint8.quantize(plain, STEPS)(p, xs))[0].square().sum())(params)
    assert all(torch.equal(grads[n], of_plain[n]) and float(grads[n].norm()) > 0 for n in params)
