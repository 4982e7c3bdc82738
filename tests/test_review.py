"""Programs that once gave wrong results, or none."""

import contextlib
import gc
import threading
import weakref

import grid
import pytest
import torch
import torch.nn.functional as F
from contract import different
from torch import nn
from torch.utils.checkpoint import checkpoint

import teint8
from teint8 import Policy, QTensor, Quant, Rule, ops, te_int8_autocast


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_every_optimizer_step_is_seen_by_the_cache(optimizer, options: dict[str, bool], device: str) -> None:
    model, x = layers().to(device), torch.randn(16, 24, device=device)
    if device == "cuda" and optimizer is torch.optim.Adagrad and "fused" in options:
        pytest.skip("torch has no fused Adagrad on CUDA")
    steps = optimizer(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        with torch.no_grad(), te_int8_autocast(training=False):
            model(x)
        model(x).square().sum().backward()
        steps.step()
        with torch.no_grad(), te_int8_autocast(training=False):
            assert torch.equal(model(x), teint8.quantize(model)(dict(model.named_parameters()), x))


def test_results_may_be_written_in_place(device: str) -> None:
    w, x = torch.randn(8, 24, device=device, requires_grad=True), torch.randn(3, 5, 24, device=device)
    for program in (lambda x: F.linear(x, w), lambda x: F.linear(x[0], w), lambda x: F.linear(x[0, 0], w), lambda x: x @ w.t()):
        with te_int8_autocast():
            (want,) = torch.autograd.grad(F.relu(program(x)).square().sum(), w)
            y = program(x)
            y += 0
            (got,) = torch.autograd.grad(F.relu_(y).square().sum(), w)
        assert torch.equal(got, want)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints(outer: bool, inner: bool) -> None:
    a, b, x = layers(), layers(), torch.randn(5, 24, requires_grad=True)
    parameters = [x, *a.parameters(), *b.parameters()]

    def run(replayed: bool) -> list[torch.Tensor]:
        keep = (lambda f, x, reentrant: checkpoint(f, x, use_reentrant=reentrant)) if replayed else (lambda f, x, _: f(x))
        for p in parameters:
            p.grad = None
        with te_int8_autocast():
            y = keep(lambda x: torch.tanh(keep(b, a(x), inner)), x, outer)
        y.square().sum().backward()
        return [p.grad for p in parameters]

    assert all(torch.equal(g, w) for g, w in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_context_of_the_checkpointed_function_itself(reentrant: bool) -> None:
    """What the function does in float outside of its own context stays float when it is replayed."""
    a, b, x = layers(), layers(), torch.randn(5, 24, requires_grad=True)
    qfn, params = teint8.quantize(b), dict(b.named_parameters())

    def with_context(x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(a(x))
        with te_int8_autocast():
            return b(h)

    def with_function(x: torch.Tensor) -> torch.Tensor:
        return a(torch.tanh(qfn(params, x)))

    for f in (with_context, with_function):
        grads = []
        for run in (f, lambda x, f=f: checkpoint(f, x, use_reentrant=reentrant)):
            for p in (x, *a.parameters(), *b.parameters()):
                p.grad = None
            run(x).square().sum().backward()
            grads.append([p.grad for p in (x, *a.parameters(), *b.parameters())])
        assert all(torch.equal(g, w) for g, w in zip(*grads, strict=True))


def test_forward_over_reverse_outside_of_torch_func() -> None:
    w, x = torch.randn(8, 24, requires_grad=True), torch.randn(5, 24)
    loss = lambda w, x: ops.linear(x, w).square().sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        (g,) = torch.autograd.grad(loss(w, dual), w, create_graph=True)
        got = torch.autograd.forward_ad.unpack_dual(g).tangent
    want = torch.func.jvp(lambda x: torch.func.grad(loss)(w.detach(), x), (x,), (torch.ones_like(x),))[1]
    assert grid.relative_error(got, want) < 1e-6


def test_a_packed_weight_as_the_other_operand() -> None:
    x, params = torch.randn(5, 24), {"a": torch.randn(6, 24), "b": torch.randn(24, 6)}
    qfn = teint8.quantize(lambda p, x: x @ p["b"] @ p["a"] + x @ (p["b"] @ p["a"]))
    packed = teint8.pack(teint8.quantize(lambda p, x: x @ p["b"]), params, x)
    assert isinstance(packed["b"], QTensor)
    mixed = {"a": params["a"], "b": packed["b"].dequantize()}
    assert grid.relative_error(qfn(packed, x), qfn(mixed, x)) < 0.03
    assert different(qfn(teint8.pack(qfn, params, x), x), qfn(params, x)) == 0
    receipt = teint8.explain(teint8.quantize(lambda p, i: F.embedding(i, p["b"])), packed, torch.tensor([1, 2]))
    assert "dequantized" in receipt.records[0].reason


def test_packed_leaves_inside_attention() -> None:
    mha = nn.MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)
    params, x = {k: v.detach() for k, v in mha.named_parameters()}, torch.randn(2, 5, 16)
    by_hand = {**params, "bias_k": QTensor.quantize(params["bias_k"]), "bias_v": QTensor.quantize(params["bias_v"])}
    qfn = teint8.quantize(mha)
    assert torch.equal(qfn(by_hand, x, x, x)[0], qfn(teint8.unpack(by_hand), x, x, x)[0])
    sdpa = teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, p["k"], p["k"]))
    k = QTensor.quantize(torch.randn(2, 7, 16))
    assert torch.equal(sdpa({"k": k}, x), sdpa({"k": k.dequantize()}, x))


