"""Codes of an activation that are kept for the next call: never those of what was edited in between."""

from collections.abc import Callable

import pytest
import torch
from contract import different
from torch import Tensor, nn

import teint8
from teint8 import te_int8_autocast
from teint8.compile import backend

Params = dict[str, Tensor]


def _once(p: Params, x: Tensor) -> Tensor:
    x = x + 0
    a = x @ p["a"]
    x.data.mul_(3)
    return a + x @ p["b"]


def _taken_before(p: Params, x: Tensor) -> Tensor:
    x = x + 0
    data = x.data
    a = x @ p["a"]
    data.mul_(3)
    return a + x @ p["b"]


def _in_place(p: Params, x: Tensor) -> Tensor:
    x = x + 0
    a = x @ p["a"]
    x.mul_(3)
    return a + x @ p["b"]


def _of_a_view(p: Params, x: Tensor) -> Tensor:
    x = x + 0
    a = x @ p["a"]
    x.detach()[:].mul_(3)
    return a + x @ p["b"]


@pytest.mark.parametrize("function", [_once, _taken_before, _in_place, _of_a_view])
@pytest.mark.parametrize("way", ["quantize", "context", "inductor", "backend"])
def test_what_is_edited_is_quantized_anew(way: str, function: Callable[[Params, Tensor], Tensor], device: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    p = nn.ParameterDict({k: nn.Parameter(torch.randn(16, 8, device=device)) for k in "ab"})
    x = torch.randn(4, 16, device=device)
    want = teint8.ops.linear(x, p["a"].T) + teint8.ops.linear(x * 3, p["b"].T)
    params = dict(p.items())
    if way == "context":
        with teint8.te_int8_autocast():
            y = function(params, x)
    elif way == "backend":
        y = torch.compile(function, backend=backend, fullgraph=True)(params, x)
    else:
        qfn = teint8.quantize(function)
        y = (qfn if way == "quantize" else torch.compile(qfn, fullgraph=True))(params, x)
    assert different(y, want) == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3, padding=1)])
def test_weights_that_are_stepped_by_their_data(make: Callable[[], nn.Module], training: bool, device: str) -> None:
    model, x = make().to(device), torch.randn(2, 8, 8, 8, device=device)
    with torch.no_grad(), te_int8_autocast(training=training):
        for _ in range(3):
            y = model(x)
            model.weight.data.mul_(1.5)
            with te_int8_autocast():
                want = model(x)
            assert different(y, want) > 0 and different(model(x), want) == 0
