"""Fused MLPs against the same calls one by one, bit for bit, and against floats."""

import itertools
import sys

import pytest
import torch
from contract import different

import teint8
from teint8 import Policy, QTensor, ops

CASES = list(
    itertools.product(("silu", "gelu", "gelu_tanh"), (True, False), ((None, "int8"), ("nearest", "int8"), ("nearest", "float")))
)


def _weights(k: int, n: int, dtype: torch.dtype, device: str, gated: bool) -> list:
    shapes = ((n, k), (n, k) if gated else None, (k, n))
    return [
        None if s is None else (torch.randn(s, dtype=torch.float64) * s[1] ** -0.5).to(device, dtype).requires_grad_() for s in shapes
    ]


def _fused(x, weights, biases, kind, gradient, wgrad):
    if weights[1] is None:
        return ops.mlp(x, weights[0], weights[2], biases[0], biases[2], kind=kind, gradient=gradient, wgrad=wgrad)
    return ops.gated_mlp(x, *weights, biases=tuple(biases), kind=kind, gradient=gradient, wgrad=wgrad)


def _unfused(x, weights, biases, kind, gradient, wgrad):
    def linear(x, i):
        return None if weights[i] is None else ops.linear(x, weights[i], biases[i], gradient=gradient, wgrad=wgrad)

    weights = list(weights)
    return linear(ops.activate(kind, linear(x, 0), linear(x, 1)), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind,gated,how", CASES)
def test_the_bits_are_those_of_the_calls_one_by_one(kind, gated, how, dtype, device) -> None:
    torch.manual_seed(0)
    weights = _weights(40, 52, dtype, device, gated)
    biases = [None if w is None else torch.randn(w.shape[0], device=device, dtype=dtype).requires_grad_() for w in weights]
    x = torch.randn(3, 7, 40, device=device, dtype=dtype, requires_grad=True)
    leaves = [t for t in (x, *weights, *biases) if t is not None]
    d = torch.randn(3, 7, 40, device=device, dtype=dtype)
    results = []
    for f in (_fused, _unfused):
        y = f(x, weights, biases, kind, *how)
        results.append([y, *torch.autograd.grad(y, leaves, d)])
    # float matmuls of the backward may pick other kernels; values and INT8 matmuls may not differ at all
    assert different(results[0][0], results[1][0]) == 0
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if how == ("nearest", "int8"):
            assert different(a, b) == 0, i
        else:  # the fused dx is rounded once, where that of two linears is rounded thrice: by half a unit of 2^-8 each
            assert (a - b).float().norm() <= (4e-3 if dtype == torch.bfloat16 else 1e-5) * b.float().norm(), i
        assert a.abs().sum() > 0, i


@pytest.mark.parametrize("gated", [True, False])
def test_packed_weights_give_the_same_bits(gated, device) -> None:
    weights = _weights(64, 96, torch.bfloat16, device, gated)
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)
    packed = [None if w is None else QTensor.quantize(w.detach()) for w in weights]
    none = [None] * 3
    want = _fused(x, weights, none, "silu", None, "int8")
    assert different(want, _fused(x, packed, none, "silu", None, "int8")) == 0
    with torch.no_grad():
        assert different(want, _fused(x, weights, none, "silu", None, "int8")) == 0
    got = torch.autograd.grad(_fused(x.requires_grad_(), packed, none, "silu", None, "int8").sum(), x)[0]
    want = torch.autograd.grad(_unfused(x, packed, none, "silu", None, "int8").sum(), x)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("how,bound", [((None, "int8"), 0.03), (("nearest", "int8"), 0.05), (("stochastic", "int8"), 0.06)])
def test_gradients_are_near_those_of_floats(how, bound, device) -> None:
    torch.manual_seed(1)
    weights = _weights(256, 512, torch.float32, device, True)
    x = torch.randn(300, 256, device=device, requires_grad=True)
    d = torch.randn(300, 256, device=device)
    y = ops.gated_mlp(x, *weights, gradient=how[0], wgrad=how[1])
    exact = (torch.nn.functional.silu(x @ weights[0].t()) * (x @ weights[1].t())) @ weights[2].t()
    got, want = torch.autograd.grad(y, (x, *weights), d), torch.autograd.grad(exact, (x, *weights), d)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < bound


def test_under_torch_func(device) -> None:
    torch.manual_seed(0)
    gate, up, down = (w.detach() for w in _weights(16, 24, torch.float32, device, True))
    x = torch.randn(6, 16, device=device)

    def loss(params, x):
        return ops.gated_mlp(x, *params).square().mean()

    params = (gate, up, down)
    grads = torch.func.grad(loss)(params, x)
    leaves = [p.clone().requires_grad_() for p in params]
    want = torch.autograd.grad(loss(leaves, x), leaves)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x.unsqueeze(1))
    assert torch.allclose(each[0].mean(0), torch.func.grad(loss)(params, x)[0], rtol=1e-3, atol=1e-6) and each[0].abs().sum() > 0
    _, tangent = torch.func.jvp(lambda p: loss(p, x), (params,), (params,))
    assert torch.allclose(tangent, sum((g * p).sum() for g, p in zip(grads, params, strict=True)), rtol=1e-3)
    hvp = torch.func.jvp(torch.func.grad(lambda p: loss(p, x)), (params,), (params,))[1]
    assert all(h.abs().sum() > 0 for h in hvp)