def test_fully_masked_rows_under_jvp() -> None:
    q, mask = torch.randn(1, 3, 8), torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    qfn = teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, q, q, mask))
    y = torch.func.jvp(lambda q: qfn({}, q), (q,), (q,))[0]
    assert torch.allclose(y, F.scaled_dot_product_attention(q, q, q, mask), atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rules", [[Rule("2.*", weight=None), Rule()], [Rule("2.*")]])
def test_rules_with_paths_hold_around_a_compiled_model(training: bool, rules: list[Rule]) -> None:
    model, x, policy = layers(), torch.randn(5, 24), Policy(rules)
    want = teint8.quantize(model, policy)(dict(model.named_parameters()), x)
    plain = teint8.quantize(model)(dict(model.named_parameters()), x)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with contextlib.nullcontext() if training else torch.no_grad():
        for _ in range(2):
            with te_int8_autocast(training, policy=policy):
                got = compiled(x)
            assert grid.relative_error(got, want) < 1e-6 < grid.relative_error(got, plain)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"teint8\.quantize\(model, policy\)"), te_int8_autocast(policy=policy):
        torch.compile(model, fullgraph=True)(x)


def test_paths_follow_the_outermost_module() -> None:
    model, x = layers(), torch.randn(5, 24)
    with te_int8_autocast(policy=Policy([Rule("0.*")])) as ctx:
        model[0](x), model(x)
    assert [(r.path, r.int8) for r in ctx.receipt] == [("weight", False), ("0.weight", True), ("2.weight", False)]


def test_receipts_say_where_and_how_large() -> None:
    x4, y4 = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 8, 6)
    with te_int8_autocast() as ctx:
        x4 @ y4
        F.linear(torch.randn(3, 8), torch.randn(5, 8))
        torch.addmm(torch.randn(6), torch.randn(5, 8), torch.randn(8, 6))
    first, second, third = ctx.receipt
    assert (first.m, first.n, first.k, first.batch) == (5, 6, 8, 8) and first.path.startswith("test_review.py:")
    assert second.int8 and second.mode == "W8A8" and second.path != first.path and not third.int8
    for policy, mode, int8 in (("weight_only", "W8A16", 0), ("simulate", "W8A8", 0), ("training", "W8A8 dX dW", 1)):
        with te_int8_autocast(policy=Policy.preset(policy)) as ctx:
            F.linear(torch.randn(3, 8), torch.randn(5, 8))
        assert (ctx.receipt.records[0].mode, ctx.receipt.int8_calls) == (mode, int8)


