"""te_int8_autocast: the shell. What it runs, what it keeps, and that it leaves no trace."""

import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import teint8
from teint8 import Policy, Quant, Rule, te_int8_autocast


class SimpleTransformer(nn.Module):
    """The model of the quick start."""

    def __init__(self, d_model: int = 512, nhead: int = 8, num_layers: int = 2) -> None:
        super().__init__()
        encoder_layer = nn.TransformerEncoderLayer(d_model, nhead, d_model * 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder_layer, num_layers)
        self.output_layer = nn.Linear(d_model, 10)

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        return self.output_layer(self.encoder(src)[:, 0, :])


def mlp(device: str = "cpu") -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 10)).to(device)


def test_quick_start(device: str) -> None:
    from transformer_engine_int8 import te_int8_autocast

    model = SimpleTransformer().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    data, target = torch.randn(16, 128, 512, device=device), torch.randint(0, 10, (16,), device=device)
    model.eval()
    with torch.no_grad():
        before = model(data)
    model.train()
    optimizer.zero_grad()
    with te_int8_autocast(training=True) as ctx:
        loss = nn.CrossEntropyLoss()(model(data), target)
    assert (ctx.receipt.int8_calls, ctx.receipt.calls) == (9, 9)
    loss.backward()
    assert all(float(p.grad.norm()) > 0 for p in model.parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        with te_int8_autocast(training=False) as ctx:
            quantized = model(data)
        after = model(data)
    assert (ctx.receipt.int8_calls, ctx.receipt.calls) == (9, 9)
    assert sorted(r.path for r in ctx.receipt)[0] == "encoder.layers.0.linear1.weight"
    assert torch.equal(before, after)
    assert 0 < float((quantized - after).norm() / after.norm()) < 0.05
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))


def test_training_and_serving_give_the_same_bits_as_the_pure_core(device: str) -> None:
    model, x = mlp(device), torch.randn(5, 24, device=device)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    with te_int8_autocast():
        trained = model(x)
    with torch.no_grad(), te_int8_autocast(training=False):
        served = model(x)
    assert torch.equal(trained, served) and torch.equal(served, qfn(params, x))
    grads = torch.autograd.grad(trained.square().mean(), list(model.parameters()))
    pure = torch.func.grad(lambda p: qfn(p, x).square().mean())({k: v.detach() for k, v in params.items()})
    for g, want in zip(grads, pure.values(), strict=True):
        assert torch.allclose(g, want, rtol=1e-6, atol=1e-9)


def test_leaves_no_trace() -> None:
    model, x = mlp(), torch.randn(5, 24)
    before = (pickle.dumps(model), [id(m) for m in model.modules()], [id(p) for p in model.parameters()])
    with te_int8_autocast(training=False), torch.no_grad():
        model(x)
    assert before == (pickle.dumps(model), [id(m) for m in model.modules()], [id(p) for p in model.parameters()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copy = pickle.loads(pickle.dumps(model))
    with te_int8_autocast():
        assert torch.equal(copy(x), model(x))


def test_the_inner_context_wins() -> None:
    model, x = mlp(), torch.randn(5, 24)
    plain = model(x)
    with te_int8_autocast() as outer:
        int8 = model(x)
        with te_int8_autocast(enabled=False) as inner:
            assert torch.equal(model(x), plain)
        assert (inner.receipt.int8_calls, inner.receipt.calls) == (0, 2)
        with te_int8_autocast(policy=Policy([Rule("0.*")])) as half:
            mixed = model(x)
        assert [r.int8 for r in half.receipt] == [True, False]
        assert torch.equal(model(x), int8)
    assert outer.receipt.calls == 4  # the two outer forwards alone
    assert not torch.equal(mixed, int8) and not torch.equal(mixed, plain) and torch.equal(model(x), plain)
    # a quantized function inside of a context is an inner one too
    params = dict(model.named_parameters())
    with te_int8_autocast():
        assert torch.equal(teint8.quantize(model, Policy())(params, x), plain)


def test_reentrant_decorator_and_exceptions() -> None:
    model, x = mlp(), torch.randn(5, 24)
    ctx = te_int8_autocast()
    with ctx:
        int8 = model(x)
        with ctx:
            assert torch.equal(model(x), int8)
        assert torch.equal(model(x), int8)

    @te_int8_autocast()
    def run(n: int) -> torch.Tensor:
        """Documented."""
        if n == 0:
            raise KeyError("inside")
        return model(x)

    assert run.__doc__ == "Documented." and torch.equal(run(1), int8)
    with pytest.raises(KeyError, match="inside"):
        run(0)
    with pytest.raises(ZeroDivisionError), te_int8_autocast():
        raise ZeroDivisionError
    assert not torch.equal(model(x), int8)


def test_no_grad_inference_mode_and_torch_autocast(device: str) -> None:
    model, x = mlp(device), torch.randn(5, 24, device=device)
    with te_int8_autocast(training=False):
        with torch.no_grad():
            want = model(x)
        with torch.inference_mode():
            assert torch.equal(model(x), want)
    with torch.inference_mode(), te_int8_autocast(training=False):
        assert torch.equal(model(x), want)
    for order in range(2):
        contexts = [te_int8_autocast(), torch.autocast(device, dtype=torch.bfloat16)][:: 1 if order else -1]
        with contexts[0], contexts[1]:
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert float((y.detach().float() - want).norm() / want.norm()) < 0.02


def edits():
    yield "in place", lambda m, x: m[0].weight.detach().mul_(2)
    yield "optimizer", lambda m, x: (m(x).sum().backward(), torch.optim.SGD(m.parameters(), 0.5).step())
    yield "load_state_dict", lambda m, x: m.load_state_dict({k: v * 3 for k, v in m.state_dict().items()})
    yield "to", lambda m, x: m.to(torch.float64).to(torch.float32)
    yield "data", lambda m, x: [setattr(p, "data", p.data * 2) for p in m.parameters()]
    yield "swap", lambda m, x: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() * 2))