@pytest.mark.parametrize("gradient", [None, "nearest"])
def test_compiled(gradient, device) -> None:
    torch.manual_seed(0)
    weights = _weights(32, 48, torch.float32, device, True)
    x = torch.randn(6, 32, device=device, requires_grad=True)

    def run(x, *weights):
        return ops.gated_mlp(x, *weights, gradient=gradient)

    want = run(x, *weights)
    got = torch.compile(run, fullgraph=True)(x, *weights)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, *weights)) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.abs().sum() > 0


def test_second_derivatives_raise_outside_of_torch_func(device) -> None:
    weights = _weights(16, 24, torch.float32, device, True)
    x = torch.randn(6, 16, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(ops.gated_mlp(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


@pytest.mark.parametrize(
    "case", ["one bias", "two dtypes of bias", "frozen gate", "frozen up", "frozen down", "gate is up", "no tokens", "expanded"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_odd_cases_have_the_bits_of_the_calls_one_by_one(case, dtype, device) -> None:
    gate, up, down = _weights(24, 40, dtype, device, True)
    biases = [None, None, None]
    if "bias" in case:
        biases[0] = torch.randn(40, device=device, dtype=dtype).requires_grad_()
    if case == "two dtypes of bias":
        biases[1] = torch.randn(40, device=device, dtype=torch.float32).requires_grad_()
    if case.startswith("frozen"):
        {"gate": gate, "up": up, "down": down}[case.split()[1]].requires_grad_(False)
    if case == "expanded":
        gate = gate.detach()[:1].expand(40, 24)
    weights = [gate, gate if case == "gate is up" else up, down]
    x = torch.randn(0 if case == "no tokens" else 9, 24, device=device, dtype=dtype, requires_grad=True)
    leaves = [t for t in (x, *weights, *biases) if t is not None and t.requires_grad]
    results = []
    for f in (_fused, _unfused):
        y = f(x, weights, biases, "silu", "nearest", "int8")
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y) * 0.5)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert different(a, b) == 0, i


def test_merged_linear(device) -> None:
    x = torch.randn(4, 9, 32, device=device, requires_grad=True)
    ws = [torch.randn(n, 32, device=device, requires_grad=True) for n in (8, 24, 8)]
    got = ops.merged_linear(x, ws, gradient="nearest")
    want = [ops.linear(x, w, gradient="nearest") for w in ws]
    for a, b in zip(got, want, strict=True):
        assert different(a, b) == 0
    for a, b in zip(
        torch.autograd.grad(sum(t.square().sum() for t in got), (x, *ws)),
        torch.autograd.grad(sum(t.square().sum() for t in want), (x, *ws)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


class _SwiGLU(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(*s, bias=False) for s in ((32, 48), (32, 48), (48, 32)))

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_shared_input_is_quantized_once(device, monkeypatch) -> None:
    seen = []
    for name in ("linear", "linear_function"):  # its function has the name of the first module, so that it has no other way in
        module = sys.modules[f"teint8.ops.{name}"]
        both = module.quantize_both
        monkeypatch.setattr(module, "quantize_both", lambda x, both=both, **kw: seen.append(tuple(x.shape)) or both(x, **kw))
    model, x = _SwiGLU().to(device), torch.randn(6, 32, device=device, requires_grad=True)
    with teint8.te_int8_autocast(training=True, policy=Policy.training()):
        for _ in range(2):  # two microbatches: weights once, activations twice
            model(x + 1).sum().backward()
    assert seen.count((6, 32)) == 2 + 2  # x of gate and up, and the gradient of down's result, in each microbatch
    assert seen.count((48, 32)) == 2 and seen.count((32, 48)) == 1
    assert seen.count((6, 48)) == 2 * 3


def test_an_edited_weight_or_input_is_quantized_anew(device) -> None:
    model, x = _SwiGLU().to(device), torch.randn(6, 32, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with teint8.te_int8_autocast(training=True, policy=Policy.training()):
        model(x).sum().backward()
        optimizer.step()
        x.mul_(2)
        after = model(x)
    want = teint8.quantize(model, Policy.training())(dict(model.named_parameters()), x)
    assert different(after, want) == 0


def test_errors() -> None:
    x, w, d = torch.randn(2, 8), torch.randn(12, 8), torch.randn(8, 12)
    with pytest.raises(ValueError, match="gate and up"):
        ops.gated_mlp(x, w, w.t(), d)
    with pytest.raises(TypeError, match=r"float16|bfloat16"):
        ops.gated_mlp(x, w.bfloat16(), w, d)
    with pytest.raises(ValueError, match="kind"):
        ops.mlp(x, w, d, kind="swish")
    with pytest.raises(ValueError, match="gradient"):
        ops.mlp(x, w, d, gradient="int8")
    with pytest.raises(ValueError, match="bias"):
        ops.mlp(x, w, d, torch.zeros(3))
    with pytest.raises(ValueError, match="biases"):
        ops.merged_linear(x, [w, w], [None])
    with pytest.raises(ValueError, match="alike"):
        ops.activate("silu", x, x[:1])