def test_unusual_operands_stay_float() -> None:
    w, x = nn.Parameter(torch.randn(8, 6)), torch.randn(5, 8)
    sparse = torch.eye(8).to_sparse()
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    with te_int8_autocast() as ctx:
        assert torch.equal(sparse @ w, torch.sparse.mm(sparse, w))
        assert F.linear(x, torch.randn(8)).shape == (5,)
        assert F.linear(nested, w).size(2) == 8
        assert nn.Linear(8, 4, device="meta")(x.to("meta")).shape == (5, 4)
    assert [r.int8 for r in ctx.receipt][:3] == [False] * 3
    negated = torch._neg_view(x)
    assert different(ops.linear(negated, w.detach().t()), ops.linear(-x, w.detach().t())) == 0


def test_inference_weights_and_a_disabled_context() -> None:
    with torch.inference_mode():
        layer, x = nn.Linear(24, 8), torch.randn(16, 24)
        with te_int8_autocast(training=False):
            assert torch.equal(layer(x), layer(x))
    a, b = torch.randn(5, 8).bfloat16(), nn.Parameter(torch.randn(8, 6).bfloat16())
    bias = torch.randn(5, 6).bfloat16()
    with te_int8_autocast(enabled=False):
        assert torch.equal(torch.addmm(bias, a, b, beta=0.3, alpha=1.7), torch.addmm(bias, a, b.detach(), beta=0.3, alpha=1.7))


def test_strict_contexts_nest_and_locals_are_not_kept() -> None:
    layer, x = nn.Linear(24, 8), torch.randn(16, 24)
    with te_int8_autocast(strict=True) as ctx:
        with ctx:
            pass
        layer(x)
    ref = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert ref() is None


def test_a_pure_function_takes_all_of_its_parameters() -> None:
    qfn, params, x = grid.programs("mlp")
    with pytest.raises(ValueError, match=r"lacks '2\.bias'"):
        qfn({k: v for k, v in params.items() if k != "2.bias"}, x)
    assert teint8.explain(torch.compile(qfn), params, x).int8_calls == 2

    with pytest.raises(TypeError, match="generator"):

        @te_int8_autocast()
        def stream():
            yield 1

    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(5, 3\)"), te_int8_autocast():
        mha = nn.MultiheadAttention(16, 4, batch_first=True)
        y = torch.randn(3, 5, 16)
        mha(y, y, y, key_padding_mask=torch.zeros(5, 3, dtype=torch.bool))


def test_products_that_are_not_taken_over_are_on_the_receipt() -> None:
    w, x = nn.Parameter(torch.randn(5, 5)), torch.randn(4, 5)
    lstm = nn.LSTM(5, 5)
    calls = {
        "einsum": lambda: torch.einsum("ab,bc->a", x, w),
        "tensordot": lambda: torch.tensordot(w, x[0], 1).sum() + torch.tensordot(x[:, None] * x[:, :, None], w, 2),
        "inner": lambda: torch.inner(x, nn.Parameter(x[0][None, None])),
        "mv": lambda: torch.mv(w, x[0]),
        "multi_dot": lambda: torch.linalg.multi_dot([x, w]),
        "out=": torch.no_grad()(lambda: torch.mm(x, w, out=torch.empty(4, 5))),
        "recurrent": lambda: lstm(x[None])[0],
    }
    for name, call in calls.items():
        want = call()
        with te_int8_autocast() as context:
            y = call()
        assert torch.equal(y, want) and len(context.receipt) >= 1, name
        assert all(not r.int8 and name in r.reason for r in context.receipt), (name, context.receipt)
    with te_int8_autocast() as context:
        y = torch.linalg.matmul(x, w)
    assert context.receipt.int8_calls == context.receipt.calls == 1 and torch.equal(y, teint8.ops.linear(x, w.mT))
    with pytest.raises(ValueError, match="einsum that contracts one dimension"), te_int8_autocast(strict=True):
        calls["einsum"]()
    with te_int8_autocast(strict=True):  # no rule asks for them
        calls["recurrent"]() @ w