@pytest.mark.parametrize("name,edit", list(edits()))
def test_the_cache_follows_the_weights(name: str, edit, device: str) -> None:
    te_int8_autocast.cache_clear()
    model, x = mlp(device), torch.randn(5, 24, device=device)
    with torch.no_grad(), te_int8_autocast(training=False):
        first = model(x)
        assert torch.equal(model(x), first)
        assert te_int8_autocast.cache_info() == (2, 24 * 32 + 32 * 4 + 32 * 10 + 10 * 4)
    edit(model, x)
    with torch.no_grad(), te_int8_autocast(training=False):
        served = model(x)
    assert torch.equal(served, teint8.quantize(model)(dict(model.named_parameters()), x))
    assert name == "to" or not torch.equal(served, first)


def test_a_cleared_cache_is_forgotten_by_a_context_that_is_entered_again(device: str) -> None:
    layer, x = nn.Linear(24, 32, device=device), torch.randn(5, 24, device=device)
    context = te_int8_autocast(training=False)

    def served() -> torch.Tensor:
        with torch.no_grad(), context:
            return layer(x)

    first = served()
    assert torch.equal(served(), first)
    layer.weight.data.mul_(2)  # seen by no version counter
    te_int8_autocast.cache_clear()
    for _ in range(2):
        assert torch.equal(served(), teint8.quantize(layer)(dict(layer.named_parameters()), x)) and not torch.equal(served(), first)