DEFAULTS = {
    "linear": (lambda: nn.Linear(64, 16), (16, 64), None),
    "few rows": (lambda: nn.Linear(64, 16), (2, 64), None),
    "W8A16": (lambda: nn.Linear(64, 16), (16, 64), Policy.weight_only()),
    "training": (lambda: nn.Linear(64, 16), (16, 64), Policy.training()),
    "conv": (lambda: nn.Conv2d(8, 16, 3), (2, 8, 9, 9), None),
    "groups": (lambda: nn.Conv2d(8, 16, 3, groups=2), (2, 8, 9, 9), None),
    "depthwise": (lambda: nn.Conv2d(64, 64, 3, groups=64), (2, 64, 9, 9), None),
    "transposed": (lambda: nn.ConvTranspose1d(8, 16, 3, 2), (2, 8, 9), None),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8), nn.RMSNorm(8), nn.Linear(8, 8)),
        (16, 64),
        Policy([Rule(ops=("linear", "norm"))]),
    ),
    "channels": (
        lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3)),
        (2, 8, 9, 9),
        Policy([Rule(ops=("conv", "norm"))]),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(16, 2),
        (3, 2, 16),
        Policy([Rule(ops=("linear", "attention"))]),
    ),
    "recurrent": (lambda: nn.GRU(8, 8), (3, 2, 8), Policy([Rule(ops=("recurrent",))])),
    "blocks": (
        lambda: nn.Linear(64, 16),
        (16, 64),
        Policy([Rule(weight=Quant("block", block=32), activation=Quant("block", block=32))]),
    ),
}


@pytest.mark.parametrize("default", ["float16", "bfloat16", "float64", "meta"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_torch_change_nothing(name: str, default: str, device: str) -> None:
    """Kernels in C wrote float32 into memory of the default dtype, and to addresses of the default device."""
    make, shape, policy = DEFAULTS[name]
    torch.manual_seed(0)
    model, x = make().to(device), torch.randn(shape, device=device)
    args = (x, x, x) if name == "attention" else (x,)
    qfn, params = teint8.quantize(model, policy), dict(model.named_parameters())

    def served() -> list[torch.Tensor]:
        context = te_int8_autocast(training=False, policy=policy)
        with torch.no_grad(), context:
            contexts = [first(model(*args)) for _ in range(2)]
        grads = torch.func.grad(lambda p: first(qfn(p, *args)).square().sum())(params)
        return [first(qfn(params, *args)), first(qfn(teint8.pack(qfn, params), *args)), *contexts, *grads.values()]

    want = served()
    te_int8_autocast.cache_clear()
    with torch.device("meta") if default == "meta" else contextlib.nullcontext():
        if default != "meta":
            torch.set_default_dtype(getattr(torch, default))
        try:
            got = served()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(different(a, b) == 0 for a, b in zip(got, want, strict=True))


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("turn", [lambda w: w.t(), lambda w: w.T, lambda w: w.mT, lambda w: w.transpose(0, 1)])
def test_transposed_parameters_are_weights_in_compiled_code_of_a_context(turn, training: bool, device: str) -> None:
    w, x = nn.Parameter(torch.randn(16, 32, device=device)), torch.randn(8, 32, device=device)
    for f in (lambda x: x @ turn(w), lambda x: torch.mm(x, turn(w)), lambda x: torch.addmm(x[:, :16], x, turn(w))):
        torch._dynamo.reset()
        with te_int8_autocast(training=training), torch.set_grad_enabled(training):
            want, got = f(x), torch.compile(f, fullgraph=True, backend="aot_eager")(x)
        assert different(got, want) == 0 and not torch.equal(got, f(x))
        if training:
            grads = [torch.autograd.grad(y.square().sum(), w)[0] for y in (want, got)]
            torch.testing.assert_close(*grads)


def test_threads_share_a_training_context() -> None:
    """The one that leaves it first drops the codes that others are about to take."""
    model, x = layers(), torch.randn(8, 24)
    want, wrong = teint8.quantize(model)(dict(model.named_parameters()), x), []

    @te_int8_autocast()
    def run() -> torch.Tensor:
        return model(x)

    def work() -> None:
        try:
            for _ in range(150):
                if not torch.equal(run(), want):
                    raise ValueError("other bits")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


MAPPED = {
    "linear": (lambda: nn.Linear(8, 4), (3, 8), None),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6), None),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), (3, 8), Policy([Rule(ops=("linear", "norm"))])),
    "channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)),
        (2, 3, 6, 6),
        Policy([Rule(ops=("conv", "norm"))]),
    ),
    "training": (lambda: nn.Linear(8, 4), (3, 8), Policy.training()),
}


@pytest.mark.parametrize("name", MAPPED)
def test_forward_derivatives_of_what_vmap_maps(name: str, device: str) -> None:
    """torch's rule for vmap under jvp took a tuple of options for arguments, and saved tensors of one mode for those of the other."""
    make, shape, policy = MAPPED[name]
    torch.manual_seed(0)
    model = make().to(device)
    params = {k: v.detach() for k, v in model.named_parameters()}
    qfn = teint8.quantize(model, policy)
    xs, ts = (torch.randn(2, *shape, device=device) for _ in range(2))
    y, dy = torch.func.jvp(torch.func.vmap(lambda x: qfn(params, x)), (xs,), (ts,))
    for i in range(2):
        want = torch.func.jvp(lambda x: qfn(params, x), (xs[i],), (ts[i],))
        assert different(y[i], want[0]) == 0
        torch.testing.assert_close(dy[i], want[1])


@pytest.mark.parametrize("policy", [Policy.qat(), Policy.switchback(), Policy.training()], ids=["qat", "switchback", "training"])
def test_hessians(policy: Policy, device: str) -> None:
    model, x = nn.Linear(8, 4).to(device), torch.randn(3, 8, device=device)
    params = {k: v.detach() for k, v in model.named_parameters()}
    qfn = teint8.quantize(model, policy)
    for f, at in ((lambda x: qfn(params, x).tanh().sum(), x), (lambda b: qfn({**params, "bias": b}, x).tanh().sum(), params["bias"])):
        got, want = torch.func.hessian(f)(at), torch.func.jacfwd(torch.func.grad(f))(at)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert got.norm() > 0.1


def test_gradients_are_not_asked_for_in_inference_mode(device: str) -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Unflatten(1, (8, 4)), nn.Conv1d(8, 4, 3)).to(device)
    x, params = torch.randn(5, 24, device=device), dict(model.named_parameters())
    want = teint8.quantize(model)(params, x)
    with torch.inference_mode(), torch.enable_grad():
        for training in (True, False):
            with te_int8_autocast(training=training):
                y = model(x)
            assert different(y, want) == 0 and not y.requires_grad
        assert different(teint8.quantize(model, Policy.training())(params, x), want) == 0


@pytest.mark.parametrize("make", [lambda: nn.InstanceNorm2d(8), lambda: nn.GroupNorm(2, 8, affine=False), lambda: nn.GroupNorm(2, 8)])
def test_results_of_norms_may_be_written_in_place(make, device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)).to(device)
    other = nn.Sequential(model[0], model[1], nn.ReLU(), model[3])
    x, grads = torch.randn(2, 3, 9, 9, device=device), []
    for net in (model, other):
        with te_int8_autocast(policy=Policy([Rule(ops=("conv", "norm"))])):
            grads.append(torch.autograd.grad(net(x).square().sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_bias_that_does_not_fit_any_more_is_refused() -> None:
    layer, x = nn.Linear(32, 4096), torch.randn(16, 32)
    with torch.no_grad(), te_int8_autocast(training=False):
        layer(x), layer(x), layer(x)
        layer.bias.data = torch.zeros(3)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"\(3,\)"):
                layer(x)


def test_a_bias_that_does_not_count_has_a_gradient_of_zeros() -> None:
    bias, x, w = torch.full((16,), float("nan"), requires_grad=True), torch.randn(8, 32), torch.randn(32, 16)
    qfn = teint8.quantize(lambda p, x: torch.addmm(p["b"], x, p["w"], beta=0, alpha=2))
    y = qfn({"b": bias, "w": w}, x)
    assert torch.equal(y, 2 * teint8.quantize(lambda p, x: x @ p["w"])({"w": w}, x))
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.zeros(16))