def test_plans_follow_shapes_dtypes_and_biases() -> None:
    """A call that would be refused is refused again after one like it was served."""
    layer, x = nn.Linear(24, 32), torch.randn(16, 24)
    with torch.no_grad(), te_int8_autocast(training=False):
        first = layer(x)
        assert torch.equal(layer(x), first)
        for bias in (torch.zeros(8), torch.zeros(32, device="meta")):
            for _ in range(2):
                with pytest.raises(ValueError, match="bias"):
                    nn.functional.linear(x, layer.weight, bias)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"bias is torch\.int64"):
                nn.functional.linear(x, layer.weight, torch.zeros(32, dtype=torch.int64))
        layer.bias = None
        assert layer(x).shape == (16, 32)
        layer.weight.data = layer.weight.data[:8]
        assert layer(x).shape == (16, 8) and torch.equal(layer(x), layer(torch.cat([x, x]))[:16])
        layer.bfloat16()
        with pytest.raises(TypeError, match="bfloat16"):
            layer(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from teint8.transforms import held

    packed = []
    original = held.pack_weight
    monkeypatch.setattr(held, "pack_weight", lambda *a: packed.append(a[0]) or original(*a))
    model, x = mlp(), torch.randn(5, 24)
    for _ in range(3):
        with torch.no_grad(), te_int8_autocast(training=False):
            model(x)
    assert len(packed) == 2


def test_gradients_are_not_lost_with_training_false() -> None:
    model, x = mlp(), torch.randn(5, 24)
    with te_int8_autocast(training=False):
        model(x).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with te_int8_autocast(training=True):
        model(x).square().mean().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_checkpoint(reentrant: bool, outside: bool, training: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24), nn.LayerNorm(24))
    x = torch.randn(5, 24, requires_grad=True)

    def grads(run) -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        with te_int8_autocast(training) as ctx:
            with torch.no_grad():
                run()  # plans and packed weights are at hand
            loss = run().square().sum()
            if not outside:
                loss.backward()
        if outside:
            loss.backward()
        assert ctx.receipt.int8_calls >= 2
        return [x.grad, *(p.grad for p in model.parameters())]

    want = grads(lambda: model(x))
    got = grads(lambda: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_checkpoint_inside_of_a_module_under_quantize() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
            self.replay = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.replay else self.inner(x)

    model, x = Block(), torch.randn(5, 24)
    qfn = teint8.quantize(model)
    # other values than the module's own: the recomputation must see the params of the call
    params = {k: (v.detach() * 1.5).requires_grad_() for k, v in model.named_parameters()}
    want = torch.autograd.grad(qfn(params, x).square().sum(), params.values())
    model.replay = True
    got = torch.autograd.grad(qfn(params, x).square().sum(), params.values())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_models_in_a_context() -> None:
    model, x = mlp(), torch.randn(5, 24)
    plain = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with te_int8_autocast():
        int8 = model(x)
        got = compiled(x)
    assert (got - int8).norm() / int8.norm() < 1e-5
    got.sum().backward()
    assert all(float(p.grad.norm()) > 0 for p in model.parameters())
    assert torch.allclose(compiled(x), plain, atol=1e-6)
    with torch.no_grad(), te_int8_autocast(training=False):
        assert (compiled(x) - int8).norm() / int8.norm() < 1e-5


def test_a_context_inside_of_a_compiled_function() -> None:
    model, x = mlp(), torch.randn(5, 24)

    def run(x: torch.Tensor) -> torch.Tensor:
        with te_int8_autocast():
            return model(x)

    want = torch.autograd.grad(run(x).square().mean(), list(model.parameters()))
    torch._dynamo.reset()
    y = torch.compile(run, fullgraph=True)(x)
    got = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        assert float(w.norm()) > 0 and (g - w).norm() / w.norm() < 1e-5
    assert not torch.equal(model(x), y)


def test_threads_with_policies_of_their_own() -> None:
    """8 threads, 200 contexts each over a shared model, with exceptions in between: every result is the single-threaded one."""
    model, x = mlp(), torch.randn(5, 24)
    policies = [Policy.qat(), Policy([Rule("0.*")]), Policy([Rule("2.*")]), Policy.weight_only(), Policy.simulate(), Policy()]

    def run(policy: Policy, training: bool) -> torch.Tensor:
        with torch.no_grad(), te_int8_autocast(training, policy=policy):
            return model(x)

    want = {(i, t): run(p, t) for i, p in enumerate(policies) for t in (False, True)}
    wrong: list[object] = []

    def work(thread: int) -> None:
        for step in range(200):
            i, training = (thread + step) % len(policies), bool((thread + step) % 2)
            try:
                if not torch.equal(run(policies[i], training), want[i, training]):
                    wrong.append((thread, step))
                if step % 3 == 0:
                    with te_int8_autocast(training, policy=policies[i]):
                        model(x)
                        raise ArithmeticError
            except ArithmeticError:
                pass
            except Exception as error:  # a thread's exception would pass unseen
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    alive = [weakref.ref(p) for p in model.parameters()]
    model = threads = None
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_one_context_shared_by_threads() -> None:
    model, x = mlp(), torch.randn(5, 24)
    ctx = te_int8_autocast(training=False)
    with torch.no_grad(), ctx:
        want = model(x)
    results: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(50):
                with ctx:
                    inside = model(x)
                results.append(torch.equal(inside, want) and not torch.equal(model(x), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 200


def test_cache_is_freed_with_the_model() -> None:
    te_int8_autocast.cache_clear()
    model = mlp()
    with torch.no_grad(), te_int8_autocast(training=False):
        model(torch.randn(2, 24))
    assert te_int8_autocast.cache_info().weights == 2
    del model
    gc.collect()
    assert te_int8_autocast.cache_info() == (0, 0)


def test_transposed_and_plain_parameters_in_matmul() -> None:
    w = nn.Parameter(torch.randn(24, 10))
    x = torch.randn(5, 24)
    with te_int8_autocast() as ctx:
        a, b = x @ w, torch.addmm(torch.zeros(10), x, w)
    assert torch.equal(a, b) and ctx.receipt.int8_calls == 2
    with te_int8_autocast() as ctx:
        torch.randn(5, 10) @ w.t()
        x @ torch.randn(24, 3)
    assert [r.int8 for r in ctx.receipt] == [True, False]
    assert "activation_matmul" in ctx.receipt.records[1].reason


def test_int8_backward_and_switchback() -> None:
    model, x = mlp(), torch.randn(64, 24)
    exact = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for policy in (Policy.training(), Policy.switchback(), Policy([Rule(gradient=Quant(rounding="stochastic"))])):
        with te_int8_autocast(policy=policy):
            got = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        for g, want in zip(got, exact, strict=True):
            assert 0 < float((g - want).norm() / want.norm()) < 0.06