def test_lengths_of_packed_sequences_are_not_read_in_an_abstract_run() -> None:
    x = nn.utils.rnn.pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])
    model = nn.LSTM(8, 8)
    qfn, params = teint8.quantize(model, Policy([Rule(ops=("recurrent",))])), dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"PackedSequence.*without inputs it goes by the types"):
        teint8.pack(qfn, params, x)
    assert torch.equal(qfn(teint8.pack(qfn, params), x)[0].data, qfn(params, x)[0].data)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_that_dynamo_gives_up(make) -> None:
    """It then compiled the context's own calls, one by one, and took a dtype for a number."""
    model, x = nn.ModuleList([make(8, 8), nn.Linear(8, 4)]), torch.randn(2, 5, 8)
    whole = lambda x: model[1](model[0](x)[0])
    with torch.no_grad():
        for how in (dict(training=True), dict(training=False), dict(enabled=False)):
            torch._dynamo.reset()
            with te_int8_autocast(**how):
                assert torch.equal(torch.compile(whole, backend="eager")(x), whole(x))
        qfn, params = teint8.quantize(model[0]), dict(model[0].named_parameters())
        assert torch.equal(torch.compile(qfn, backend="eager")(params, x)[0], qfn(params, x)[0])


def test_layers_whose_rule_they_do_not_take_are_not_packed() -> None:
    """pack went by the types of layers alone: their calls stayed float, by weights that were rounded."""
    blocks, tensor = Quant("block", block=32), Quant("tensor")
    for make, shape, rule in (
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10)),
            (2, 3, 8, 8),
            Rule(weight=blocks, activation=blocks),
        ),
        (lambda: nn.Sequential(nn.ConvTranspose1d(3, 8, 3), nn.Linear(10, 64), nn.Linear(64, 4)), (2, 3, 8), Rule(activation=blocks)),
        (lambda: nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 4)), None, Rule(ops=("embedding", "linear"), weight=tensor)),
    ):
        model = make()
        x = torch.randint(9, (4, 3)) if shape is None else torch.randn(shape)
        qfn, params = teint8.quantize(model, Policy([rule])), dict(model.named_parameters())
        packed = teint8.pack(qfn, params)
        assert torch.equal(qfn(packed, x), qfn(params, x))
        assert {k: type(v) for k, v in packed.items()} == {k: type(v) for k, v in teint8.pack(qfn, params, x).items()}
        assert not isinstance(packed["0.weight"], QTensor)
    bilinear = nn.Bilinear(64, 64, 3)
    qfn = teint8.quantize(bilinear, Policy([Rule(weight=tensor)]))
    with pytest.raises(ValueError, match="no weight"):
        teint8.pack(qfn, dict(bilinear.named_parameters()))


class Reused(nn.Module):
    """A layer's weight that is used in another way, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.head, self.how = nn.Linear(32, 48), nn.Linear(32, 4), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.inner.weight
        if self.how == "tied":
            return self.head(self.inner(x) @ w)
        if self.how == "norm":
            return self.head(x) + self.inner(x).sum() * w.norm()
        a, b = w.chunk(2)
        return self.head(x) + F.linear(x, a).sum() + (x @ b.T).sum()


@pytest.mark.parametrize("how", ["tied", "norm", "chunk"])
def test_a_packed_weight_in_another_use_is_told_of(how: str) -> None:
    model, x = Reused(how), torch.randn(6, 32)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    with pytest.warns(UserWarning, match=r"inner.weight is packed, and is used .*pack\(qfn, params, \*example_inputs\)"):
        qfn(teint8.pack(qfn, params), x)
    with pytest.raises(ValueError, match=r"strict: inner.weight"):
        teint8.quantize(model, strict=True)(teint8.pack(qfn, params), x)
    packed = teint8.pack(qfn, params, x)
    assert torch.equal(qfn(packed, x), qfn(params, x)) and isinstance(packed["head.weight"], QTensor)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(32, 8, 3), (4, 32, 9)),
        (lambda: nn.Conv2d(32, 8, 3), (4, 32, 8, 8)),
        (lambda: nn.ConvTranspose2d(32, 8, 3), (4, 32, 8, 8)),
        (lambda: nn.Conv3d(32, 8, 3), (2, 32, 4, 4, 4)),
    ],
)
def test_loaded_convolutions_have_the_bits_of_packed_ones(make, shape, tmp_path) -> None:
    """By a float activation, too: torch chooses how to add up by how the weight lies."""
    model, x = make(), torch.randn(shape)
    for policy in (Policy.weight_only(), Policy.qat()):
        qfn, params = teint8.quantize(model, policy), dict(model.named_parameters())
        packed = teint8.pack(qfn, params)
        teint8.save_packed(tmp_path / "it.safetensors", packed)
        loaded = teint8.load_packed(tmp_path / "it.safetensors").params
        assert torch.equal(qfn(loaded, x), qfn(packed, x)) and torch.equal(qfn(params, x), qfn(packed, x))
        if not isinstance(model, nn.ConvTranspose2d):
            assert loaded["weight"].codes.stride() == packed["weight"].codes.stride()


@pytest.mark.parametrize("training", [False, True])
def test_tensors_may_be_swapped_after_the_cache_is_cleared(training: bool) -> None:
    model, x = layers(), torch.randn(8, 24)
    for _ in range(2):
        with torch.no_grad(), te_int8_autocast(training=training):
            model(x), model(x)
    te_int8_autocast.cache_clear()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Conv2d(3, 8, 3), (2, 3, 8, 8)), (lambda: nn.ConvTranspose1d(3, 8, 3), (2, 3, 8)), (lambda: nn.Linear(8, 8), (4, 8))],
)
@pytest.mark.filterwarnings("error:teint8")
def test_what_is_compared_by_explain_is_no_use_of_a_packed_weight(make, shape) -> None:
    model, x = make(), torch.randn(shape)
    for strict in (False, True):
        qfn = teint8.quantize(model, strict=strict)
        packed = teint8.pack(qfn, dict(model.named_parameters()))
        receipt = teint8.explain(qfn, packed, x)
        assert receipt.int8_calls == receipt.calls == 1 and receipt.records[0].sqnr > 30


@pytest.mark.filterwarnings("error:teint8")
def test_a_policy_that_leaves_a_packed_weight_in_float_is_no_misuse() -> None:
    model, x = layers(), torch.randn(8, 24)
    packed = teint8.pack(teint8.quantize(model), dict(model.named_parameters()))
    for strict in (False, True):
        policy = Policy([Rule("0.*", weight=None), Rule(ops=("linear", "matmul", "embedding"))])
        y = teint8.quantize(model, policy, strict=strict)(packed, x)
        assert y.shape == (8, 24)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_addmm_has_the_dtype_of_torch_under_autocast(beta: int) -> None:
    bias, x, w = torch.randn(16, requires_grad=True), torch.randn(8, 32), torch.randn(32, 16)
    run = lambda p, x: torch.addmm(p["b"], x, p["w"], beta=beta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for b in (bias, bias.detach()):
            assert teint8.quantize(run)({"b": b, "w": w}, x).dtype == run({"b": b, "w": w}, x).dtype == torch.bfloat16


def test_other_operands_of_the_operator_may_answer_for_themselves() -> None:
    class Doubles:
        def __rmatmul__(self, other: torch.Tensor) -> torch.Tensor:
            return other * 2

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    x = torch.randn(3, 4)
    assert torch.equal(teint8.quantize(lambda p, x: x @ Doubles())({"w": x}, x), x @ Doubles())
    with pytest.raises(ValueError, match=r"float64 but weight is torch.float32"):
        teint8.quantize(lambda p, x: x @ p["w"])({"w": torch.randn(4, 5)}, x.double())


def test_a_rule_in_json_may_leave_out_its_ops() -> None:
    assert Policy.from_json('[{"path": "a.*"}]') == Policy([Rule("a.*")])
